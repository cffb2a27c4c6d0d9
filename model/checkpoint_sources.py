"""Where checkpoint folders lie that are not on this machine: what a location holds, and its download.

``s3://bucket/folder``, or a folder of a Hugging Face repository at one commit: ``org/name@<40 hex digits>[/folder]``.
A branch or tag is refused: it may mean other weights tomorrow. Clients are imported when called.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

from model import storage
from model.errors import ConfigError, TransientError

PINNED = "org/name@<40 hex digits of a commit>"
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[^/]*)(?:/(?P<folder>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a location. ``path`` is relative to it.

    - version: ETag (S3) or git blob id (hub); it changes with the content
    - sha256: hex, where the location reports it (large files on the hub); git_blob: hex, for the others there
    """

    path: str
    size_bytes: int
    version: str
    sha256: str | None = None
    git_blob: str | None = None


class Source(Protocol):
    """One location. ``is_immutable``: what it holds never changes, so that it need not be listed again."""

    @property
    def location(self) -> str: ...

    @property
    def is_immutable(self) -> bool: ...

    def files(self, patterns: Sequence[str]) -> list[RemoteFile]:
        """Its files that match one of ``patterns``, by path. Raises ``ConfigError``, ``TransientError``."""
        ...

    def download(self, files: Sequence[RemoteFile], folder: Path) -> None:
        """Put ``files`` below ``folder``. What arrived is for the caller to check."""
        ...


def is_location(text: str) -> bool:
    """True for ``s3://…`` and for hub names with a revision, pinned or not."""
    return text.startswith("s3://") or _HUB.fullmatch(text) is not None


def source_of(location: str) -> Source:
    """The source behind a location. Raises ``ConfigError`` for a hub name without a full commit hash."""
    if location.startswith("s3://"):
        return S3Source(location.rstrip("/"))
    match = _HUB.fullmatch(location)
    if match is None:
        raise ConfigError(f"{location!r} is no location; write s3://bucket/folder or {PINNED}")
    if not _COMMIT.fullmatch(match["revision"]):
        raise ConfigError(
            f"{location!r}: {match['revision']!r} is not a full commit hash, and may mean other weights tomorrow; "
            f"write {PINNED}, as the history page of the repository shows it"
        )
    return HubSource(location.rstrip("/"), match["repo"], match["revision"], (match["folder"] or "").strip("/"))


@dataclass(frozen=True)
class S3Source:
    """A folder of a bucket. Its objects may be replaced, so it is listed each time."""

    location: str
    is_immutable: bool = False

    def files(self, patterns: Sequence[str]) -> list[RemoteFile]:
        """See ``Source``."""
        with _translated(self.location):
            listed = list(storage.list_objects(self.location, is_probe=True))
        prefix = len(self.location) + 1
        return _chosen([RemoteFile(one.uri[prefix:], one.size_bytes, one.version) for one in listed], patterns)

    def download(self, files: Sequence[RemoteFile], folder: Path) -> None:
        """One object after the other; boto3 reads a large one in parallel parts."""
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with _translated(self.location):
                storage.get_file(storage.join(self.location, file.path), target)


@dataclass(frozen=True)
class HubSource:
    """A folder (or all) of a hub repository at one commit. Endpoint and token are huggingface_hub's own settings."""

    location: str
    repo: str
    revision: str
    folder: str
    is_immutable: bool = True

    def files(self, patterns: Sequence[str]) -> list[RemoteFile]:
        """See ``Source``."""
        with _hub_errors(self.location):
            from huggingface_hub import HfApi
            from huggingface_hub.hf_api import RepoFile

            api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
            tree = list(
                api.list_repo_tree(self.repo, self.folder or None, recursive=True, revision=self.revision),
            )
        prefix = len(self.folder) + 1 if self.folder else 0
        found = []
        for entry in tree:
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                git_blob = None if entry.lfs else entry.blob_id
                found.append(RemoteFile(entry.path[prefix:], entry.size, entry.blob_id, sha256, git_blob))
        return _chosen(found, patterns)

    def download(self, files: Sequence[RemoteFile], folder: Path) -> None:
        """``snapshot_download`` of just these files, in parallel and with its own retries."""
        inside = folder / ".hub"
        names = [glob.escape(str(PurePosixPath(self.folder, file.path))) for file in files]
        with _hub_errors(self.location):
            from huggingface_hub import snapshot_download

            snapshot_download(
                self.repo,
                revision=self.revision,
                local_dir=inside,
                allow_patterns=names,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            (inside / self.folder / file.path).rename(target)
        shutil.rmtree(inside)


def _chosen(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    chosen = [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in patterns)]
    for file in chosen:
        parts = PurePosixPath(file.path).parts
        if not parts or file.path.startswith("/") or ".." in parts:  # an object's key may be anything
            raise ConfigError(f"{file.path!r} is no path inside a checkpoint folder")
    return sorted(chosen, key=lambda file: file.path)


@contextmanager
def _translated(location: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"checkpoint {location}: {error}") from error


@contextmanager
def _hub_errors(location: str) -> Iterator[None]:
    """huggingface_hub's errors, in the terms of ``model/errors.py``."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError(f"{location} is on the hub: install the extra 'hub' (huggingface_hub)") from error
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        hint = "check its name and commit, and HF_TOKEN if it is private or wants its licence accepted"
        raise ConfigError(f"checkpoint {location}: {type(error).__name__}; {hint}") from error
    # HTTPError: of the HTTP library that this version of huggingface_hub uses, which is not always the same one.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise TransientError(f"the hub did not answer for {location}: {type(error).__name__}: {error}") from error
