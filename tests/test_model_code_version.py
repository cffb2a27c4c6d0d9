"""The code version changes with any line of the code, and with nothing else."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from model.code_version import PACKAGE_VERSION, code_version, hash_code


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("model/__init__.py", "model/a.py", "jobs/b.py", "deployments/sub/c.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    return tmp_path


def test_format() -> None:
    assert re.fullmatch(re.escape(PACKAGE_VERSION) + r"\+[0-9a-f]{12}", code_version())


def test_hash_is_over_names_and_contents_in_order(root: Path) -> None:
    digest = hashlib.sha256()
    for name in ("deployments/sub/c.py", "jobs/b.py", "model/__init__.py", "model/a.py"):
        for part in (name.encode(), f"# {name}".encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    assert hash_code(root) == digest.hexdigest()


def test_other_files_do_not_count(root: Path) -> None:
    before = hash_code(root)
    (root / "model" / "weights.bin").write_bytes(b"0")
    (root / "tests").mkdir()
    (root / "tests" / "test_a.py").write_text("")
    (root / "setup.py").write_text("")
    assert hash_code(root) == before


@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove"])
def test_every_change_counts(root: Path, change: str) -> None:
    before = hash_code(root)
    path = root / "model" / "a.py"
    if change == "edit":
        path.write_text("# model/a.py ")
    elif change == "rename":
        path.rename(root / "model" / "z.py")
    elif change == "add":
        (root / "jobs" / "empty.py").write_text("")
    else:
        path.unlink()
    assert hash_code(root) != before


def test_content_cannot_pass_for_a_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.py").write_text("x")
    first = hash_code(tmp_path)
    (tmp_path / "model" / "a.py").rename(tmp_path / "model" / "a.pyx.py")
    (tmp_path / "model" / "a.pyx.py").write_text("")
    assert hash_code(tmp_path) != first
