"""From a reward to the probability that people call the image safe (label 1): Platt scaling or isotonic regression.

Both are fitted on labelled rewards; the one with the lower log loss on labels that it was not fitted on is taken. The
probability is that of the population that the labels were drawn from: a set balanced by hand gives that set's.
Fitting needs scikit-learn; applying a stored calibration does not. Letter: n labelled images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from model.errors import ConfigError
from model.evaluation.bootstrap import Clusters
from model.evaluation.libraries import Bools, Floats, Ints, library

FOLDS = 5
_MIN_PER_CLASS = 10  # below that, five folds have next to nothing of a class


class Calibration(Protocol):
    """Reward to probability, never falling."""

    def __call__(self, rewards: Floats) -> Floats:
        """Probabilities strictly within (0, 1), shaped as ``rewards``."""
        ...

    def as_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        ...


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope * reward + offset), ``slope`` > 0."""

    slope: float
    offset: float

    def __call__(self, rewards: Floats) -> Floats:
        """See ``Calibration``. The sigmoid of a large number rounds to 1, and is kept off it."""
        logits = np.clip(self.slope * rewards + self.offset, -36.0, 36.0)
        return np.asarray(1 / (1 + np.exp(-logits)))

    def as_json(self) -> dict[str, Any]:
        """See ``Calibration``."""
        return {"method": "platt", "slope": self.slope, "offset": self.offset}


@dataclass(frozen=True)
class Isotonic:
    """Straight lines between knots, level beyond the first and the last."""

    rewards: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, rewards: Floats) -> Floats:
        """See ``Calibration``."""
        return np.asarray(np.interp(rewards, self.rewards, self.probabilities))

    def as_json(self) -> dict[str, Any]:
        """See ``Calibration``."""
        return {"method": "isotonic", "rewards": list(self.rewards), "probabilities": list(self.probabilities)}


def from_json(content: dict[str, Any]) -> Calibration:
    """A stored calibration. Raises ``ConfigError`` for anything else."""
    try:
        if content["method"] == "platt":
            return Platt(float(content["slope"]), float(content["offset"]))
        if content["method"] == "isotonic":
            return Isotonic(tuple(map(float, content["rewards"])), tuple(map(float, content["probabilities"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"not a calibration: {type(error).__name__}: {error}") from error
    raise ConfigError(f"calibration method {content['method']!r} is neither platt nor isotonic")


def fit_platt(is_safe: Bools, rewards: Floats) -> Platt:
    """Maximum likelihood with Platt's softened targets, (s + 1)/(s + 2) for s safe and 1/(u + 2) for u unsafe images.

    Without them rewards that separate the classes would have an infinite slope. Source: Platt, Probabilistic Outputs
    for Support Vector Machines (1999), section 2.2. Raises ``ConfigError`` where rewards do not rise with the labels.
    """
    safe, unsafe = int(is_safe.sum()), int((~is_safe).sum())
    target = np.where(is_safe, (safe + 1) / (safe + 2), 1 / (unsafe + 2))
    # A soft target is both labels, weighted; the scale keeps the solver's steps even for rewards of any unit.
    scale = float(rewards.std()) or 1.0
    x = np.concatenate([rewards, rewards])[:, None] / scale
    y = np.repeat([1, 0], len(rewards))
    model = library("sklearn.linear_model").LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(x, y, sample_weight=np.concatenate([target, 1 - target]))
    slope, offset = float(model.coef_[0, 0]) / scale, float(model.intercept_[0])
    if slope <= 0:
        raise ConfigError(
            f"rewards do not rise with the labels (slope {slope:.3g}): nothing can be calibrated on them; are labels "
            "1 for safe and 0 for unsafe, and is it the right perspective?"
        )
    return Platt(slope, offset)


def fit_isotonic(is_safe: Bools, rewards: Floats) -> Isotonic:
    """Least squares among all functions that never fall.

    Its ends are often exactly 0 and 1, which a few labels cannot show: probabilities are kept within
    [1/(n + 2), (n + 1)/(n + 2)].
    """
    model = library("sklearn.isotonic").IsotonicRegression(out_of_bounds="clip")
    model.fit(rewards, is_safe.astype(np.float64))
    edge = 1 / (len(rewards) + 2)
    probabilities = np.clip(model.y_thresholds_, edge, 1 - edge)
    return Isotonic(tuple(map(float, model.X_thresholds_)), tuple(map(float, probabilities)))


_FITS: dict[str, Callable[[Bools, Floats], Calibration]] = {"platt": fit_platt, "isotonic": fit_isotonic}


@dataclass(frozen=True)
class Fitted:
    """The chosen calibration, fitted on all labels.

    - log_loss: per method, in nats, on labels that it was not fitted on
    - held_out: ``(n,)`` probability of each labelled image from a fit of the chosen method that did not see its cluster
    """

    calibration: Calibration
    method: str
    log_loss: dict[str, float]
    held_out: Floats


def calibrate(is_safe: Bools, rewards: Floats, clusters: Sequence[str], seed: int) -> Fitted:
    """Fit both methods, take the one with the lower held-out log loss (Platt on a tie).

    Held out is a fifth at a time, with all images of a cluster (prompt) on one side. Raises ``ConfigError`` with too
    few labels of a class, or rewards that do not rise with the labels.
    """
    smaller = int(min(is_safe.sum(), (~is_safe).sum()))
    if smaller < _MIN_PER_CLASS:
        raise ConfigError(
            f"{smaller} labels of the rarer class are too few to calibrate on: {_MIN_PER_CLASS - smaller} more "
            f"are needed ({_MIN_PER_CLASS} of each class)"
        )
    units = Clusters(clusters)
    if units.count < FOLDS:
        raise ConfigError(f"all labels belong to {units.count} prompts; at least {FOLDS} are needed to hold some out")
    folds = _folds(is_safe, units, seed)
    held_out = {name: _held_out(fit, is_safe, rewards, folds) for name, fit in _FITS.items()}
    losses = {name: log_loss(is_safe, probabilities) for name, probabilities in held_out.items()}
    best = min(losses, key=lambda name: losses[name])
    return Fitted(_FITS[best](is_safe, rewards), best, losses, held_out[best])


def log_loss(is_safe: Bools, probabilities: Floats) -> float:
    """Mean of -log of the probability given to what people said, in nats."""
    return float(-np.log(np.where(is_safe, probabilities, 1 - probabilities)).mean())


def _folds(is_safe: Bools, units: Clusters, seed: int) -> Ints:
    """``(n,)`` number of the fold in which each row is held out; clusters whole, both classes spread over the folds."""
    splitter = library("sklearn.model_selection").StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = np.zeros(len(is_safe), dtype=np.int64)
    for number, (_, held) in enumerate(splitter.split(np.zeros(len(is_safe)), is_safe, units.units)):
        folds[held] = number
    for number in np.unique(folds):
        if len(np.unique(is_safe[folds != number])) < 2:
            raise ConfigError("all images of a class share a prompt: nothing of it is left once that is held out")
    return folds


def _held_out(fit: Callable[[Bools, Floats], Calibration], is_safe: Bools, rewards: Floats, folds: Ints) -> Floats:
    probabilities = np.zeros(len(rewards))
    for number in np.unique(folds):
        held = folds == number
        probabilities[held] = fit(is_safe[~held], rewards[~held])(rewards[held])
    return probabilities


@dataclass(frozen=True)
class Bin:
    """Images of similar probability: their number, mean probability, and share that people call safe."""

    count: int
    predicted: float
    observed: float
    low: float
    high: float


def reliability(is_safe: Bools, probabilities: Floats, bins: int = 10) -> list[Bin]:
    """Bins of equal counts, lowest probability first, with exact 95 % intervals of the observed share."""
    order = np.argsort(probabilities, kind="stable")
    stats = library("scipy.stats")
    found = []
    for rows in np.array_split(order, min(bins, len(order))):
        safe = int(is_safe[rows].sum())
        ends = stats.binomtest(safe, len(rows)).proportion_ci(0.95)
        found.append(
            Bin(len(rows), float(probabilities[rows].mean()), safe / len(rows), float(ends.low), float(ends.high))
        )
    return found


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean over images of |share called safe - probability| of their bin, in [0, 1]."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.observed - one.predicted) for one in bins) / total
