"""One perspective's adapter as one safetensors file, in place of the folder that the authors publish.

The file stands for that folder: ``alignment.safetensors/reward_config.yaml`` is a path inside it. The texts of
``reward_config.yaml`` and ``lora/adapter_config.json`` are in its metadata; its tensors carry their published names,
LoRA as A and B. Needs no torch; who reads tensors out of it brings it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from model.errors import ConfigError

SUFFIX = ".safetensors"
_KEY = "assay-adapter-1"  # of the metadata; another layout gets another number
HEAD_CONFIG = "reward_config.yaml"
LORA_CONFIG = "lora/adapter_config.json"
HEAD_TENSORS = "pytorch_model.bin"
LORA_TENSORS = "lora/adapter_model.safetensors"


def is_adapter_file(path: Path) -> bool:
    """True for an existing file of this kind, by its name; what is in it shows when it is read."""
    return path.suffix == SUFFIX and path.is_file()


def inside(path: Path) -> tuple[Path, str] | None:
    """The adapter file that ``path`` goes through, and the member that it names there; None for any other path."""
    for parent in path.parents:
        if is_adapter_file(parent):
            return parent, path.relative_to(parent).as_posix()
    return None


def read_text(path: Path) -> str:
    """Text of a file, or of a member of an adapter file. Raises ``OSError``; ``ConfigError`` for a damaged one."""
    place = inside(path)
    if place is None:
        return path.read_text(encoding="utf-8")
    file, member = place
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}") from error
    texts = json.loads(metadata.get(_KEY, "{}"))
    if member not in texts:
        raise ConfigError(f"{file} holds no {member}; make it with: assay convert CHECKPOINT OUT")
    return str(texts[member])


def to_metadata(texts: Mapping[str, str]) -> dict[str, str]:
    """Metadata that holds ``texts`` (member -> text). One entry: safetensors writes several in any order, and then
    two conversions of one checkpoint would have two hashes.
    """
    return {_KEY: json.dumps(dict(sorted(texts.items())))}


def member_of(key: str) -> str:
    """Which of the two weight files of a published folder a tensor belongs to."""
    return LORA_TENSORS if ".lora_A." in key or ".lora_B." in key else HEAD_TENSORS
