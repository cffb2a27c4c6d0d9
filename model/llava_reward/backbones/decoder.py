"""What the language models of transformers have in common here: built without storage, run up to the end token.

Letters: b: samples, l: padded length, h: hidden size, n: image tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.errors import ConfigError

# Of the LLaMA-style layers in transformers; biases among them are never changed by LoRA.
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def build_config(path: Path, config_class: Any, values: Mapping[str, Any]) -> Any:
    """A configuration object of transformers from parsed JSON; ``ConfigError`` names ``path`` and what is wrong."""
    try:
        return config_class.from_dict(dict(values))
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def rebuild_rope(module: Any) -> None:
    """Give a module built under the device ``meta`` its rotary frequencies back.

    They are computed when the module is made and are in no file, so nothing would ever fill them.
    """
    name = "rotary_emb" if hasattr(module, "rotary_emb") else "rotary_pos_emb"
    with torch.device("cpu"):
        setattr(module, name, type(getattr(module, name))(module.config))


def pad_ids(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right, ``(b, l)``, and the index of each end token, ``(b,)``.

    Causal attention alone keeps real tokens from seeing padding on their right, so no mask is needed, and a
    sample's numbers do not depend on its neighbours.
    """
    last = torch.tensor([len(ids) - 1 for ids in samples], device=samples[0].device)
    return pad_sequence(list(samples), batch_first=True), last


def embed(embedding: nn.Module, input_ids: Tensor, image_tokens: Tensor) -> Tensor:
    """Look ids up, and put the projected image tokens, in order, where an id is negative.

    - input_ids: ``(b, l)`` int64; image_tokens: ``(number of negative ids, h)``
    - returns: ``(b, l, h)``
    """
    embedded: Tensor = embedding(input_ids.clamp(min=0))
    # Out of place, so that gradients reach both sides when this model is trained.
    slots = (input_ids < 0).unsqueeze(-1).expand_as(embedded)
    return embedded.masked_scatter(slots, image_tokens.to(embedded.dtype))


def end_hidden(language_model: Any, embedded: Tensor, last: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The end token's hidden state after the final norm, ``(b, l, h)`` to ``(b, h)``; ``lm_head`` is never run."""
    hidden: Tensor = language_model(
        inputs_embeds=embedded, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden[torch.arange(len(last), device=last.device), last]
