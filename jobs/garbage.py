"""Removes what no manifest names: superseded parts, abandoned work, old locks. Nothing younger than the limit."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date

from jobs import manifest as manifests
from jobs.manifest import Manifest
from model import storage
from model.errors import ConfigError
from model.storage import StoredObject

_KEPT_DAYS = 7.0
# A holder renews its lock every few seconds; silent for this long it is dead, even where a clock is minutes off.
_LOCK_ALIVE_S = 600.0
_LOCK = re.compile(r"/dt=([^/]+)/\d{8}\.json$")
_NIGHT = re.compile(r"/dt=([^/]+)/")
_TEMPORARY = "/.tmp-"  # how model/storage.py names a local file until it is whole


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be."""

    objects: int
    size_bytes: int


def collect(
    output: str, say: Callable[[str], None], *, older_than_days: float = _KEPT_DAYS, dry_run: bool = False
) -> Collected:
    """Removes unreferenced objects. Raises ``ConfigError`` for a limit below 0.

    The newest manifest version of a night protects its files. Those of an older version are kept for the limit after
    another version took its place, for who still reads them. A night with a live lock is left alone, and while there
    is one, so is all unpublished work, because that does not say its night: also with a limit of 0 days.
    Superseded manifests and reports stay: they are small, and tell what the night was.
    """
    if not older_than_days >= 0:
        raise ConfigError(f"--older-than-days {older_than_days} is below 0")
    # Listed and named files are compared as text: ``./out`` is listed as ``out``, and nothing would be named.
    output = output if storage.is_s3(output) else str(storage.local_path(output).absolute())
    limit, waste = time.time() - older_than_days * 86_400, _Waste(say, dry_run)
    _collect_by_night(output, limit, waste)
    _collect_unpublished(output, limit, waste)
    return Collected(len(waste.removed), sum(entry.size_bytes for entry in waste.removed))


def _collect_by_night(output: str, limit: float, waste: _Waste) -> None:
    """Parts, locks, and temporary files of what lies beside them.

    In this order: a part that is listed here and published afterwards is named by the manifests, which are read
    # later, or its night is locked in between, which the second look at the locks tells.
    """
    before = _read_locks(output)
    listed = [(folder, entry) for folder in ("scores", "manifests", "locks") for entry in _list(output, folder)]
    nights = manifests.versions_by_night(output)
    published = {str(night): _Published(output, night, versions) for night, versions in nights.items()}
    now = _read_locks(output)
    busy = now.busy_since(before)
    for night in sorted(busy):
        waste.say(f"the night {night} is being worked on; nothing of it is removed")
    # The newest lock of a night stays: its number is what the next holder counts on from.
    kept = {entry.uri for entry in now.newest.values()}
    for folder, entry in listed:
        match = _NIGHT.search(entry.uri.removeprefix(output))
        night = match[1] if match else ""
        if night in busy or entry.uri in kept:
            continue
        if _unneeded_since(folder, entry, published.get(night)) <= limit:
            waste.remove(entry)


@dataclass
class _Waste:
    """Removes objects, or only says so, and remembers them."""

    say: Callable[[str], None]
    dry_run: bool
    removed: list[StoredObject] = field(default_factory=list)

    def remove(self, entry: StoredObject) -> None:
        self.say(f"{'would remove' if self.dry_run else 'removing'} {entry.uri}")
        if not self.dry_run:
            storage.delete(entry.uri)
        self.removed.append(entry)


@dataclass(frozen=True)
class _Locks:
    """The newest lock object of each night, and the nights that are locked now."""

    newest: dict[str, StoredObject]
    live: frozenset[str]

    def busy_since(self, before: _Locks) -> set[str]:
        """Nights that are locked, or were since ``before``."""
        nights = self.newest.keys() | before.newest.keys()
        return {night for night in nights if self.newest.get(night) != before.newest.get(night)} | self.live


def _read_locks(output: str) -> _Locks:
    newest: dict[str, StoredObject] = {}
    for entry in storage.list_if_any(storage.join(output, "locks")):
        match = _LOCK.search(entry.uri)
        if match and (match[1] not in newest or entry.uri > newest[match[1]].uri):
            newest[match[1]] = entry
    return _Locks(newest, frozenset(night for night, entry in newest.items() if _is_live(entry)))


def _is_live(lock: StoredObject) -> bool:
    if time.time() - lock.modified_at_s > _LOCK_ALIVE_S:
        return False
    try:
        return not json.loads(storage.get(lock.uri, 2**16)).get("is_released")
    except (FileNotFoundError, ValueError, AttributeError):
        return True  # replaced by a later one at this moment, or of a kind that is not known here: not ours to judge


class _Published:
    """The versions of one night; the older ones are read only when something may be theirs."""

    def __init__(self, output: str, night: date, versions: list[int]) -> None:
        self._output = output
        self._night = night
        self._versions = versions
        self._read: dict[int, tuple[Manifest, frozenset[str]]] = {}

    def superseded_at(self, uri: str) -> float | None:
        """When the last version that names the file was replaced: infinity for the newest, None where none names it."""
        replaced_at = math.inf
        for version in reversed(self._versions):
            manifest, named = self._version(version)
            if uri in named:
                return replaced_at
            replaced_at = manifest.published_at.timestamp()
        return None

    def _version(self, version: int) -> tuple[Manifest, frozenset[str]]:
        if version not in self._read:
            manifest = manifests.read(self._output, self._night, version)
            named = frozenset(storage.join(self._output, file.path) for file in manifest.files)
            self._read[version] = manifest, named
        return self._read[version]


def _unneeded_since(folder: str, entry: StoredObject, published: _Published | None) -> float:
    """Seconds since 1970; infinity for what stays."""
    if _TEMPORARY in entry.uri:
        return entry.modified_at_s
    if folder == "manifests" or "/_report-" in entry.uri:
        return math.inf
    superseded_at = published.superseded_at(entry.uri) if published and folder == "scores" else None
    return entry.modified_at_s if superseded_at is None else superseded_at


def _list(output: str, folder: str) -> list[StoredObject]:
    return storage.list_if_any(storage.join(output, folder), with_temporary=True)


def _collect_unpublished(output: str, limit: float, waste: _Waste) -> None:
    """Staged rows and the record of them are one: without either, a resumed run would lose the rows.

    All of it goes or none, by the age of its newest object. The record goes first, so that a removal that is
    cut short leaves rows that count as not done.
    """
    before = _read_locks(output)
    units: dict[str, list[tuple[int, StoredObject]]] = {}
    for folder in ("checkpoints", "staging"):
        root = storage.join(output, folder)
        for entry in _list(output, folder):
            is_rows = folder == "staging" and entry.uri.endswith(".parquet")
            key = entry.uri.removeprefix(f"{root}/").split("/", 1)[0]
            units.setdefault(key, []).append((int(is_rows), entry))
    for entries in units.values():
        if max(entry.modified_at_s for _, entry in entries) > limit:
            continue
        # Looked at again each time: a run may have begun while another unit was being removed.
        if busy := _read_locks(output).busy_since(before):
            waste.say(f"the night {min(busy)} is being worked on; staged rows and checkpoints are left alone")
            return
        for _, entry in sorted(entries, key=lambda ranked: ranked[0]):
            waste.remove(entry)
