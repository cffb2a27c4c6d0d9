"""Which records a step sees, for any number of workers. Knows nothing of images or networks.

The epochs are one endless stream: each epoch a permutation of its own, drawn from the seed and its number. Step k is
the k-th ``batch_size`` records of it, so a step never has fewer, no epoch loses its rest, and the position in the data
is the number of the step. Workers cut each step among themselves: whatever their number, the steps
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from model.errors import ConfigError

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Stream:
    """``count`` records in steps of ``batch_size``."""

    count: int
    batch_size: int
    seed: int

    def step(self, number: int) -> list[int]:
        """Indices of the records of a step, counted from 0."""
        first = number * self.batch_size
        positions = (divmod(position, self.count) for position in range(first, first + self.batch_size))
        return [int(_permutation(self.seed, epoch, self.count)[place]) for epoch, place in positions]

    def epoch_of(self, number: int) -> float:
        """How many epochs are over once a step is done."""
        return (number + 1) * self.batch_size / self.count

    def total_steps(self, epochs: float) -> int:
        """Full steps in so many epochs. Raises ``ConfigError`` if there is none."""
        total = int(epochs * self.count // self.batch_size)
        if total < 1:
            raise ConfigError(
                f"batch_size={self.batch_size} is more than epochs={epochs:g} of {self.count} records; lower it"
            )
        return total


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def shard(items: Sequence[ItemT], rank: int, world: int) -> list[ItemT]:
    """One worker's part of a step; its length must be a multiple of ``world``."""
    size = len(items) // world
    return list(items[rank * size : (rank + 1) * size])


def cut(items: Sequence[ItemT], size: int) -> list[list[ItemT]]:
    """Pieces of ``size``, the last one possibly shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def check_division(batch_size: int, micro_batch: int, world: int) -> None:
    """Raises ``ConfigError`` unless every worker gets whole micro-batches."""
    if batch_size % (micro_batch * world):
        raise ConfigError(
            f"batch_size={batch_size} is no multiple of micro_batch={micro_batch} times workers={world}; change one"
        )
