"""Scenes that teach and scenes that measure have nothing in common."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from model.scene_grammar import HELD_OUT_PAIRS, Colour, Kind, Mismatch, holds_held_out_pair
from model.scene_splits import Split, belongs, candidate_seeds
from model.scenes import asked_spec, shown_spec


def test_every_kind_has_one_held_out_colour_and_no_colour_more_than_two() -> None:
    assert Counter(kind for kind, _ in HELD_OUT_PAIRS) == dict.fromkeys(Kind, 1)
    colours = Counter(colour for _, colour in HELD_OUT_PAIRS)
    assert set(colours) == set(Colour)
    assert max(colours.values()) == 2


def test_seeds_of_splits_and_numbers_are_disjoint() -> None:
    seeds = [seed for split in Split for number in (0, 1, 7, 10**9 - 1) for seed in candidate_seeds(split, number)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) > 10**9  # demonstration data and tests use small ones


def test_a_held_out_pair_may_be_asked_or_shown() -> None:
    by_mismatch = 0
    for seed in islice(candidate_seeds(Split.TRAINING, 0), 300):
        asked, shown = asked_spec(seed), shown_spec(seed, Mismatch.COLOUR)
        is_held_out = holds_held_out_pair(asked) or holds_held_out_pair(shown)
        by_mismatch += is_held_out and not holds_held_out_pair(asked)
        assert belongs(Split.HELD_OUT, asked, shown) == is_held_out
        assert belongs(Split.TRAINING, asked, shown) != is_held_out
        assert belongs(Split.VALIDATION, asked, shown) != is_held_out
    assert by_mismatch > 5
