"""Probabilities from rewards: found where they are known, chosen by what was held out, refused where they cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ConfigError
from model.evaluation.calibration import (
    Isotonic,
    Platt,
    calibrate,
    expected_calibration_error,
    fit_isotonic,
    fit_platt,
    from_json,
    log_loss,
    reliability,
)


def _drawn(probability, count=4000, seed=0):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=count)
    return rng.random(count) < probability(rewards), rewards


def _names(count):
    return [f"p{i}" for i in range(count)]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _stairs(rewards):
    return np.select([rewards < -0.5, rewards < 0.7], [0.1, 0.5], 0.98)


def test_platt_finds_the_curve_that_drew_the_labels():
    is_safe, rewards = _drawn(lambda r: _sigmoid(2 * r + 0.5), 20_000)
    found = fit_platt(is_safe, rewards)
    assert found.slope == pytest.approx(2.0, abs=0.15)
    assert found.offset == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_unit_of_rewards_does_not_matter(scale):
    is_safe, rewards = _drawn(lambda r: _sigmoid(2 * r + 0.5))
    assert fit_platt(is_safe, rewards * scale).slope * scale == pytest.approx(
        fit_platt(is_safe, rewards).slope, rel=1e-3
    )


def test_platt_stays_finite_where_rewards_separate_the_labels():
    rewards = np.linspace(-1, 1, 40)
    found = fit_platt(rewards > 0, rewards)
    probabilities = found(rewards)
    assert 0 < probabilities.min() < 0.1
    assert 0.9 < probabilities.max() < 1


def test_the_better_method_is_chosen_by_what_it_has_not_seen():
    smooth = calibrate(*_drawn(lambda r: _sigmoid(2 * r)), _names(4000), seed=0)
    assert smooth.method == "platt"
    steps = calibrate(*_drawn(_stairs), _names(4000), seed=0)
    assert steps.method == "isotonic"
    assert steps.log_loss["isotonic"] < steps.log_loss["platt"]


def test_held_out_probabilities_are_reliable():
    is_safe, rewards = _drawn(_stairs)
    fitted = calibrate(is_safe, rewards, _names(4000), seed=0)
    bins = reliability(is_safe, fitted.held_out)
    assert sum(one.count for one in bins) == 4000
    assert sum(one.low <= one.predicted <= one.high for one in bins) >= 8  # of ten intervals of 95 %
    assert expected_calibration_error(bins) < 0.03
    twisted = reliability(is_safe, fitted.held_out**4)
    assert expected_calibration_error(twisted) > 0.1


def test_no_prompt_is_on_both_sides():
    # 40 prompts of 25 images; the label belongs to the prompt, and the reward is the prompt's own number. A fit that
    # has seen the prompt knows its label; one that has not cannot do better than a coin.
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.permutation([True, False] * 20), 25)
    rewards = np.repeat(rng.normal(size=40), 25) + labels * 1e-3
    clusters = np.repeat(_names(40), 25).tolist()
    apart = calibrate(labels, rewards, clusters, seed=0)
    leaking = calibrate(labels, rewards, _names(1000), seed=0)
    assert leaking.log_loss["isotonic"] < apart.log_loss["isotonic"] - 0.05


def test_the_same_seed_gives_the_same_fit():
    is_safe, rewards = _drawn(_stairs, 300)
    first, again = (calibrate(is_safe, rewards, _names(300), seed=5) for _ in range(2))
    assert (first.calibration, first.log_loss) == (again.calibration, again.log_loss)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=4, max_size=40))
def test_isotonic_never_falls_and_never_claims_certainty(rows):
    labels, rewards = (np.asarray(column) for column in zip(*rows, strict=True))
    found = fit_isotonic(labels, rewards.astype(float))
    grid = found(np.linspace(-7, 7, 100))
    assert (np.diff(grid) >= -1e-12).all()
    edge = 1 / (len(rows) + 2)
    assert edge - 1e-12 <= grid.min() <= grid.max() <= 1 - edge + 1e-12


@pytest.mark.parametrize("calibration", [Platt(1.5, -0.2), Isotonic((-1.0, 0.5), (0.1, 0.9))])
def test_json_keeps_it(calibration):
    assert from_json(json.loads(json.dumps(calibration.as_json()))) == calibration


def test_refusals():
    is_safe, rewards = _drawn(lambda r: _sigmoid(2 * r), 400)
    with pytest.raises(ConfigError, match="do not rise with the labels"):
        calibrate(~is_safe, rewards, _names(400), seed=0)
    with pytest.raises(ConfigError, match="7 more are needed"):
        calibrate(np.arange(400) > 2, rewards, _names(400), seed=0)
    with pytest.raises(ConfigError, match="all labels belong to 2 prompts"):
        calibrate(is_safe, rewards, ["p", "q"] * 200, seed=0)
    for content in ({"method": "magic"}, {"method": "platt", "slope": 1.0}, {}):
        with pytest.raises(ConfigError, match="calibration"):
            from_json(content)


def test_log_loss_by_hand():
    # -(ln 0.8 + ln 0.5)/2 = (0.2231 + 0.6931)/2
    assert log_loss(np.asarray([True, False]), np.asarray([0.8, 0.5])) == pytest.approx(0.45815, abs=1e-5)
