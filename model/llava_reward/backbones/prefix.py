"""Phi-3's layers over many captions of one image: what stands before the captions is computed once.

Under causal attention the start of the text and the image tokens see no caption, so their keys and values are the
same for every caption. They are kept for one layer at a time; nothing is stored between calls.

Letters: m: captions of one image, p: tokens before them (image included), s: padded length of what follows,
h: hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from model.llava_reward.backbones.lengths import Lengths

if TYPE_CHECKING:
    from model.llava_reward.backbones.phi3v import Phi3Layer, Phi3VModel

Rope = tuple[Tensor, Tensor]


def tokens_before(input_ids: Tensor) -> int:
    """Tokens of one sample up to its last image token, which has a negative id."""
    return int((input_ids < 0).nonzero()[-1]) + 1


def caption_groups(ids: Sequence[Tensor], pictures: Sequence[Hashable], original_positions: int) -> list[list[int]]:
    """Rows whose tokens up to the image's last are computed alike: one picture, one text before it, one rotary form.

    - pictures: what tells the pictures apart, by row
    - original_positions: the rotary factors of samples longer than this differ
    """
    by_picture: dict[Hashable, list[int]] = {}
    for row, picture in enumerate(pictures):
        by_picture.setdefault(picture, []).append(row)
    groups = []
    for rows in by_picture.values():
        alike: dict[Hashable, list[int]] = {}
        for row in rows:
            # Only looked at where a picture repeats: reading ids waits for the device.
            start = tuple(ids[row][: tokens_before(ids[row])].tolist()) if len(rows) > 1 else ()
            alike.setdefault((start, len(ids[row]) > original_positions), []).append(row)
        groups += alike.values()
    return groups


def end_hidden_behind(model: Phi3VModel, before: Tensor, behind: Tensor, rope: Rope, counts: Tensor) -> Tensor:
    """Hidden states of the end tokens after the final norm, ``(m, h)``, as if each caption stood alone.

    - before: ``(t, p, h)`` embedded, the same for all captions, of each of ``t`` perspectives
    - behind: ``(m, s, h)``, padded on the right; the captions of one perspective behind those of the other
    - rope: cosines and sines of all ``p + s`` positions, ``(1, 1, p + s, d)``
    - counts: ``(m,)`` real tokens of each row of ``behind``
    """
    split = before.shape[1]
    near: Rope = (rope[0][..., :split, :], rope[1][..., :split, :])
    far: Rope = (rope[0][..., split:, :], rope[1][..., split:, :])
    length = behind.shape[1]
    # Each token sees everything before the captions, and its own caption up to itself.
    mask = torch.ones(length, split + length, dtype=torch.bool, device=behind.device).tril(split)
    for layer in model.layers[:-1]:
        before, behind = _layer(cast("Phi3Layer", layer), before, behind, (near, far), mask)
    last = cast("Phi3Layer", model.layers[-1])
    hidden: Tensor = model.norm(_last(last, before, behind, (near, far), Lengths(counts, length)))
    return hidden.squeeze(1)


def _layer(
    layer: Phi3Layer, before: Tensor, behind: Tensor, ropes: tuple[Rope, Rope], mask: Tensor
) -> tuple[Tensor, Tensor]:
    attention = layer.self_attn
    q, k, v = attention.heads_of(layer.input_layernorm(before), ropes[0])
    own_q, own_k, own_v = attention.heads_of(layer.input_layernorm(behind), ropes[1])
    keys, values = _joined(k, own_k), _joined(v, own_v)
    before = before + attention.mix(q, k, v, mask=None)
    behind = behind + attention.mix(own_q, keys, values, mask=mask)
    before = before + layer.mlp(layer.post_attention_layernorm(before))
    return before, behind + layer.mlp(layer.post_attention_layernorm(behind))


def _last(layer: Phi3Layer, before: Tensor, behind: Tensor, ropes: tuple[Rope, Rope], lengths: Lengths) -> Tensor:
    """Only the end tokens go on: ``(m, 1, h)``."""
    attention = layer.self_attn
    k, v = attention.keys_of(layer.input_layernorm(before), ropes[0])
    own_q, own_k, own_v = attention.heads_of(layer.input_layernorm(behind), ropes[1])
    keys, values = _joined(k, own_k), _joined(v, own_v)
    everything = Lengths(lengths.counts + before.shape[1], lengths.padded + before.shape[1])
    mixed = attention.mix(lengths.pick_last(own_q), keys, values, mask=everything.key_mask())
    end = lengths.pick_last(behind) + mixed
    out: Tensor = end + layer.mlp(layer.post_attention_layernorm(end))
    return out


def _joined(shared: Tensor, own: Tensor) -> Tensor:
    """``(t, heads, p, d)`` in front of each of ``(m, heads, s, d)``, each in front of ``m / t`` that follow another."""
    repeated = shared[:, None].expand(-1, len(own) // len(shared), -1, -1, -1).flatten(0, 1)
    return torch.cat((repeated, own), dim=2)
