"""Which scenes teach and which measure: disjoint seeds, and combinations of kind and colour that never teach.

Whoever trains on scenes takes them from ``Split.TRAINING``; then validation scenes are new scenes of known
combinations, and held-out scenes ask for or show a combination that no training scene holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from model.scene_grammar import SceneSpec, holds_held_out_pair


class Split(StrEnum):
    """What scenes are for."""

    TRAINING = "training"
    VALIDATION = "validation"
    HELD_OUT = "held_out"


# Far from each other and from the small seeds of tests and demonstration data.
_FIRST_SEEDS = {Split.TRAINING: 10**12, Split.VALIDATION: 2 * 10**12, Split.HELD_OUT: 3 * 10**12}
_CANDIDATES = 1000  # a thousandth of the scenes is enough for any filter that a scene may have to pass


def candidate_seeds(split: Split, number: int) -> Iterator[int]:
    """Seeds from which scene ``number`` (from 0, below 10^9) of a split is chosen: the first that fits; no two
    numbers or splits have one in common."""
    first = _FIRST_SEEDS[split] + number * _CANDIDATES
    return iter(range(first, first + _CANDIDATES))


def belongs(split: Split, asked: SceneSpec, shown: SceneSpec) -> bool:
    """Whether a scene may be used in a split, by its combinations."""
    is_held_out = holds_held_out_pair(asked) or holds_held_out_pair(shown)
    return is_held_out == (split is Split.HELD_OUT)
