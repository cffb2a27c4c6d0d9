"""The configuration files of a small phi3v, of any sizes, with the keys of the published one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.llava_reward.config import write_json
from model.llava_reward.tokenizer_training import END


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes of a small phi3v. ``tower_layers`` are those that run; crops and patches in pixels."""

    crop: int
    patch: int
    num_crops: int
    tower_width: int
    tower_mlp: int
    tower_layers: int
    tower_heads: int
    hidden: int
    mlp: int
    layers: int
    heads: int


def write_configs(folder: Path, sizes: NetworkSizes, tokenizer: Tokenizer, *, is_tied: bool) -> None:
    """``config.json``, ``clip_tower.json`` and ``tokenizer.json`` of a backbone, in ``folder``, which is created.

    - is_tied: whether the language-model head is the embedding itself; no reward reads it
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    clip = {
        "hidden_size": sizes.tower_width,
        "intermediate_size": sizes.tower_mlp,
        "num_hidden_layers": sizes.tower_layers + 1,  # the last published layer is never run
        "num_attention_heads": sizes.tower_heads,
        "image_size": sizes.crop,
        "patch_size": sizes.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    write_json(folder / "clip_tower.json", clip)
    vocabulary, end_id = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    write_json(folder / "config.json", _lm_config(sizes, vocabulary, end_id, is_tied=is_tied))


def _lm_config(sizes: NetworkSizes, vocabulary: int, end_id: int | None, *, is_tied: bool) -> dict[str, Any]:
    pairs = sizes.hidden // sizes.heads // 2
    return {
        "model_type": "phi3_v",
        "architectures": ["Phi3VForCausalLM"],
        "vocab_size": math.ceil(vocabulary / 64) * 64,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [round(1 + 0.02 * j, 4) for j in range(pairs)],
            "long_factor": [round(1 + 0.06 * j, 4) for j in range(pairs)],
        },
        "tie_word_embeddings": is_tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": end_id,
        "torch_dtype": "bfloat16",
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "name": "clip_vision_model",
            "image_dim_out": sizes.tower_width,
            "num_img_tokens": (sizes.crop // sizes.patch // 2) ** 2,
        },
    }
