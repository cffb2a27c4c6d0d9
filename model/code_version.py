"""Which code computes: the package version and a hash over every ``*.py`` of the project. Standard library only.

A job and the Serve replicas that it uses import their code from different places; equal ``code_version`` on
both sides means that they agree on every line.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

# The one place where the version stands; pyproject.toml reads it from here.
PACKAGE_VERSION = "0.1.0"
PACKAGES = ("model", "jobs", "deployments")


@cache
def code_version() -> str:
    """``<package version>+<first 12 hex digits of the hash>`` of the code that is running."""
    return f"{PACKAGE_VERSION}+{hash_code(Path(__file__).resolve().parent.parent)[:12]}"


def hash_code(root: Path) -> str:
    """sha256, hex, over path and content of all ``*.py`` below the packages in ``root``, in order of path.

    Lengths go in too, so that no content can pass for a path. Packages that are not there count as empty.
    """
    digest = hashlib.sha256()
    files = {path.relative_to(root).as_posix(): path for name in PACKAGES for path in (root / name).rglob("*.py")}
    for name, path in sorted(files.items()):
        for part in (name.encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()
