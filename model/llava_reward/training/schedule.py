"""Learning rate by step: linear warm-up, then half a cosine down to 0."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup_share: float) -> float:
    """Factor of the peak rate for a step counted from 0, in (0, 1]; 1 at the last step of the warm-up."""
    warmup = math.ceil(total * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
