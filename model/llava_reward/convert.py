"""A checkpoint bundle to the same bundle with one safetensors file per perspective (``adapter_file.py``).

Tensors are copied as they are stored, LoRA as A and B, so that rewards stay the same bit for bit in float32. Hashes of
checkpoints are over files, and so they change.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.checkpoint_store import file_sha256
from model.errors import ConfigError, InfrastructureError
from model.golden import GOLDEN_FILE
from model.llava_reward.adapter_file import (
    HEAD_CONFIG,
    LORA_CONFIG,
    SUFFIX,
    is_adapter_file,
    read_text,
    to_metadata,
)
from model.llava_reward.bundle import Bundle, adapter_weights, read_bundle
from model.llava_reward.checkpoint import read_tensors
from model.llava_reward.config import read_json
from model.llava_reward.processor import read_identity
from model.scorer import ScorerIdentity

_SCORER_FILE = "scorer.json"


@dataclass(frozen=True)
class Conversion:
    """Identities before and after: equal but for the hashes in ``checkpoints``."""

    before: ScorerIdentity
    after: ScorerIdentity


def convert(folder: Path, out: Path) -> Conversion:
    """Write the bundle in ``folder`` to ``out``, which must not exist or be empty.

    A backbone inside the bundle is copied; one elsewhere is named by its absolute path or its location.
    ``scorer.json`` is written last: with it the new bundle is whole. It holds the hashes of the new files.

    - raises: ``ConfigError`` if the bundle is not sound or ``out`` is taken
    """
    bundle = read_bundle(folder)
    before = read_identity(folder, dtype="float32")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; give a folder that does not exist")
    out.mkdir(parents=True, exist_ok=True)
    values = read_json(folder / _SCORER_FILE)
    values["backbone"], hashes = _place_backbone(bundle, values, out)
    for perspective, adapter in bundle.adapters.items():
        target = out / f"{perspective}{SUFFIX}"
        _write_adapter(adapter, target)
        values["adapters"][perspective] = target.name
        hashes[target.name] = file_sha256(target)
    _copy_golden(folder, out)
    values["hashes"] = hashes
    (out / _SCORER_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return Conversion(before, read_identity(out, dtype="float32"))


def _place_backbone(bundle: Bundle, values: dict[str, object], out: Path) -> tuple[str, dict[str, object]]:
    """The new entry, and those of the old hashes that speak of it."""
    entry = str(values["backbone"])
    given = {name: digest for name, digest in bundle.hashes.items() if name.startswith(f"{entry}/")}
    if bundle.backbone.resolve().is_relative_to(bundle.folder.resolve()):
        shutil.copytree(bundle.backbone, out / "backbone")
        new = "backbone"
    else:
        is_local = (bundle.folder / entry).is_dir()
        new = str(bundle.backbone.resolve()) if is_local else entry
    return new, {new + name.removeprefix(entry): digest for name, digest in given.items()}


def _write_adapter(adapter: Path, target: Path) -> None:
    if is_adapter_file(adapter):
        shutil.copyfile(adapter, target)
        return
    head, lora = (read_tensors(path) for path in adapter_weights(adapter))
    if repeated := sorted(set(head) & set(lora)):
        raise ConfigError(f"{adapter}: {repeated} are in both weight files")
    # A tensor may be a view into another's storage, which safetensors refuses.
    tensors = {name: tensor.contiguous().clone() for name, tensor in (head | lora).items()}
    texts = {name: read_text(adapter / name) for name in (HEAD_CONFIG, LORA_CONFIG)}
    save_file(tensors, target, metadata=to_metadata(texts))
    written = load_file(target)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
        raise InfrastructureError(f"{target} does not hold what was written to it; check the disk")


def _copy_golden(folder: Path, out: Path) -> None:
    if (folder / GOLDEN_FILE).exists():
        shutil.copyfile(folder / GOLDEN_FILE, out / GOLDEN_FILE)
    if (folder / "golden").is_dir():
        shutil.copytree(folder / "golden", out / "golden")
