"""Which samples of a batch show the same picture: those that hold the very same tensor.

Whoever makes the samples decides that (see ``Backbone.with_picture_of``); nothing is compared here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Pictures:
    """``numbers``: the picture of each sample, counted from 0 in the order of first appearance."""

    numbers: tuple[int, ...]

    @classmethod
    def of(cls, held: Sequence[object]) -> Pictures:
        """From what each sample holds; identity counts, not equality."""
        seen: dict[int, int] = {}
        return cls(tuple(seen.setdefault(id(item), len(seen)) for item in held))

    @classmethod
    def joined(cls, parts: Sequence[Pictures]) -> Pictures:
        """Of batches one behind the other; no two of them show the same picture."""
        numbers: list[int] = []
        for part in parts:
            before = len(set(numbers))
            numbers += [number + before for number in part.numbers]
        return cls(tuple(numbers))

    def once(self, per_sample: Sequence[T]) -> list[T]:
        """What the first sample of each picture has."""
        return [per_sample[self.numbers.index(number)] for number in range(len(set(self.numbers)))]

    def each(self, per_picture: Sequence[T]) -> list[T]:
        """One entry a sample, the same object for samples of one picture."""
        return [per_picture[number] for number in self.numbers]

    def slots(self) -> list[int]:
        """How many samples before each one show its picture."""
        return [self.numbers[:row].count(number) for row, number in enumerate(self.numbers)]
