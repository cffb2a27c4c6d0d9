"""Learning rate by step: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup: int, last: float = 0.0) -> float:
    """Factor of the peak rate for a step counted from 0: 1 at the last step of the warm-up, ``last`` after all steps.

    - warmup: steps of it
    """
    if step < warmup:
        return (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    return last + (1 - last) * falling
