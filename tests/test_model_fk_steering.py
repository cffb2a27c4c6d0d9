"""The adapter for FK steering, driven as the public code drives a reward."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from model.errors import ConfigError, InputError
from model.fake import FakeScorer
from model.fk_steering import make_reward_fn
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import load

CAPTION = "a red ball under a tree"


def particles(count: int, seed: int = 0) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in values]


def test_rewards_are_those_of_the_files() -> None:
    scorer = load("demo")
    images = particles(4)
    rewards = make_reward_fn(scorer)(images, [CAPTION] * 4)
    files = []
    for index, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "BMP")  # another file, the same pixels
        files.append(Generation(str(index), CAPTION, buffer.getvalue()))
    expected = [record.rewards[Perspective.OVERALL] for record in scorer.score(files)]
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert len(set(rewards)) == 4
    assert all(type(reward) is float for reward in rewards)


def test_a_steering_run_keeps_the_particles_with_high_rewards() -> None:
    """The potential ``max`` of the public code: R = max(r, R_prev), w = exp(lambda R), resampled with replacement."""
    reward_fn = make_reward_fn(FakeScorer(), Perspective.ALIGNMENT)
    images = particles(8)
    rewards = reward_fn(images, [CAPTION] * 8)
    previous = [0.0] * 8
    kept = [max(pair) for pair in zip(rewards, previous, strict=True)]
    weights = np.clip([math.exp(10 * reward) for reward in kept], 0, 1e10)
    chosen = np.random.default_rng(0).choice(8, size=8, p=weights / weights.sum())
    again = reward_fn([images[i] for i in chosen], [CAPTION] * 8)
    assert again == [rewards[i] for i in chosen]
    assert np.mean(again) > np.mean(rewards)


def test_other_modes_and_no_images() -> None:
    reward_fn = make_reward_fn(FakeScorer())
    assert len(reward_fn([particles(1)[0].convert("L"), particles(1)[0].convert("RGBA")], [CAPTION] * 2)) == 2
    assert reward_fn([], []) == []


def test_heads_without_a_scalar_are_refused_at_once() -> None:
    scorer = FakeScorer()
    head = scorer.heads[Perspective.OVERALL]
    scorer.heads = {**scorer.heads, Perspective.OVERALL: dataclasses.replace(head, is_general_preference=True)}
    with pytest.raises(ConfigError, match="is a general-preference head: it compares images and gives none a number"):
        make_reward_fn(scorer)
    assert make_reward_fn(scorer, Perspective.SAFETY)(particles(1), [CAPTION])


def test_a_perspective_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="fake has no overall; it has safety"):
        make_reward_fn(FakeScorer([Perspective.SAFETY]))


def test_no_particle_goes_without_a_reward() -> None:
    reward_fn = make_reward_fn(FakeScorer())
    with pytest.raises(ValueError, match="2 images with 1 prompts"):
        reward_fn(particles(2), [CAPTION])
    with pytest.raises(InputError, match="image 1: "):
        reward_fn(particles(2), [CAPTION, "\ud800"])
