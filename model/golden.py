"""``golden.json`` of a checkpoint folder: inputs with known rewards, which tell a healthy scorer from a broken one.

{"tolerance": {"float32": 0.001, "bfloat16": 0.05},
 "cases": [{"image": "golden/0.png", "prompt": "...", "values": {"alignment": [0.25]}}]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ConfigError, InfrastructureError
from model.schema import Generation, ScoreRecord

if TYPE_CHECKING:
    from model.scorer import Scorer

GOLDEN_FILE = "golden.json"


def check_golden(scorer: Scorer, folder: Path) -> None:
    """Score the golden cases through all three steps, and compare every value.

    A folder without ``golden.json`` has nothing to compare, and passes.

    - raises: ``InfrastructureError`` naming the first case, perspective, expected and got values;
      ``ConfigError`` if the file is malformed
    """
    path = folder / GOLDEN_FILE
    if not path.exists():
        return
    generations, expected, tolerance = _read(path, scorer.identity.dtype)
    for record, values in zip(scorer.score(generations), expected, strict=True):
        if record.error is not None:
            raise InfrastructureError(f"{path}: case {record.generation_id} failed: {record.error.message}")
        _compare(path, record, values, tolerance)


def _read(path: Path, dtype: str) -> tuple[list[Generation], list[dict[str, list[float]]], float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases: list[dict[str, Any]] = content["cases"]
        generations = [Generation(c["image"], c["prompt"], (path.parent / c["image"]).read_bytes()) for c in cases]
        return generations, [c["values"] for c in cases], float(content["tolerance"][dtype])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def _compare(path: Path, record: ScoreRecord, values: dict[str, list[float]], tolerance: float) -> None:
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
