"""Finds golden cases under ``$ASSAY_GOLDEN`` (default ``tests/golden``), one folder a system.

Names, sizes and counts come from the case folders, so that other cases of the same kind run through the same tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

DEFAULT_ROOT = Path(__file__).parent / "golden"


def golden_root() -> Path:
    """The folder that holds one folder a system."""
    return Path(os.environ.get("ASSAY_GOLDEN") or DEFAULT_ROOT)


def system_folders(system: str) -> list[Path]:
    """The case folders of a system, in order of name; none if the system's folder is missing."""
    folder = golden_root() / system
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def require_cases(system: str, cases: list[Any]) -> None:
    """Fail, not skip, where a system has no case at all: a wrong path must not look like a pass."""
    if not cases:
        pytest.fail(f"no golden cases in {golden_root() / system}; set ASSAY_GOLDEN to the folder above it")


def read_json(path: Path) -> Any:
    """Parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
