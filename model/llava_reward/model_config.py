"""What preprocessing and checks need of a Qwen2.5-VL or LLaVA-1.6 ``config.json``. Needs no torch.

The rest of those files is read by transformers, when a network is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.llava_reward.config import ClipConfig, HeadConfig, read_json

FAMILIES = ("phi3v", "qwen", "llava")

# What SkipCA of a qwen checkpoint attends to. "released": nothing, which is what released weights mean (the released
# code looks for an id that no image token has); "image_tokens": the image, which was evidently meant.
QWEN_RELEASED_KEYS = "released"
QWEN_SKIP_CA_KEYS = (QWEN_RELEASED_KEYS, "image_tokens")

_MODEL_TYPES = {"qwen": "qwen2_5_vl", "llava": "llava_next"}
# Of the class in transformers that LLaVA-1.6 was published with, where its file leaves them out.
_LLAVA_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class QwenConfig:
    """``patch_size`` in pixels; ``merge_size``: patches per token along each side."""

    patch_size: int
    merge_size: int
    max_positions: int


@dataclass(frozen=True)
class LlavaConfig:
    """``clip.image_size`` is the tile side; ``pinpoints``: sizes that a picture may be laid on, (height, width)."""

    clip: ClipConfig
    pinpoints: tuple[tuple[int, int], ...]
    max_positions: int


def check_head(family: str, head: HeadConfig, adapter: Path) -> None:
    """Refuse a head that the family's released form does not have; raises ``ConfigError``."""
    if family == "llava" and head.has_skip_ca:
        raise ConfigError(
            f"{adapter}: add_cross_attention=true, but LLaVA has no SkipCA in the released form; "
            "use an adapter that was trained without it"
        )


def read_qwen_config(path: Path) -> QwenConfig:
    """The image part and the length limit of a Qwen2.5-VL ``config.json``."""
    values = _read(path, "qwen")
    try:
        vision = values["vision_config"]
        return QwenConfig(
            patch_size=int(vision.get("patch_size", 14)),
            merge_size=int(vision.get("spatial_merge_size", 2)),
            # Published files hold the language model's values flat, transformers 5 writes them apart.
            max_positions=int(values.get("text_config", values)["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error


def read_llava_config(path: Path) -> LlavaConfig:
    """The image part and the length limit of a LLaVA-1.6 ``config.json``; refuses what is not computed here."""
    values = _read(path, "llava")
    try:
        vision = {**_LLAVA_TOWER, **values["vision_config"]}
        config = LlavaConfig(
            clip=_clip_config(vision),
            pinpoints=tuple((int(h), int(w)) for h, w in values.get("image_grid_pinpoints") or _PINPOINTS),
            max_positions=int(values["text_config"].get("max_position_embeddings", 2048)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: missing or malformed value {error}") from error
    for name, found, supported in (
        ("vision_feature_layer", values.get("vision_feature_layer", -2), -2),
        ("vision_feature_select_strategy", values.get("vision_feature_select_strategy", "default"), "default"),
        ("vision_config.model_type", vision.get("model_type"), "clip_vision_model"),
        ("vision_config.hidden_act", vision["hidden_act"], "quick_gelu"),
    ):
        if found != supported:
            raise ConfigError(f"{path}: {name}={found!r} is not supported, only {supported!r}")
    side = config.clip.image_size
    if not config.pinpoints or any(h < side or w < side or h % side or w % side for h, w in config.pinpoints):
        raise ConfigError(f"{path}: image_grid_pinpoints={config.pinpoints} must be multiples of the tile side {side}")
    return config


def _clip_config(vision: Mapping[str, Any]) -> ClipConfig:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return ClipConfig(**{n: int(vision[n]) for n in sizes}, layer_norm_eps=float(vision["layer_norm_eps"]))


def _read(path: Path, family: str) -> dict[str, Any]:
    values = read_json(path)
    expected = _MODEL_TYPES[family]
    if values.get("model_type") != expected:
        raise ConfigError(
            f"{path}: model_type={values.get('model_type')!r}, but scorer.json says family={family!r}, "
            f"whose model_type is {expected!r}"
        )
    return values
