"""Numbers of a step and of an evaluation, summed over micro-batches and workers; the temperature that fits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.llava_reward.training.objective import Outcome


class Sums:
    """Summed loss, right answers, probability of the right answer, and records; float64, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, outcome: Outcome, count: int) -> None:
        probability = outcome.logits.sigmoid().sum()
        own = (outcome.loss.detach() * count, outcome.correct, probability, torch.tensor(float(count)))
        self.values += torch.stack([value.to(self.values) for value in own])


@dataclass(frozen=True)
class Scores:
    """Means over records. ``accuracy`` and ``probability`` (of the right answer) in [0, 1]."""

    loss: float
    accuracy: float
    probability: float


@dataclass(frozen=True)
class Evaluation(Scores):
    """``temperature``: what to divide the log odds by, so that they are as sure as they are right; see below."""

    temperature: float


_MAX_TEMPERATURE = 100.0
_HALVINGS = 50


def fitted_temperature(logits: Tensor) -> float:
    """The temperature T in (0, 100] with the least mean of log(1 + exp(-logit / T)).

    1 where no answer is wrong: any smaller one would do better still. 100 where the answers are no better than a coin.

    - logits: ``(b,)``, log odds of the right answers, finite
    - source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, temperature scaling
    """
    logits = logits.double()
    if bool((logits >= 0).all()):
        return 1.0
    # Convex in 1 / T, so the root of its slope is the minimum.
    low, high = 1 / _MAX_TEMPERATURE, 1e6
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        is_below = bool((logits * (-middle * logits).sigmoid()).mean() > 0)
        low, high = (middle, high) if is_below else (low, middle)
    return 1 / low


def scores(summed: Tensor) -> Scores:
    """Means of the sums over all workers."""
    loss, correct, probability, count = summed.tolist()
    return Scores(loss / count, correct / count, probability / count)
