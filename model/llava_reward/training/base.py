"""What a perspective is trained on top of: a backbone, by itself or as part of a checkpoint bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint_sources import is_location
from model.checkpoint_store import BACKBONE, fetch
from model.errors import ConfigError
from model.images import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from model.llava_reward.bundle import MAX_PROMPT_TOKENS, Bundle, read_bundle
from model.llava_reward.config import read_json
from model.llava_reward.model_config import QWEN_RELEASED_KEYS
from model.scorer import resolve

_FAMILIES = {"phi3_v": "phi3v", "qwen2_5_vl": "qwen", "llava_next": "llava"}
_NUM_CROPS = 16  # of the published phi3v recipe
# The only form of qwen's SkipCA whose projections get a gradient; see ``QWEN_SKIP_CA_KEYS``.
_TRAINED_KEYS = "image_tokens"
_LIMITS = ("max_prompt_tokens", "max_image_bytes", "max_image_pixels")


@dataclass(frozen=True)
class Base:
    """- bundle: what preprocessing and loading need of a bundle; it has no adapter that matters
    - entry: the backbone as a ``scorer.json`` elsewhere names it; options: its other keys there
    """

    bundle: Bundle
    entry: str
    licence: str
    options: Mapping[str, Any]

    @property
    def family(self) -> str:
        return self.bundle.family

    @property
    def folder(self) -> Path:
        return self.bundle.backbone


def read_base(name_or_path: str, *, num_crops: int | None = None, licence: str = "not stated") -> Base:
    """A bundle by name, path, ``s3://`` or hub name; or a backbone folder, whose family its ``config.json`` says.

    - num_crops, licence: for a backbone folder; a bundle says its own
    - raises: ``ConfigError`` if it is neither
    """
    path = Path(name_or_path)
    is_backbone = path.is_dir() and not (path / "scorer.json").exists()
    if is_location(name_or_path) and not path.is_dir():
        folder = fetch(name_or_path, BACKBONE)
        is_backbone = not (folder / "scorer.json").exists()
        if is_backbone:
            return _of_backbone(folder, name_or_path, num_crops, licence)
    if is_backbone:
        return _of_backbone(path.resolve(), str(path.resolve()), num_crops, licence)
    if num_crops is not None:
        raise ConfigError(f"num_crops={num_crops}: scorer.json of {name_or_path} says it; leave it out")
    return _of_bundle(read_bundle(resolve(name_or_path)))


def _of_bundle(bundle: Bundle) -> Base:
    values = read_json(bundle.folder / "scorer.json")
    written = str(values["backbone"])
    is_local = (bundle.folder / written).is_dir()
    entry = str(bundle.backbone.resolve()) if is_local else written
    options = {key: values[key] for key in ("num_crops", *_LIMITS) if key in values}
    return Base(_for_training(bundle), entry, bundle.licence, options | _qwen_options(bundle.family))


def _of_backbone(folder: Path, entry: str, num_crops: int | None, licence: str) -> Base:
    model_type = read_json(folder / "config.json").get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(f"{folder}/config.json: model_type={model_type!r}, expected one of {sorted(_FAMILIES)}")
    crops = {"num_crops": num_crops or _NUM_CROPS} if family == "phi3v" else {}
    bundle = Bundle(
        folder=folder,
        family=family,
        name=folder.name,
        licence=licence,
        is_trained=False,
        backbone=folder,
        adapters={},
        num_crops=crops.get("num_crops", 1),
        skip_ca_keys=QWEN_RELEASED_KEYS if family == "qwen" else None,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_image_bytes=MAX_IMAGE_BYTES,
        max_image_pixels=MAX_IMAGE_PIXELS,
        head_training={},
        hashes={},
        places={},
    )
    return Base(_for_training(bundle), entry, licence, crops | _qwen_options(family))


def _qwen_options(family: str) -> dict[str, Any]:
    return {"qwen_skipca_keys": _TRAINED_KEYS} if family == "qwen" else {}


def _for_training(bundle: Bundle) -> Bundle:
    return replace(bundle, skip_ca_keys=_TRAINED_KEYS) if bundle.family == "qwen" else bundle
