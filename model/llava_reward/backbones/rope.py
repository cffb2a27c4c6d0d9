"""Rotary positions of Phi-3 ("su" / longrope), chosen per sample.

Letters: b: samples, l: padded length, d: head dimension.
Source: microsoft/Phi-3.5-vision-instruct, modeling_phi3_v.py, Phi3SuScaledRotaryEmbedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.llava_reward.config import RopeConfig


def rope_tables(lengths: Tensor, positions: Tensor, config: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions that tokens have in their own samples.

    The factor list (short or long) follows each sample's own length, never the padded one: a reward must not
    depend on its neighbours in the batch.

    - lengths: ``(b,)`` int; positions: ``(1, l)`` or ``(b, l)`` int, counted from 0
    - returns: two of ``(b, 1, l, d)`` float32, scaled by the attention scale
    """
    device = lengths.device
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = (1.0 / config.theta**exponents).expand(lengths.shape[0], -1)  # (b, d/2)
    if config.short_factor:
        factors = torch.tensor([config.short_factor, config.long_factor], dtype=torch.float32, device=device)
        is_long = (lengths > config.original_max_positions).long()
        frequencies = 1.0 / (factors[is_long] * config.theta**exponents)
    angles = frequencies[:, None, :] * positions.float()[..., None]  # (b, l, d/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # (b, 1, l, d)
    return angles.cos() * config.attention_scale, angles.sin() * config.attention_scale


def apply_rope(values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate in the half-split form: pair (j, j + d/2). ``values``: ``(b, heads, l, d)``; same shape and dtype out."""
    first, second = values.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (values.float() * cosines + rotated * sines).to(values.dtype)
