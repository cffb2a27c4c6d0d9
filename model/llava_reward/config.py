"""Reads the configuration files of a checkpoint into small frozen dataclasses. Needs no torch.

Formats: ``config.json`` of Phi-3.5-vision, ``clip_tower.json`` beside it (absent for the real model),
``reward_config.yaml`` and ``lora/adapter_config.json`` of an adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model.errors import ConfigError
from model.llava_reward.adapter_file import read_text

# CLIP ViT-L/14-336, which Phi-3.5-vision names in its config without its sizes.
_VIT_L_14_336: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the image tower. ``image_size`` is the crop side in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def merged_per_side(self) -> int:
        """Tokens per crop side after the 2x2 merge: 12 for 336-pixel crops."""
        return self.patches_per_side // 2

    @property
    def feature_layers(self) -> int:
        """Layers that are run: the feature is the output of the last but one."""
        return self.num_hidden_layers - 1


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position settings. Factors are empty where the config has no ``rope_scaling``."""

    theta: float
    head_dim: int
    original_max_positions: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_scale: float


@dataclass(frozen=True)
class Phi3VConfig:
    """Sizes of the language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class HeadConfig:
    """How the end token's hidden state becomes a reward. ``tau`` is the temperature of preferences."""

    has_skip_ca: bool
    is_general_preference: bool
    value_head_dim: int
    tau: float


@dataclass(frozen=True)
class LoraConfig:
    """``W += scale * B @ A`` on the projections named in ``targets``, in every layer."""

    rank: int
    scale: float
    targets: tuple[str, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ``ConfigError`` names the file and what is wrong with it."""
    try:
        value = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; the checkpoint folder must hold it") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A configuration file as everything here writes it."""
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_phi3v_config(path: Path) -> Phi3VConfig:
    """The language model's part of a Phi-3.5-vision ``config.json``."""
    values = read_json(path)
    try:
        hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        config = Phi3VConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_hidden_layers=int(values["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(values.get("num_key_value_heads") or heads),
            rms_norm_eps=float(values["rms_norm_eps"]),
            max_position_embeddings=int(values["max_position_embeddings"]),
            rope=_rope_config(values, hidden // heads),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error
    _check_image_part(path, values)
    return config


def _check_image_part(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse variants of the image embedding that this port does not compute."""
    image, processor = values.get("embd_layer") or {}, values.get("img_processor") or {}
    for name, found, supported in (
        ("hd_transform_order", image.get("hd_transform_order", "sub_glb"), "sub_glb"),
        ("layer_idx", processor.get("layer_idx", -2), -2),
        ("type_feature", processor.get("type_feature", "patch"), "patch"),
    ):
        if found != supported:
            raise ConfigError(f"{path}: {name}={found!r} is not supported, only {supported!r}")


def _rope_config(values: Mapping[str, Any], head_dim: int) -> RopeConfig:
    longest = int(values["max_position_embeddings"])
    original = int(values.get("original_max_position_embeddings") or longest)
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("type", "su")
    if kind not in ("su", "longrope"):
        raise ValueError(f"rope_scaling.type={kind!r}, expected 'su' or 'longrope'")
    factors = [tuple(map(float, scaling.get(name, ()))) for name in ("short_factor", "long_factor")]
    if scaling and {len(f) for f in factors} != {head_dim // 2}:
        raise ValueError(f"rope factors of lengths {[len(f) for f in factors]}, expected {head_dim // 2}")
    # Phi-3 "su" scaling: sqrt(1 + ln(max/original) / ln(original)), for short sequences too.
    is_scaled = scaling and longest > original
    scale = math.sqrt(1 + math.log(longest / original) / math.log(original)) if is_scaled else 1.0
    return RopeConfig(float(values.get("rope_theta", 10000.0)), head_dim, original, factors[0], factors[1], scale)


def read_clip_config(path: Path) -> ClipConfig:
    """``clip_tower.json``, or CLIP ViT-L/14-336 where the file is absent."""
    values = read_json(path) if path.exists() else _VIT_L_14_336
    try:
        if values.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(f"hidden_act={values['hidden_act']!r}, expected 'quick_gelu'")
        config = ClipConfig(
            **{name: int(values[name]) for name in _VIT_L_14_336 if name not in ("hidden_act", "layer_norm_eps")},
            layer_norm_eps=float(values.get("layer_norm_eps", 1e-5)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error
    if config.image_size % (2 * config.patch_size):
        raise ConfigError(f"{path}: image_size={config.image_size} must be a multiple of two patches")
    return config


def read_head_config(path: Path) -> HeadConfig:
    """``reward_config.yaml`` of an adapter."""
    try:
        values = yaml.safe_load(read_text(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; every adapter folder must hold it") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        config = HeadConfig(
            has_skip_ca=bool(values["add_cross_attention"]),
            is_general_preference=bool(values["is_general_preference"]),
            value_head_dim=int(values["value_head_dim"]),
            tau=float(values["general_preference_tau"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error
    if not config.is_general_preference:  # the head of a Bradley-Terry checkpoint has one row, whatever is written
        return HeadConfig(config.has_skip_ca, False, 1, config.tau)
    return config


def read_lora_config(path: Path) -> LoraConfig:
    """``adapter_config.json`` as PEFT writes it."""
    values = read_json(path)
    try:
        rank, alpha, targets = int(values["r"]), float(values["lora_alpha"]), values["target_modules"]
        if not isinstance(targets, list):
            raise TypeError(f"target_modules={targets!r}, expected a list of names")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error
    unsupported = [name for name in ("use_dora", "rank_pattern", "alpha_pattern") if values.get(name)]
    if unsupported:
        raise ConfigError(f"{path}: {', '.join(unsupported)} is not supported, plain LoRA only")
    scale = alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank
    return LoraConfig(rank, scale, tuple(sorted(map(str, targets))))
