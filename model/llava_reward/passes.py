"""Which samples of a batch show one picture, and how a batch is cut into passes. Needs no torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

IDS = "input_ids"  # all other arrays are made of the picture
_PROBES = 512  # values looked at before pictures are compared in full


def picture_numbers(samples: Sequence[Mapping[str, np.ndarray]]) -> list[int]:
    """Numbers that are equal exactly where all arrays but the ids are, counted from 0 by first appearance."""
    firsts: list[Mapping[str, np.ndarray]] = []  # by number
    numbers: list[int] = []
    alike: dict[Hashable, list[int]] = {}  # numbers of pictures that a few values do not tell apart
    for arrays in samples:
        candidates = alike.setdefault(_probe(arrays), [])
        number = next((n for n in candidates if _same_picture(firsts[n], arrays)), len(firsts))
        if number == len(firsts):
            firsts.append(arrays)
            candidates.append(number)
        numbers.append(number)
    return numbers


def _picture(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in sorted(arrays.items()) if name != IDS}


def _probe(arrays: Mapping[str, np.ndarray]) -> Hashable:
    """Hashing whole pictures would cost milliseconds each; most differ somewhere in a few hundred values."""
    return tuple(
        (name, array.shape, array.reshape(-1)[:: max(1, array.size // _PROBES)].tobytes())
        for name, array in _picture(arrays).items()
    )


def _same_picture(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return all(x is y or np.array_equal(x, y) for x, y in zip(_picture(a).values(), _picture(b).values(), strict=True))


@dataclass(frozen=True)
class Cost:
    """Tokens of one sample. ``before``: of them, those which samples with an equal ``group`` compute once a pass."""

    tokens: int
    before: int
    group: Hashable

    @property
    def own(self) -> int:
        return self.tokens - self.before


def plan_passes(costs: Mapping[int, Cost], max_tokens: int) -> list[list[int]]:
    """Cut samples into passes of at most ``max_tokens`` tokens, longest first, groups together where possible.

    Samples that are alone in a pass with their group are padded to the longest of them; a group counts what stands
    before its captions once, and each caption's own tokens. One sample may exceed the limit alone. So may a group:
    its captions' own tokens get a quarter of the limit however much stands before them, since another pass would
    compute all of that again.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, cost in costs.items():
        groups.setdefault(cost.group, []).append(index)
    pieces = [piece for indices in groups.values() for piece in _pieces(indices, costs, max_tokens)]
    pieces.sort(key=lambda piece: costs[piece[0]].tokens, reverse=True)
    passes: list[list[list[int]]] = []
    for piece in pieces:
        if passes and _tokens([*passes[-1], piece], costs) <= max_tokens:
            passes[-1].append(piece)
        else:
            passes.append([piece])
    return [[index for piece in parts for index in piece] for parts in passes]


def _pieces(indices: Sequence[int], costs: Mapping[int, Cost], max_tokens: int) -> list[list[int]]:
    """Samples of one group, longest first, in parts that a pass can hold."""
    room = max(max_tokens - costs[indices[0]].before, max_tokens // 4)
    pieces: list[list[int]] = []
    filled = 0
    for index in sorted(indices, key=lambda i: costs[i].own, reverse=True):
        if pieces and filled + costs[index].own <= room:
            pieces[-1].append(index)
            filled += costs[index].own
        else:
            pieces.append([index])
            filled = costs[index].own
    return pieces


def _tokens(pieces: Sequence[Sequence[int]], costs: Mapping[int, Cost]) -> int:
    alone = [costs[piece[0]].tokens for piece in pieces if len(piece) == 1]
    joined = [costs[piece[0]].before + sum(costs[i].own for i in piece) for piece in pieces if len(piece) > 1]
    return len(alone) * max(alone, default=0) + sum(joined)
