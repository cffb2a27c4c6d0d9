"""Which tokens of a right-padded batch are real.

Letters: b: samples, l: padded length, d: any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lengths:
    """Which tokens of right-padded samples are real. ``counts``: ``(b,)`` int64."""

    counts: Tensor
    padded: int

    def pick_last(self, values: Tensor) -> Tensor:
        """The end token's row of ``(b, ..., l, d)`` or ``(1, ..., l, d)``: ``(b, ..., 1, d)``."""
        values = values.expand(len(self.counts), *values.shape[1:])
        index = (self.counts - 1).view(-1, *[1] * (values.dim() - 1))
        return values.gather(-2, index.expand(*values.shape[:-2], 1, values.shape[-1]))

    def key_mask(self) -> Tensor:
        """``(b, 1, 1, l)`` bool, true at real tokens."""
        positions = torch.arange(self.padded, device=self.counts.device)
        return (positions < self.counts[:, None])[:, None, None, :]
