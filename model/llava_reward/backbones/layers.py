"""Decoder layers run for a reward: every token through all but the last, whose only readers are the end tokens.

Knows no family: a layer is norms, an MLP, and attention that can be taken apart.

Letters: b: sequences, l: their length, d: head dimension, h: hidden size, m: end tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]  # cosines and sines, (b, 1, l, d)
S = TypeVar("S", bound="Sight")


class Attention(Protocol):
    """Self-attention in its steps. Hidden states are ``(b, l, h)``, queries, keys and values ``(b, heads, l, d)``."""

    def heads_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, positions applied."""
        ...

    def keys_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values alone."""
        ...

    def query_of(self, hidden: Tensor, rope: Rope) -> Tensor:
        """Queries alone."""
        ...

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention and its output projection, ``(b, l, h)``; causal where no mask is given."""
        ...


class Sight(Protocol):
    """Which token sees which."""

    def mix(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all tokens: ``(b, l, h)``."""
        ...


class Layout(Sight, Protocol):
    """Which token sees which, and where the end tokens are."""

    def pick_last(self, values: Tensor) -> Tensor:
        """The rows of the end tokens: ``(b, ..., l, d)`` to ``(b, ..., m, d)``."""
        ...

    def key_mask(self) -> Tensor:
        """Bool, true where an end token sees a token; broadcasts to ``(b, heads, m, l)``."""
        ...

    def stacked(self, times: int) -> Layout:
        """Of ``times * b`` sequences, where this one is of ``b``: the same ``times`` over."""
        ...


class Layer(nn.Module):
    """A pre-norm decoder layer, its parts named as in the published files."""

    input_layernorm: nn.Module
    self_attn: Attention
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, step: Step[S], hidden: Tensor, rope: Rope, layout: S) -> Tensor:
        """One of the steps below, as a call of the module.

        Training hangs on to calls: to gather a layer's weights from several workers, or to compute it twice.
        """
        return step(self, hidden, rope, layout)


Step = Callable[[Layer, Tensor, Rope, S], Tensor]


def embed(embedding: nn.Module, input_ids: Tensor, image_tokens: Tensor) -> Tensor:
    """Look ids up, and put the projected image tokens, in order, where an id is negative.

    - input_ids: ``(b, l)`` int64; image_tokens: ``(number of negative ids, h)``
    - returns: ``(b, l, h)``
    """
    embedded: Tensor = embedding(input_ids.clamp(min=0))
    # Out of place, so that gradients reach both sides when this model is trained.
    slots = (input_ids < 0).unsqueeze(-1).expand_as(embedded)
    return embedded.masked_scatter(slots, image_tokens.to(embedded.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, heads joined again: ``(b, l, h)``; causal where no mask is given.

    Keys and values may have fewer heads, each for as many queries.
    """
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return mixed.transpose(1, 2).flatten(2)


def every_token(layer: Layer, hidden: Tensor, rope: Rope, layout: Sight) -> Tensor:
    """``(b, l, h)`` to ``(b, l, h)``."""
    q, k, v = layer.self_attn.heads_of(layer.input_layernorm(hidden), rope)
    hidden = hidden + layout.mix(layer.self_attn, q, k, v)
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def end_tokens(layer: Layer, hidden: Tensor, rope: Rope, layout: Layout) -> Tensor:
    """Only the end tokens ask, every token answers: ``(b, l, h)`` to ``(b, m, h)``."""
    normed = layer.input_layernorm(hidden)
    q = layer.self_attn.query_of(layout.pick_last(normed), (layout.pick_last(rope[0]), layout.pick_last(rope[1])))
    k, v = layer.self_attn.keys_of(normed, rope)
    end = layout.pick_last(hidden) + layer.self_attn.mix(q, k, v, mask=layout.key_mask())
    out: Tensor = end + layer.mlp(layer.post_attention_layernorm(end))
    return out


def end_hidden(layers: Sequence[Layer], norm: nn.Module, embedded: Tensor, rope: Rope, layout: Layout) -> Tensor:
    """Hidden states of all end tokens after the final norm: ``(b, l, h)`` to ``(b * m, h)``."""
    for layer in layers[:-1]:
        embedded = layer(every_token, embedded, rope, layout)
    hidden: Tensor = norm(layers[-1](end_tokens, embedded, rope, layout))
    return hidden.flatten(0, 1)
