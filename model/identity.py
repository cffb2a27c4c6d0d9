"""What must agree between two places that score, so that their rewards are the same."""

from __future__ import annotations

from collections.abc import Mapping

from model.errors import ConfigError
from model.modes import EXACT, ROUNDED_MODES
from model.scorer import ScorerIdentity

# What differs between batches is only the order in which sums are made: matrix products choose a kernel by their
# number of rows, attention cuts its keys into blocks by the padded length. In float32 that stays in the last digits:
# 2.2e-6 was the most seen. In bfloat16 a sum beside the middle of a step is rounded the other way, a relative 2^-8, at
# some ten places a layer; at worst all roundings fall anew, which moves a reward by no more than twice what bfloat16
# moves it from float32. All of it grows with the weights of the head, as the spread of the rewards does. Seen were
# 1.6 to 5.9 % of their standard deviation; the bound leaves room up to 10 % (tests/benchmarks/README.md).
_SAME_WITHIN = {"float32": 1e-5, "bfloat16": 5e-2}
_SAME_WITHIN_SPREADS = {"float32": 0.0, "bfloat16": 0.1}
# In eight bits the last digit of float32 decides now and then which way a value is rounded, so the bound is that of
# bfloat16: 1.4e-2 was the most seen where rewards spread by 0.3 to 0.5, and it grows with them.


def same_within(dtype: str, spread: float, mode: str = EXACT) -> float:
    """The largest difference between two rewards that count as the same, in reward units.

    - spread: standard deviation of that reward over unlike inputs; 0 where it is not known
    - returns: 1e-5 in float32; in bfloat16 and in modes of eight bits 5e-2, or a tenth of the spread where that is more
    - raises: ``ConfigError`` for a dtype of which no bound is known
    """
    if dtype not in _SAME_WITHIN:
        raise ConfigError(f"dtype={dtype}: no bound is known but for {', '.join(_SAME_WITHIN)}; score in one of them")
    like = "bfloat16" if mode in ROUNDED_MODES else dtype
    return max(_SAME_WITHIN[like], _SAME_WITHIN_SPREADS[like] * spread)


def reward_facts(identity: ScorerIdentity, code_version: str) -> dict[str, str]:
    """Name -> value of everything that decides a reward: weights per perspective, preprocessing, dtype, mode, code."""
    facts = {f"checkpoint {perspective}": str(value) for perspective, value in identity.checkpoints.items()}
    facts |= {"preprocessing": identity.preprocessing_hash, "dtype": identity.dtype, "mode": identity.mode}
    return {**facts, "code": code_version}


def first_difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first fact in which they differ, as ``name: mine … , theirs …``; None when they agree."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name}: here {mine.get(name)}, there {theirs.get(name)}"
    return None
