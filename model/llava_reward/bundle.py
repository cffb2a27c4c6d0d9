"""A checkpoint bundle on disk: ``scorer.json``, a backbone folder and one adapter folder per perspective.

Finds and hashes the files; reads no weights and needs no torch.

    <bundle>/scorer.json     what belongs together; relative or absolute paths, s3://, or pinned hub names
    <bundle>/backbone/       config.json, clip_tower.json (phi3v, optional), tokenizer.json, *.safetensors
    <bundle>/<adapter>/      reward_config.yaml, pytorch_model.bin, lora/ (as the authors publish it), or instead
    <bundle>/<adapter>.safetensors    all of that in one file (adapter_file.py)
    <bundle>/golden.json     optional: inputs with known rewards
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint_sources import is_location
from model.checkpoint_store import ADAPTER, BACKBONE, check_hashes, fetch, file_sha256
from model.errors import ConfigError
from model.images import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from model.llava_reward.adapter_file import HEAD_CONFIG, HEAD_TENSORS, LORA_CONFIG, LORA_TENSORS, is_adapter_file
from model.llava_reward.config import HeadConfig, read_head_config, read_json
from model.llava_reward.model_config import FAMILIES, QWEN_RELEASED_KEYS, QWEN_SKIP_CA_KEYS, check_head
from model.meaning import Head, HeadTraining
from model.modes import EXACT, crops_of
from model.perspectives import Perspective
from model.scorer import ScorerIdentity

SYSTEM = "llava_reward"

# The longest prompts that people log are some hundred tokens; beyond this a text is an accident, and its
# attention would cost more than the image's.
MAX_PROMPT_TOKENS = 4096

_REQUIRED = {
    "system": str,
    "family": str,
    "name": str,
    "licence": str,
    "is_trained": bool,
    "backbone": str,
    "adapters": dict,
}
_OPTIONAL = {
    "hashes": dict,
    "head_training": dict,
    "max_prompt_tokens": int,
    "max_image_bytes": int,
    "max_image_pixels": int,
    "notes": str,
}
# Keys that have a meaning for one family only.
_REQUIRED_OF = {"phi3v": {"num_crops": int}}
_OPTIONAL_OF = {"qwen": {"qwen_skipca_keys": str}}


@dataclass(frozen=True)
class Bundle:
    """One ``scorer.json``, checked, with its paths resolved.

    - num_crops: phi3v only, 1 otherwise, fewer than written in mode few_crops; skip_ca_keys: qwen only, None otherwise
    """

    folder: Path
    family: str
    name: str
    licence: str
    is_trained: bool
    backbone: Path
    adapters: Mapping[Perspective, Path]
    num_crops: int
    skip_ca_keys: str | None
    max_prompt_tokens: int
    max_image_bytes: int
    max_image_pixels: int
    head_training: Mapping[Perspective, HeadTraining]
    hashes: Mapping[str, object]  # as written; checked with the identity, which reads every byte anyway
    places: Mapping[str, Path]  # each entry of scorer.json as written -> where it lies

    @property
    def perspectives(self) -> tuple[Perspective, ...]:
        return tuple(p for p in Perspective if p in self.adapters)


def read_bundle(folder: Path, *, mode: str = EXACT) -> Bundle:
    """Read and check ``folder/scorer.json``; raises ``ConfigError`` naming the file, the key and the remedy.

    - mode: one of ``model.modes.MODES``; ``ConfigError`` if this checkpoint cannot have it
    """
    path = folder / "scorer.json"
    values = read_json(path)
    check_values(path, values)
    family = values["family"]
    backbone = _located(path, values["backbone"], BACKBONE)
    adapters = {Perspective(key): _located(path, value, ADAPTER) for key, value in values["adapters"].items()}
    return Bundle(
        folder=folder,
        family=family,
        name=values["name"],
        licence=values["licence"],
        is_trained=values["is_trained"],
        backbone=backbone,
        adapters=adapters,
        num_crops=crops_of(mode, family, values.get("num_crops", 1)),
        skip_ca_keys=values.get("qwen_skipca_keys", QWEN_RELEASED_KEYS) if family == "qwen" else None,
        max_prompt_tokens=values.get("max_prompt_tokens", MAX_PROMPT_TOKENS),
        max_image_bytes=values.get("max_image_bytes", MAX_IMAGE_BYTES),
        max_image_pixels=values.get("max_image_pixels", MAX_IMAGE_PIXELS),
        head_training=_head_training(path, values),
        hashes=values.get("hashes", {}),
        places={values["backbone"]: backbone, **{values["adapters"][p]: adapters[p] for p in adapters}},
    )


def check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Everything about the content of ``scorer.json`` that shows without the files which it names.

    - path: the file, for messages; need not exist
    - raises: ``ConfigError`` naming it, the key and the remedy
    """
    _check_system(path, values)
    _check_keys(path, values)
    _check_family_values(path, values)
    unknown = sorted(set(values["adapters"]) - set(Perspective))
    if unknown or not values["adapters"]:
        raise ConfigError(f"{path}: adapters names {unknown}, expected some of {[p.value for p in Perspective]}")
    _head_training(path, values)


def _check_system(path: Path, values: Mapping[str, Any]) -> None:
    """First of all: which keys are known depends on the family."""
    system, family = values.get("system"), values.get("family")
    if system != SYSTEM or family not in FAMILIES:
        raise ConfigError(f"{path}: system={system!r} family={family!r} is not {SYSTEM} with one of {list(FAMILIES)}")


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    family = values["family"]
    required = {**_REQUIRED, **_REQUIRED_OF.get(family, {})}
    known = {**required, **_OPTIONAL, **_OPTIONAL_OF.get(family, {})}
    missing, surplus = sorted(set(required) - set(values)), sorted(set(values) - set(known))
    if missing or surplus:
        raise ConfigError(f"{path}: family={family!r}: missing keys {missing}, unknown keys {surplus}")
    # bool is an int for isinstance, hence the comparison of types.
    wrong = [
        f"{key}={value!r} (expected {known[key].__name__})"
        for key, value in values.items()
        if type(value) is not known[key]
    ]
    if wrong:
        raise ConfigError(f"{path}: {', '.join(wrong)}")


def _check_family_values(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("num_crops", 1) < 1:
        raise ConfigError(f"{path}: num_crops={values['num_crops']} must be at least 1")
    keys = values.get("qwen_skipca_keys", QWEN_RELEASED_KEYS)
    if keys not in QWEN_SKIP_CA_KEYS:
        raise ConfigError(f"{path}: qwen_skipca_keys={keys!r}, expected one of {list(QWEN_SKIP_CA_KEYS)}")


def _head_training(path: Path, values: Mapping[str, Any]) -> dict[Perspective, HeadTraining]:
    """``head_training``: perspective -> ``bt`` or ``cls``; no file that the authors publish says it."""
    given = values.get("head_training", {})
    allowed = [training.value for training in HeadTraining]
    if not set(given) <= set(values["adapters"]) or any(training not in allowed for training in given.values()):
        raise ConfigError(f"{path}: head_training={given!r} must give {allowed} for perspectives in adapters")
    return {Perspective(name): HeadTraining(training) for name, training in given.items()}


def _located(path: Path, entry: str, patterns: Sequence[str]) -> Path:
    """The folder (or adapter file) of one entry; one that lies elsewhere is downloaded."""
    folder = path.parent / entry
    if is_location(entry) and not folder.is_dir():
        return fetch(entry, patterns)
    if not folder.is_dir() and not (patterns is ADAPTER and is_adapter_file(folder)):
        raise ConfigError(f"{path} names the folder {folder}, which does not exist")
    return folder


def backbone_weights(backbone: Path) -> list[Path]:
    """The safetensors files of a backbone: ``model.safetensors``, or the shards that the index names."""
    index = backbone / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map", {})
        files = sorted({backbone / name for name in weight_map.values()})
    else:
        files = [backbone / "model.safetensors"]
    return [_existing_file(path) for path in files]


def adapter_weights(adapter: Path) -> tuple[Path, Path]:
    """The head's ``pytorch_model.bin``, and the LoRA file (``.safetensors`` or ``.bin``); paths in an adapter file."""
    if is_adapter_file(adapter):
        return adapter / HEAD_TENSORS, adapter / LORA_TENSORS
    lora = adapter / "lora" / "adapter_model.safetensors"
    if not lora.exists():
        lora = adapter / "lora" / "adapter_model.bin"
    return _existing_file(adapter / "pytorch_model.bin"), _existing_file(lora)


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; the checkpoint folder must hold it")
    return path


def read_identity(folder: Path, *, dtype: str, mode: str, preprocessing_hash: str) -> ScorerIdentity:
    """Hash the files that decide each perspective's reward. Reads every byte of them, builds no tensor.

    Raises ``ConfigError`` if a file is not the one that ``hashes`` in ``scorer.json`` says.
    """
    bundle = read_bundle(folder)
    check_hashes(folder / "scorer.json", bundle.hashes, bundle.places)
    backbone_lines = _hash_lines("backbone", bundle.backbone, backbone_files(bundle.backbone))
    checkpoints, vectors = {}, []
    for perspective in bundle.perspectives:
        adapter = bundle.adapters[perspective]
        files = adapter_files(adapter)
        head = read_head_config(adapter / HEAD_CONFIG)
        check_head(bundle.family, head, adapter)
        lines = backbone_lines + _hash_lines("adapter", adapter, files) + _option_lines(bundle, head)
        checkpoints[perspective] = f"{bundle.name}@sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
        if head.is_general_preference:
            vectors.append(perspective)
    return ScorerIdentity(
        name=bundle.name,
        checkpoints=checkpoints,
        preprocessing_hash=preprocessing_hash,
        dtype=dtype,
        is_trained=bundle.is_trained,
        licence=bundle.licence,
        vector_perspectives=tuple(vectors),
        mode=mode,
    )


def backbone_files(backbone: Path) -> list[Path]:
    """The files that decide a reward. Raises ``ConfigError`` for one that is missing."""
    files = [_existing_file(backbone / "config.json"), *backbone_weights(backbone)]
    tower = backbone / "clip_tower.json"
    return [*files, tower] if tower.exists() else files


def adapter_files(adapter: Path) -> list[Path]:
    """The files that decide a reward. Raises ``ConfigError`` for one that is missing."""
    if is_adapter_file(adapter):
        return [adapter]
    if not (adapter / "lora").is_dir():
        raise no_lora(adapter)
    return [*(_existing_file(adapter / name) for name in (HEAD_CONFIG, LORA_CONFIG)), *adapter_weights(adapter)]


def no_lora(adapter: Path | str) -> ConfigError:
    """What is wrong with an adapter folder that has no ``lora/``: such as one with all weights of a full fine-tune."""
    return ConfigError(
        f"{adapter} has no folder lora/: it is incomplete, or a full fine-tune, which is not supported; "
        "use an adapter that was published with LoRA"
    )


def read_heads(bundle: Bundle, identity: ScorerIdentity) -> dict[Perspective, Head]:
    """What each perspective's reward means. Raises ``ConfigError`` if a general-preference head claims a training."""
    heads = {}
    for perspective in bundle.perspectives:
        config = read_head_config(bundle.adapters[perspective] / "reward_config.yaml")
        training = bundle.head_training.get(perspective)
        if config.is_general_preference and training is not None:
            raise ConfigError(
                f"{bundle.folder}: head_training of {perspective}: its head gives no scalar; leave it out"
            )
        checkpoint = identity.checkpoints[perspective]
        heads[perspective] = Head(perspective, checkpoint, config.tau, config.is_general_preference, training)
    return heads


def _option_lines(bundle: Bundle, head: HeadConfig) -> list[str]:
    """What decides this perspective's reward beside its files: one set of weights has two meanings in qwen's SkipCA."""
    if bundle.skip_ca_keys is None or not head.has_skip_ca:
        return []
    return [f"option/qwen_skipca_keys {bundle.skip_ca_keys}\n"]


def _hash_lines(role: str, root: Path, files: Iterable[Path]) -> list[str]:
    return [f"{role}/{path.relative_to(root).as_posix()} {file_sha256(path)}\n" for path in sorted(files)]
