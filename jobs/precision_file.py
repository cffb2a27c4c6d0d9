"""``precision.json`` of a checkpoint folder: how far each mode's rewards are from the exact ones, as measured.

Knows what was measured and says it in words; ``precision.py`` measures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from model.checkpoint_store import PRECISION_FILE
from model.errors import ConfigError
from model.modes import EXACT
from model.perspectives import Perspective
from model.scorer import ScorerIdentity

# Fewer inputs than these say little about rare verdicts, and are called few wherever they are shown.
ENOUGH = {"real images": 200, "scenes": 1000}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Difference(_Strict):
    """One perspective's rewards against the exact ones, absolute, in reward units.

    ``spearman``: rank correlation, -1 to 1; None for general-preference vectors, and where all rewards are equal.
    """

    spearman: float | None
    largest: float
    mean: float


class Comparison(_Strict):
    """One set of inputs.

    - rows: with a reward both exactly and in the mode; ``perspectives`` is over these, and empty without any
    - lost: with an exact reward and none in the mode
    - not_scored: without an exact reward; left out
    - changed: verdicts, over rows and lost, as ``allow->review`` to how many; ``none`` is no verdict
    """

    rows: int
    lost: int
    not_scored: int
    perspectives: dict[Perspective, Difference]
    changed: dict[str, int]


class Measured(_Strict):
    """What ``assay precision`` found for one checkpoint in one mode and dtype. ``sets``: by the names of ``ENOUGH``."""

    date: date
    dtype: str
    device: str
    checkpoints: dict[Perspective, str]
    preprocessing_hash: str
    is_trained: bool
    policy_id: str
    policy_hash: str
    code_version: str
    sets: dict[str, Comparison]


class Precision(_Strict):
    """How a night was scored. ``measured``: None where that was not measured for this checkpoint."""

    dtype: str
    mode: str
    measured: Measured | None = None


# Mode -> dtype -> what was measured.
_Entries = dict[str, dict[str, Measured]]
_File = TypeAdapter(_Entries)


def read(folder: Path) -> _Entries:
    """Mode -> dtype -> what was measured; empty without a file. Raises ``ConfigError`` for a malformed one."""
    path = folder / PRECISION_FILE
    try:
        return _File.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{path} cannot be used: {place}: {fault['msg']}; remove it and measure again") from error


def check_writable(folder: Path) -> None:
    """Raises ``ConfigError`` where ``write`` would fail: known before hours of work."""
    read(folder)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to; measure a copy of the checkpoint")


def write(folder: Path, mode: str, measured: Measured) -> Path:
    """Puts one measurement in place of an older one of the same mode and dtype; returns the file."""
    path = folder / PRECISION_FILE
    entries = read(folder)
    entries[mode] = {**entries.get(mode, {}), measured.dtype: measured}
    content = _File.dump_json(entries, indent=1)
    path.write_bytes(content + b"\n")
    return path


def precision_of(folder: Path, identity: ScorerIdentity) -> Precision:
    """How a scorer scores, and what was measured of that for exactly these weights, preprocessing, dtype and mode."""
    found = None if identity.mode == EXACT else read(folder).get(identity.mode, {}).get(identity.dtype)
    wanted = (dict(identity.checkpoints), identity.preprocessing_hash, identity.dtype)
    if found and (found.checkpoints, found.preprocessing_hash, found.dtype) != wanted:
        found = None
    return Precision(dtype=identity.dtype, mode=identity.mode, measured=found)


def describe(precision: Precision | None) -> list[str]:
    """Lines for a report of a run; none where rewards are exact, or the night is from before there were modes."""
    if precision is None or precision.mode == EXACT:
        return []
    title = f"mode {precision.mode} in {precision.dtype}"
    if precision.measured is None:
        return [f"{title}: these rewards are not exact, and how far off was not measured for this checkpoint"]
    measured = precision.measured
    note = "" if measured.is_trained else "; untrained weights, so this says nothing of trained ones"
    head = f"{title}: these rewards are not exact; against exact ones, measured {measured.date} on {measured.device}"
    return [head + note, *(f"  {name}: {summary(name, one)}" for name, one in measured.sets.items())]


def summary(name: str, one: Comparison) -> str:
    """The worst perspective of each kind, the rows that have no reward in the mode, and the verdicts that changed."""
    ranked = {p: d.spearman for p, d in one.perspectives.items() if d.spearman is not None}
    least = min(ranked, key=lambda p: ranked[p], default=None)
    spearman = f"least Spearman {ranked[least]:.4f} ({least})" if least else "no Spearman"
    widest = max(one.perspectives, key=lambda p: one.perspectives[p].largest, default=None)
    largest = f"largest difference {one.perspectives[widest].largest:.3g} ({widest})" if widest else "no difference"
    lost = f"{one.lost} without a reward in this mode, " if one.lost else ""
    changed = sum(one.changed.values())
    how = f" ({_counts(one.changed)})" if changed else ""
    few = "" if one.rows >= ENOUGH[name] else f", which is few (at least {ENOUGH[name]} are wanted)"
    return f"{one.rows}{few}; {spearman}, {largest}, {lost}{changed} verdicts changed{how}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
