"""The configuration of a backbone's pretraining: YAML to frozen dataclasses, unknown and missing keys refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from model.errors import ConfigError
from model.llava_reward.small_phi3v import NetworkSizes

T = TypeVar("T")


@dataclass(frozen=True)
class Scenes:
    """What training draws. Shares are in [0, 1].

    - sizes: width and height in pixels, one of them for each scene
    - prompt_share: scenes that come with their prompt; ``mismatch_share`` of these contradict it
    - artefact_share, sign_share: scenes with an artefact; with a prohibited sign
    - more_prompts: of a scene besides its own, about half of them contradicting it
    - questions: on how many kinds of things a scene is asked, those that it shows among them; 0 for none
    """

    sizes: tuple[tuple[int, int], ...]
    prompt_share: float
    mismatch_share: float
    artefact_share: float
    sign_share: float
    more_prompts: int
    questions: int


@dataclass(frozen=True)
class Stage:
    """How the weights move in one stage.

    - batch, micro_batch: samples a step, and samples a forward pass
    - steps: of the whole stage: linear warm-up, then a cosine to ``last_rate`` times ``rate``; 0 leaves the stage out
    """

    batch: int
    micro_batch: int
    steps: int
    warmup: int
    rate: float
    last_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class TowerStage(Stage):
    """The image tower alone learns what each cell of the global view and of ``fine_crops`` crops a scene shows."""

    fine_crops: int


@dataclass(frozen=True)
class CaptionStage(Stage):
    """All but the tower learns to caption.

    A token of the caption weighs 1. match_weight: of a word on whether the prompt is right, at least 1: all others are
    read off the image, these alone off both. prompt_weight: of a token of a true prompt, below 1. word_weight: of
    saying at a word of a prompt whether the image contradicts it yet, against the mean of all tokens.
    """

    prompt_weight: float
    match_weight: float
    word_weight: float


@dataclass(frozen=True)
class Reporting:
    """``save_seconds`` between resumable states; ``validate_steps`` between validations on so many ``scenes``."""

    log_steps: int
    save_seconds: float
    validate_steps: int
    scenes: int


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run: first ``tower``, then ``captions``. is_mixed: multiply in bfloat16, with float32 weights."""

    seed: int
    is_mixed: bool
    network: NetworkSizes
    scenes: Scenes
    tower: TowerStage
    captions: CaptionStage
    reporting: Reporting

    def must_stay(self) -> dict[str, Any]:
        """What a resumed run has to share with the one it resumes."""
        values = asdict(self)
        return {name: values[name] for name in ("seed", "network", "scenes")}


def read_pretrain_config(path: Path) -> PretrainConfig:
    """Raises ``ConfigError`` naming the file and the key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(path, "", values, {field.name for field in fields(PretrainConfig)})
    scenes = _part(path, "scenes", Scenes, values["scenes"])
    config = PretrainConfig(
        _whole(path, "seed", values["seed"]),
        _truth(path, "is_mixed", values["is_mixed"]),
        _part(path, "network", NetworkSizes, values["network"]),
        Scenes(**{**vars(scenes), "sizes": _sizes(path, values["scenes"]["sizes"])}),
        _part(path, "tower", TowerStage, values["tower"]),
        _part(path, "captions", CaptionStage, values["captions"]),
        _part(path, "reporting", Reporting, values["reporting"]),
    )
    for name, stage in (("tower", config.tower), ("captions", config.captions)):
        if not stage.micro_batch or stage.batch % stage.micro_batch:
            raise ConfigError(f"{path}: {name}.batch={stage.batch} is no multiple of {name}.micro_batch")
    return config


def _check_keys(path: Path, where: str, values: object, known: set[str]) -> None:
    if not isinstance(values, dict) or set(values) != known:
        found = sorted(map(str, values)) if isinstance(values, dict) else values
        raise ConfigError(f"{path}: {where or 'the file'} holds {found}, expected {sorted(known)}")


def _part(path: Path, name: str, part: type[T], values: Any) -> T:
    types = {field.name: field.type for field in fields(part)}  # type: ignore[arg-type]
    _check_keys(path, name, values, set(types))
    read = {"int": _whole, "float": _number}
    return part(
        **{
            key: read[str(types[key])](path, f"{name}.{key}", value) if str(types[key]) in read else value
            for key, value in values.items()
        }
    )


def _whole(path: Path, key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{path}: {key}={value!r} is no whole number from 0")
    return value


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{path}: {key}={value!r} is no number from 0 (YAML reads 1e-3 as text, 1.0e-3 as a number)")
    return float(value)


def _truth(path: Path, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key}={value!r} is neither true nor false")
    return value


def _sizes(path: Path, value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: scenes.sizes={value!r} is no list of [width, height]")
    for size in value:
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and n >= 64 for n in size):
            raise ConfigError(f"{path}: scenes.sizes holds {size!r}, expected [width, height] from 64 pixels")
    return tuple((width, height) for width, height in value)
