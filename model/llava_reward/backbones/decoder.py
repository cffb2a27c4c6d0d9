"""What the language models of transformers have in common here: built without storage, run up to the end token.

Letters: b: sequences, l: their padded length, h: hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.backbones import layers
from model.llava_reward.backbones.layers import Layout, Rope
from model.llava_reward.backbones.rope import apply_rope

# Of the LLaMA-style layers in transformers; biases among them are never changed by LoRA.
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def build_config(path: Path, config_class: Any, values: Mapping[str, Any]) -> Any:
    """A configuration object of transformers from parsed JSON; ``ConfigError`` names ``path`` and what is wrong."""
    try:
        config = config_class.from_dict(dict(values))
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    text = config.text_config
    has_window = getattr(text, "sliding_window", None) is not None
    if has_window and "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        raise ConfigError(f"{path}: sliding_window={text.sliding_window} is not supported, only full attention")
    return config


def rebuild_rope(module: Any) -> None:
    """Give a module built under the device ``meta`` its rotary frequencies back.

    They are computed when the module is made and are in no file, so nothing would ever fill them.
    """
    name = "rotary_emb" if hasattr(module, "rotary_emb") else "rotary_pos_emb"
    with torch.device("cpu"):
        setattr(module, name, type(getattr(module, name))(module.config))


class Heads(nn.Module):
    """Attention of a LLaMA-style layer in the steps of ``layers.Attention``."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj: nn.Module = attention.q_proj
        self.k_proj: nn.Module = attention.k_proj
        self.v_proj: nn.Module = attention.v_proj
        self.o_proj: nn.Module = attention.o_proj
        self._head_dim: int = attention.head_dim

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self._head_dim).transpose(1, 2)

    def heads_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.query_of(hidden, rope), *self.keys_of(hidden, rope)

    def keys_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return apply_rope(self._heads(self.k_proj(hidden)), *rope), self._heads(self.v_proj(hidden))

    def query_of(self, hidden: Tensor, rope: Rope) -> Tensor:
        return apply_rope(self._heads(self.q_proj(hidden)), *rope)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.o_proj(layers.attend(q, k, v, mask))
        return out


class TakenApart(layers.Layer):
    """A decoder layer of transformers: its modules under their names, without its way to call them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = Heads(layer.self_attn)
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp


def take_apart(language_model: Any) -> None:
    """Put a ``TakenApart`` in the place of each layer."""
    language_model.layers = nn.ModuleList(TakenApart(layer) for layer in language_model.layers)


def end_hidden(language_model: Any, embedded: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """The end tokens' hidden states after the final norm, ``(b, l, h)`` to one row each; ``lm_head`` is never run.

    - position_ids: what the model's rotary positions take, ``(b, l)`` or for qwen ``(3, b, l)``
    """
    cosines, sines = language_model.rotary_emb(embedded, position_ids)
    rope = cosines[:, None], sines[:, None]
    return layers.end_hidden(language_model.layers, language_model.norm, embedded, rope, layout)
