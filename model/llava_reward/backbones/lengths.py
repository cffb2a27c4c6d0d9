"""Which tokens of a right-padded batch are real.

Letters: b: samples, l: padded length, d: any width, h: hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.llava_reward.backbones.layers import Attention


@dataclass(frozen=True)
class Lengths:
    """Samples side by side, padded on the right, one end token each. ``counts``: ``(b,)`` int64, real tokens."""

    counts: Tensor
    padded: int

    def mix(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causality alone keeps real tokens from seeing padding on their right: no mask is built."""
        return attention.mix(q, k, v, mask=None)

    def pick_last(self, values: Tensor) -> Tensor:
        """The end token's row of ``(b, ..., l, d)`` or ``(1, ..., l, d)``: ``(b, ..., 1, d)``."""
        values = values.expand(len(self.counts), *values.shape[1:])
        index = (self.counts - 1).view(-1, *[1] * (values.dim() - 1))
        return values.gather(-2, index.expand(*values.shape[:-2], 1, values.shape[-1]))

    def key_mask(self) -> Tensor:
        """``(b, 1, 1, l)`` bool, true at real tokens."""
        positions = torch.arange(self.padded, device=self.counts.device)
        return (positions < self.counts[:, None])[:, None, None, :]

    def stacked(self, times: int) -> Lengths:
        """The samples ``times`` over."""
        return Lengths(self.counts.repeat(times), self.padded)
