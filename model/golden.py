"""``golden.json`` of a checkpoint folder: inputs with known rewards, which tell a healthy scorer from a broken one.

{"tolerance": {"float32": 0.001, "bfloat16": 0.05, "int8": 0.25},
 "cases": [{"image": "golden/0.png", "prompt": "...", "values": {"alignment": [0.25]}, "few_crops": {...}}]}

``values`` are exact rewards. Modes in eight bits are compared with them within the tolerance of their name, 0.25
where the file gives none: that finds a broken scorer, and says nothing of how good the mode is. With few crops the
picture is another one, so that mode has rewards of its own; a case without them must just be scored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ConfigError, InfrastructureError
from model.modes import FEW_CROPS, ROUNDED_MODES
from model.schema import Generation, ScoreRecord

if TYPE_CHECKING:
    from model.scorer import Scorer

GOLDEN_FILE = "golden.json"
# Of rewards near 1; ``golden_file.py`` writes more where they are larger. The largest difference seen was 0.09 where
# rewards spread by 0.4 to 0.5, and 0.03 on the golden cases of the shipped checkpoint (tests/benchmarks/README.md).
ROUNDED_TOLERANCE = 0.25

_Values = dict[str, list[float]]


def check_golden(scorer: Scorer, folder: Path) -> None:
    """Score the golden cases through all three steps, and compare every value.

    A folder without ``golden.json`` has nothing to compare, and passes.

    - raises: ``InfrastructureError`` naming the first case, perspective, expected and got values;
      ``ConfigError`` if the file is malformed
    """
    path = folder / GOLDEN_FILE
    if not path.exists():
        return
    generations, expected, tolerance = _read(path, scorer.identity.dtype, scorer.identity.mode)
    for record, values in zip(scorer.score(generations), expected, strict=True):
        if record.error is not None:
            raise InfrastructureError(f"{path}: case {record.generation_id} failed: {record.error.message}")
        if values is not None:
            _compare(path, record, values, tolerance)


def _read(path: Path, dtype: str, mode: str) -> tuple[list[Generation], list[_Values | None], float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases: list[dict[str, Any]] = content["cases"]
        generations = [Generation(c["image"], c["prompt"], (path.parent / c["image"]).read_bytes()) for c in cases]
        expected = [c.get(FEW_CROPS) if mode == FEW_CROPS else c["values"] for c in cases]
        tolerance = float(content["tolerance"][dtype])
        if mode in ROUNDED_MODES:
            tolerance = max(tolerance, float(content["tolerance"].get(mode, ROUNDED_TOLERANCE)))
        return generations, expected, tolerance
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def _compare(path: Path, record: ScoreRecord, values: _Values, tolerance: float) -> None:
    got = {str(p): [reward] for p, reward in record.rewards.items()}
    got |= {str(p): list(vector) for p, vector in record.reward_vectors.items()}
    if set(got) != set(values):
        raise InfrastructureError(
            f"{path}: case {record.generation_id} has {sorted(values)}, scored were {sorted(got)}"
        )
    for name, expected in values.items():
        if len(expected) != len(got[name]) or any(
            abs(e - g) > tolerance for e, g in zip(expected, got[name], strict=True)
        ):
            case = f"case {record.generation_id}, {name}"
            raise InfrastructureError(f"{path}: {case}: expected {expected}, got {got[name]}, tolerance {tolerance}")
