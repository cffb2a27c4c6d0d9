"""Where relative paths in the arguments of the Serve application start: at the project root.

The working folder of a Serve actor is some folder of Ray's.
"""

from __future__ import annotations

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def in_project(path: str) -> Path:
    """``path`` itself if absolute, or else below the project root."""
    return PROJECT_ROOT / path


def find_checkpoint(name_or_path: str) -> str | Path:
    """A folder below the project root if there is such a one, or else what was given: a name or a full path."""
    folder = in_project(name_or_path)
    return folder if folder.is_dir() else name_or_path
