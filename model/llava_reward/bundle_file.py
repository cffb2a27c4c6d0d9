"""Writes ``scorer.json`` for a backbone and adapters as they are published, wherever they lie.

Copies and downloads nothing: what is local is read and hashed where it is, what lies elsewhere is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model.checkpoint_sources import PINNED, is_location
from model.checkpoint_store import ADAPTER, BACKBONE, names_in
from model.errors import ConfigError
from model.llava_reward.adapter_file import HEAD_CONFIG, HEAD_TENSORS, LORA_CONFIG, LORA_TENSORS, is_adapter_file
from model.llava_reward.bundle import SYSTEM, adapter_files, backbone_files, check_values, no_lora
from model.llava_reward.processor import read_identity
from model.scorer import ScorerIdentity

# Of Phi-3.5-vision as LLaVA-Reward was trained and published with it.
PUBLISHED_CROPS = 16

_LORA_FOLDER = "lora/"
_NAME = re.compile(r"[^@\s]+")


@dataclass(frozen=True)
class Parts:
    """What belongs together, in the terms of ``scorer.json``.

    - backbone, adapters (by perspective): local paths, ``s3://`` or pinned hub names
    - num_crops: phi3v only; None there is ``PUBLISHED_CROPS``
    - head_training: perspective to ``bt`` or ``cls``
    """

    backbone: str
    adapters: Mapping[str, str]
    name: str
    family: str = "phi3v"
    licence: str = "not known"
    num_crops: int | None = None
    head_training: Mapping[str, str] = field(default_factory=dict)


def write_bundle(out: Path, parts: Parts) -> ScorerIdentity | None:
    """Write ``out/scorer.json``; ``out`` is made if it does not exist.

    Local parts inside ``out`` are named relative to it, so that the folder can be moved; others by absolute paths.

    - returns: the identity of the new bundle; None where a part lies elsewhere, and so was listed but not read
    - raises: ``ConfigError`` if there is a ``scorer.json``, or a part is not what it should be, and then nothing is
      left behind; ``TransientError`` if S3 or the hub fails
    """
    path = out / "scorer.json"
    if path.exists():
        raise ConfigError(f"{path} is there already; give another folder")
    if not _NAME.fullmatch(parts.name):
        raise ConfigError(f"name={parts.name!r}: a name has no blank and no @, since policies write name@sha256:…")
    backbone, adapters = _entry(parts.backbone), {p: _entry(text) for p, text in parts.adapters.items()}
    values = _values(parts, _named(out, backbone), {p: _named(out, entry) for p, entry in adapters.items()})
    check_values(path, values)
    _check_backbone(backbone)
    for adapter in adapters.values():
        _check_adapter(adapter)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if any(isinstance(entry, str) for entry in (backbone, *adapters.values())):
        return None
    is_sound = False
    try:
        identity = read_identity(out, dtype="float32")
        is_sound = True
    finally:
        if not is_sound:
            path.unlink()
            for folder in made:
                folder.rmdir()
    return identity


def _values(parts: Parts, backbone: str, adapters: Mapping[str, str]) -> dict[str, object]:
    num_crops = PUBLISHED_CROPS if parts.num_crops is None and parts.family == "phi3v" else parts.num_crops
    values: dict[str, object] = {
        "system": SYSTEM,
        "family": parts.family,
        "name": parts.name,
        "licence": parts.licence,
        "is_trained": True,
        "backbone": backbone,
        "adapters": dict(adapters),
    }
    if num_crops is not None:
        values["num_crops"] = num_crops
    if parts.head_training:
        values["head_training"] = dict(parts.head_training)
    return values


def _named(out: Path, entry: Path | str) -> str:
    """How ``out/scorer.json`` names a part."""
    folder = out.resolve()
    if isinstance(entry, Path) and folder in entry.parents:
        return str(entry.relative_to(folder))
    return str(entry)


def _entry(text: str) -> Path | str:
    """An absolute path, or the location as it was given. Raises ``ConfigError`` for what is neither."""
    path = Path(text).expanduser()
    if path.is_dir() or is_adapter_file(path):
        return path.resolve()
    if is_location(text):
        return text
    raise ConfigError(f"{text!r} is no folder; elsewhere are s3://bucket/folder and {PINNED}")


def _check_backbone(entry: Path | str) -> None:
    if isinstance(entry, Path):
        backbone_files(entry)
        return
    names = names_in(entry, BACKBONE)
    _check_names(entry, names, ("config.json", "tokenizer.json"))
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{entry} holds no *.safetensors; a backbone has its weights in such files")


def _check_adapter(entry: Path | str) -> None:
    if isinstance(entry, Path):
        adapter_files(entry)
        return
    names = names_in(entry, ADAPTER)
    if not any(name.startswith(_LORA_FOLDER) for name in names):
        raise no_lora(entry)
    _check_names(entry, names, (HEAD_CONFIG, HEAD_TENSORS, LORA_CONFIG))
    if not names & {LORA_TENSORS, LORA_TENSORS.replace(".safetensors", ".bin")}:
        raise ConfigError(f"{entry} holds no {LORA_TENSORS} or .bin; the adapter folder must hold one of them")


def _check_names(entry: str, names: set[str], needed: tuple[str, ...]) -> None:
    if missing := sorted(set(needed) - names):
        raise ConfigError(f"{entry} holds no {', '.join(missing)}; the folder must hold it")
