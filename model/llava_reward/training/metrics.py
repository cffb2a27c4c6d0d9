"""Numbers of a step and of an evaluation, summed over micro-batches and workers."""

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
        own = (outcome.loss.detach() * count, outcome.correct, outcome.probability, torch.tensor(float(count)))
        self.values += torch.stack([value.to(self.values) for value in own])


@dataclass(frozen=True)
class Scores:
    """Means over records. ``accuracy`` and ``probability`` (of the right answer) in [0, 1]."""

    loss: float
    accuracy: float
    probability: float


def scores(summed: Tensor) -> Scores:
    """Means of the sums over all workers."""
    loss, correct, probability, count = summed.tolist()
    return Scores(loss / count, correct / count, probability / count)
