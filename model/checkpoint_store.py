"""Checkpoint folders from elsewhere, once per node, whole and verified: the cache behind ``scorer.load``.

A location is downloaded into ``$ASSAY_CACHE`` (default ``~/.cache/assay``) under a lock that all processes of the node
share, into a temporary folder that is renamed when every file in it has been checked: a folder under its final name
is complete. Each process checks it again before its first use. What a folder is for decides which files are taken;
code is never among them.

    <cache>/checkpoints/<name>-<key>/          the files, and .assay.json with their sizes and hashes
    <cache>/checkpoints/<name>-<key>.part-*/   while downloading, or left by a process that was killed
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from model.checkpoint_sources import RemoteFile, Source, source_of
from model.errors import ConfigError, TransientError

CACHE_VARIABLE = "ASSAY_CACHE"

# What each kind of folder needs (``*`` matches ``/`` too).
BUNDLE = ("*.json", "*.yaml", "*.safetensors", "*.bin", "golden/*")
BACKBONE = ("*.json", "*.safetensors")
ADAPTER = ("reward_config.yaml", "pytorch_model.bin", "lora/adapter_config.json", "lora/adapter_model.*")

# What ``assay precision`` measured; it writes this into the folder of the checkpoint, wherever that lies.
PRECISION_FILE = "precision.json"

_RECORD = ".assay.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(location: str, patterns: Sequence[str]) -> Path:
    """The local folder with the files of ``location`` that match ``patterns``; downloaded if it is not there yet.

    Once per process: objects that are replaced in S3 meanwhile are seen by the next process, under another key.

    - raises: ``ConfigError`` for a location that does not exist, holds no such file or is not pinned, and for a
      cached file that was changed or cut, naming it; ``TransientError`` if the storage or the hub fails
    """
    return _fetch(location, tuple(patterns), _cache_root())


@lru_cache(maxsize=64)
def _fetch(location: str, patterns: tuple[str, ...], root: Path) -> Path:
    source = source_of(location)
    files = None if source.is_immutable else _listing(source, patterns)
    folder = root / _name(source.location, patterns, files or ())
    root.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            _download(source, patterns, files or _listing(source, patterns), folder)
    _check_cached(folder)
    return folder


def names_in(location: str, patterns: Sequence[str]) -> set[str]:
    """Paths of the files that ``fetch`` would take; downloads none of them. Raises as ``fetch`` does."""
    return {file.path for file in _listing(source_of(location), patterns)}


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex. Read once per process while size, times and inode stay: weights are gigabytes."""
    facts = path.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _sha256(path: Path, *facts: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(source: Path, hashes: Mapping[str, object], places: Mapping[str, Path]) -> None:
    """Compare files with the hashes that ``source`` (a ``scorer.json``) gives for them.

    - hashes: ``<entry>/<path in it>``, or ``<entry>`` for one that is a file -> sha256, hex
    - places: entry as it is written -> where it lies on this machine
    - raises: ``ConfigError`` naming the first file that is missing or another one
    """
    for name, expected in hashes.items():
        path = _place(name, places)
        if path is None or not isinstance(expected, str) or not _SHA256.fullmatch(expected):
            raise ConfigError(f"{source}: hashes[{name!r}]: write '<backbone or adapter>/<file>': '<sha256, 64 hex>'")
        if not path.is_file():
            raise ConfigError(f"{path} does not exist, but {source} gives its hash")
        found = file_sha256(path)
        if found != expected:
            raise ConfigError(f"{path} has sha256 {found}, {source} says {expected}; it was changed or cut: replace it")


def _place(name: str, places: Mapping[str, Path]) -> Path | None:
    for entry, path in places.items():
        if name == entry:
            return path
        rest = name.removeprefix(f"{entry}/")
        if rest != name and ".." not in rest.split("/"):
            return path / rest
    return None


def _cache_root() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "assay").absolute() / "checkpoints"


def _listing(source: Source, patterns: Sequence[str]) -> list[RemoteFile]:
    files = source.files(patterns)
    if not files:
        raise ConfigError(f"checkpoint {source.location} holds no file that is needed ({', '.join(patterns)})")
    return files


def _name(location: str, patterns: Sequence[str], files: Sequence[RemoteFile]) -> str:
    facts = [location, *patterns, *(f"{one.path} {one.size_bytes} {one.version}" for one in files)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.-]+", "-", location.split("://")[-1])[-60:].strip("-.")
    return f"{readable}-{key}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of the node at a time; the kernel releases it when its holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(source: Source, patterns: Sequence[str], files: Sequence[RemoteFile], folder: Path) -> None:
    """Under the lock: whatever lies in a temporary folder of this name has no owner any more."""
    for stale in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(stale)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        source.download(files, part)
        record = {file.path: _checked(source, file, part / file.path) for file in files}
        if not source.is_immutable and source.files(patterns) != list(files):
            raise TransientError(f"checkpoint {source.location} changed while it was downloaded; load it again")
        (part / _RECORD).write_text(json.dumps({"location": source.location, "files": record}, indent=1))
        part.rename(folder)
    finally:
        if part.exists():
            shutil.rmtree(part)


def _checked(source: Source, file: RemoteFile, path: Path) -> dict[str, object]:
    """Size and hash of a file that has arrived. Raises ``TransientError`` if it is not what the source reports."""
    size = path.stat().st_size
    if size != file.size_bytes:
        raise TransientError(f"{source.location}/{file.path}: {size} of {file.size_bytes} bytes arrived; load it again")
    sha256 = file_sha256(path)
    if file.sha256 not in (None, sha256):
        raise TransientError(
            f"{source.location}/{file.path} arrived with sha256 {sha256}, reported is {file.sha256}; load it again"
        )
    if file.git_blob not in (None, _git_blob(path) if file.git_blob else None):
        raise TransientError(f"{source.location}/{file.path} is not git blob {file.git_blob}; load it again")
    return {"size_bytes": size, "sha256": sha256}


def _git_blob(path: Path) -> str:
    """git's id of a file's content; used for small files only, which stand in git itself."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _check_cached(folder: Path) -> None:
    """Raises ``ConfigError`` naming the first file that is not as it was downloaded."""
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    # Measuring a mode writes or changes this one after the download. It decides no reward: without it, or with another
    # one, the same rewards come out, and a report of them says something else about their precision.
    record.pop(PRECISION_FILE, None)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    present -= {_RECORD, PRECISION_FILE}
    remedy = f"delete {folder} and it is downloaded again"
    for name in sorted(record.keys() ^ present):
        raise ConfigError(f"{folder / name} is {'missing' if name in record else 'not of this checkpoint'}; {remedy}")
    for name, facts in record.items():
        if (folder / name).stat().st_size != facts["size_bytes"] or file_sha256(folder / name) != facts["sha256"]:
            raise ConfigError(f"{folder / name} was changed or cut after its download; {remedy}")
