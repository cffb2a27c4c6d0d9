"""What rewards say about pairs and about safety. Standard library only.

Source: LLaVA-Reward, released code: Bradley-Terry, general preference (GPM) and classification heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def _sigmoid(value: float) -> float:
    # Two forms, so that exp never overflows.
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def gpm_score(a: Sequence[float], b: Sequence[float]) -> float:
    """Antisymmetric preference score of two GPM vectors of even length: sum over 2-blocks of a0*b1 - a1*b0."""
    if len(a) != len(b) or len(a) % 2:
        raise ValueError(f"GPM vectors of lengths {len(a)} and {len(b)}, expected the same even length")
    return sum(a[i] * b[i + 1] - a[i + 1] * b[i] for i in range(0, len(a), 2))


def preference_probability(chosen: Sequence[float], rejected: Sequence[float], tau: float) -> float:
    """P(chosen preferred), in [0, 1].

    - chosen, rejected: what the head gave for each: one value (BT: sigmoid((c - r)/tau)), or a GPM vector of even
      length (sigmoid(s(c, r)/tau))
    - tau: temperature, ``general_preference_tau`` of the checkpoint
    """
    if len(chosen) == len(rejected) == 1:
        return _sigmoid((chosen[0] - rejected[0]) / tau)
    return _sigmoid(gpm_score(chosen, rejected) / tau)


def safe_probability(reward: float) -> float:
    """P(safe) of a checkpoint trained by classification. A pairwise-trained reward has no such meaning."""
    return _sigmoid(reward)
