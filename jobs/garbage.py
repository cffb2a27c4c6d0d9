"""Removes what no manifest names: superseded parts, abandoned staging, old locks. Nothing younger than the limit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs import manifest as manifests
from model import storage

_KEPT_DAYS = 7.0
_LOCK = re.compile(r"/locks/dt=[^/]+/\d{8}\.json$")


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be."""

    objects: int
    size_bytes: int


def collect(
    output: str, say: Callable[[str], None], *, older_than_days: float = _KEPT_DAYS, dry_run: bool = False
) -> Collected:
    """Removes unreferenced objects. The newest manifest version of a night protects its files, older ones do not.

    Superseded manifests stay: they are small, and tell what the night was. A run in progress is safe as long as
    it is younger than the limit.
    """
    named = set()
    for night, versions in manifests.versions_by_night(output).items():
        newest = manifests.read(output, night, versions[-1])
        named |= {storage.join(output, file.path) for file in newest.files}
    limit = time.time() - older_than_days * 86_400
    objects = size = 0
    for folder in ("scores", "staging", "checkpoints", "locks"):
        for entry in storage.list_if_any(storage.join(output, folder)):
            is_report = "/_report-" in entry.uri
            if entry.uri in named or is_report or entry.modified_at_s > limit or _is_newest_lock(entry.uri, output):
                continue
            say(f"{'would remove' if dry_run else 'removing'} {entry.uri}")
            if not dry_run:
                storage.delete(entry.uri)
            objects += 1
            size += entry.size_bytes
    return Collected(objects, size)


def _is_newest_lock(uri: str, output: str) -> bool:
    """The newest lock of a night stays: its number is what the next holder counts on from."""
    if not _LOCK.search(uri):
        return False
    folder = uri.rsplit("/", 1)[0]
    return uri == max(entry.uri for entry in storage.list_if_any(folder))
