"""The scorer interface, and ``load`` which finds the system behind a checkpoint folder.

Three steps, so that batching and overlap stay outside the model: ``preprocess`` (CPU: bytes and prompt to
uint8 pixels and token ids), ``forward`` (device), ``postprocess`` (CPU: raw values to records). Knows
nothing about Ray or HTTP; ``checkpoint_store.py`` brings what lies elsewhere.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from model import checkpoint_store
from model.checkpoint_sources import PINNED, is_location
from model.errors import ConfigError
from model.meaning import Head
from model.modes import EXACT, check_mode
from model.perspectives import Perspective
from model.schema import Generation, ImageInfo, RowError, ScoreRecord

if TYPE_CHECKING:
    import numpy as np

    from model.ranking import Ranking

# Checkpoints that ship with the code, by name.
SHIPPED = Path(__file__).parent / "checkpoints"
DTYPES = ("float32", "bfloat16")
# How several perspectives' LoRA adapters lie in memory: each merged into a language model of its own, kept low-rank
# beside a shared one, or whichever the free memory of the device allows when it loads.
ADAPTERS = ("auto", "merged", "low_rank")

# system in scorer.json -> package with the modules ``scorer`` and ``processor``
_SYSTEMS = {"llava_reward": "model.llava_reward"}


@dataclass(frozen=True)
class ScorerIdentity:
    """What decides a reward. Two scorers with equal identities give equal rewards (1e-5 in float32).

    How the weights lie in memory (``ADAPTERS``) is no part of it: it changes the order of rounding, as another batch
    or device does, and a job that only reads files cannot know what a replica found room for.

    ``checkpoints``: perspective -> ``id@sha256:hash`` over all weights which that reward depends on.
    ``preprocessing_hash``: over everything that decides pixels and tokens.
    """

    name: str
    checkpoints: Mapping[Perspective, str]
    preprocessing_hash: str
    dtype: str
    is_trained: bool
    licence: str
    vector_perspectives: tuple[Perspective, ...] = ()
    mode: str = EXACT


@dataclass(frozen=True)
class Prepared:
    """One generation after the CPU step: compact arrays (uint8 pixels, int32 ids), or the error of its row."""

    generation_id: str
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    image: ImageInfo | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class RawOutput:
    """One generation after the device step: values per perspective (one for BT, more for GPM), or its error."""

    generation_id: str
    values: Mapping[Perspective, tuple[float, ...]] = field(default_factory=dict)
    image: ImageInfo | None = None
    error: RowError | None = None


class Preprocessor(Protocol):
    """The CPU step alone: needs no weights and no torch, so data workers can run it."""

    preprocessing_hash: str

    def preprocess(self, generations: Iterable[Generation]) -> list[Prepared]:
        """One ``Prepared`` per generation, in order; a row that cannot be prepared carries its error."""
        ...


class Scorer(Preprocessor, Protocol):
    """A reward model behind three steps. ``placement``: how its weights lie in memory and why, in one line."""

    identity: ScorerIdentity
    placement: str
    perspectives: tuple[Perspective, ...]
    heads: Mapping[Perspective, Head]

    def forward(self, batch: Sequence[Prepared], perspectives: Sequence[Perspective] | None = None) -> list[RawOutput]:
        """One ``RawOutput`` per item, in order; items with an error pass through."""
        ...

    def postprocess(self, outputs: Sequence[RawOutput]) -> list[ScoreRecord]:
        """One record per output, in order."""
        ...

    def score(
        self, generations: Iterable[Generation], perspectives: Sequence[Perspective] | None = None
    ) -> list[ScoreRecord]:
        """``postprocess(forward(preprocess(generations)))``."""
        ...

    def rank(self, prompt: str, images: Sequence[bytes], perspective: Perspective) -> Ranking:
        """Encoded images of one prompt, best first, with probabilities; see ``model.ranking.rank_images``."""
        ...

    def check_golden(self) -> None:
        """Score the checkpoint's golden inputs; raises ``InfrastructureError`` if a reward is off."""
        ...


def load(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    mode: str = EXACT,
    adapters: str = "auto",
) -> Scorer:
    """Load a shipped checkpoint by name, or any checkpoint folder by path, ``s3://`` URI or pinned hub name.

    - device: a torch device such as ``cpu`` or ``cuda:0``; dtype: one of ``DTYPES``; mode: one of ``model.modes.MODES``
    - adapters: one of ``ADAPTERS``
    - raises: ``ConfigError`` in one line that names the value and the remedy; ``TransientError`` if S3 or the hub fails
    """
    if adapters not in ADAPTERS:
        raise ConfigError(f"adapters={adapters!r} is not known, expected one of {list(ADAPTERS)}")
    check_mode(mode, _checked_dtype(dtype), adapters)
    folder = resolve(name_or_path)
    system = _system(folder, "scorer")
    scorer: Scorer = system.load_scorer(folder, device=device, dtype=dtype, mode=mode, adapters=adapters)
    return scorer


def load_preprocessor(name_or_path: str | Path, *, mode: str = EXACT) -> Preprocessor:
    """The CPU step of a checkpoint alone: same arrays, same ``preprocessing_hash``, no weights and no torch."""
    folder = resolve(name_or_path)
    preprocessor: Preprocessor = _system(folder, "processor").load_preprocessor(folder, mode=mode)
    return preprocessor


def read_identity(name_or_path: str | Path, *, dtype: str = "float32", mode: str = EXACT) -> ScorerIdentity:
    """The identity that ``load`` would have. Hashes the weights' bytes; builds no tensor and needs no torch."""
    check_mode(mode, _checked_dtype(dtype))
    folder = resolve(name_or_path)
    identity: ScorerIdentity = _system(folder, "processor").read_identity(folder, dtype=dtype, mode=mode)
    return identity


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: a shipped name, a path that exists, or a location, which is downloaded first."""
    folder = Path(name_or_path)
    shipped = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []
    if str(name_or_path) in shipped:
        return SHIPPED / folder
    if str(name_or_path) and folder.is_dir():  # an empty name would be the current folder
        return folder.resolve()
    if is_location(str(name_or_path)):
        return checkpoint_store.fetch(str(name_or_path), checkpoint_store.BUNDLE)
    raise ConfigError(
        f"checkpoint {str(name_or_path)!r} is neither a folder nor one of {shipped}; "
        f"elsewhere are s3://bucket/folder and {PINNED}"
    )


def to_records(outputs: Sequence[RawOutput], vector_perspectives: Sequence[Perspective]) -> list[ScoreRecord]:
    """Outputs to records, in order: one value is a reward, a general-preference output stays a vector."""
    records = []
    for output in outputs:
        rewards = {p: v[0] for p, v in output.values.items() if p not in vector_perspectives}
        vectors = {p: v for p, v in output.values.items() if p in vector_perspectives}
        records.append(ScoreRecord(output.generation_id, rewards, vectors, output.image, output.error))
    return records


def system_of(name_or_path: str | Path) -> str:
    """Name of the system that a checkpoint belongs to, such as ``llava_reward``. Raises ``ConfigError``."""
    path = resolve(name_or_path) / "scorer.json"
    try:
        system = json.loads(path.read_text(encoding="utf-8"))["system"]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; a checkpoint folder must hold it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a JSON object with the key 'system': {error}") from error
    if not isinstance(system, str) or system not in _SYSTEMS:
        raise ConfigError(f"{path}: system={system!r} is unknown, expected one of {sorted(_SYSTEMS)}")
    return system


def _system(folder: Path, module: str) -> ModuleType:
    """The module that reads this folder, imported now: a caller of ``load_preprocessor`` must not pay for torch."""
    return importlib.import_module(f"{_SYSTEMS[system_of(folder)]}.{module}")


def _checked_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported, expected one of {list(DTYPES)}")
    return dtype
