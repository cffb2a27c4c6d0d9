"""What must agree between two places that score, so that their rewards are the same."""

from __future__ import annotations

from collections.abc import Mapping

from model.scorer import ScorerIdentity


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
