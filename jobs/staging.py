"""Where a run keeps its unpublished work, and what an earlier attempt at the same work has left there.

``staging/<run key>/by-S/shard-N/*.parquet`` are scored rows of shards of S rows, ``checkpoints/<run key>/by-S/shard-N``
Ray's record of which of them are committed, ``shard-N.done`` beside them the completion marker of a shard, and
``staging/<run key>/run.json`` the way of scoring that was chosen. S is part of the path because shard N of another
size holds other rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import pyarrow.parquet as pq

from model import storage

Via = Literal["serve", "pool"]

_PENDING = ".pending.parquet"


@dataclass(frozen=True)
class Staging:
    """The unpublished work of one run key."""

    output: str
    run_key: str
    rows_per_shard: int
    shards: int

    def rows_uri(self, shard: int) -> str:
        """Folder of the scored rows of a shard."""
        return storage.join(self.output, f"staging/{self.run_key}/by-{self.rows_per_shard}/shard-{shard:05d}")

    def checkpoint_uri(self, shard: int) -> str:
        """Folder of Ray's checkpoint of a shard."""
        return storage.join(self.output, f"checkpoints/{self.run_key}/by-{self.rows_per_shard}/shard-{shard:05d}")

    def is_done(self, shard: int) -> bool:
        """Whether every row of the shard is committed."""
        return exists(self._done_uri(shard))

    def mark_done(self, shard: int) -> None:
        """Called after the shard's last block."""
        storage.put(self._done_uri(shard), b"")

    def is_complete(self) -> bool:
        """Whether nothing is left to score."""
        return all(map(self.is_done, range(self.shards)))

    def settle(self, shard: int) -> None:
        """Removes pending checkpoints whose committed twin exists.

        On an object store Ray's commit is a copy and then a delete. Killed in between, it leaves both, and on
        resuming Ray would delete the data of the pending one and yet believe the committed one: rows would be lost.
        """
        names = {entry.uri for entry in storage.list_if_any(self.checkpoint_uri(shard))}
        for name in names:
            if name.endswith(_PENDING) and name.removesuffix(_PENDING) + ".parquet" in names:
                storage.delete(name)

    def committed_rows(self) -> int:
        """Rows of finished blocks. Pending ones do not count: Ray removes them when the shard is resumed."""
        return sum(
            row_count(entry.uri)
            for shard in range(self.shards)
            for entry in storage.list_if_any(self.checkpoint_uri(shard))
            if entry.uri.endswith(".parquet") and not entry.uri.endswith(_PENDING)
        )

    def files(self) -> list[str]:
        """All staged Parquet files."""
        found = [entry.uri for shard in range(self.shards) for entry in storage.list_if_any(self.rows_uri(shard))]
        return [uri for uri in found if uri.endswith(".parquet")]

    def stored_via(self) -> Via | None:
        """The way of scoring that the run was begun with."""
        if not exists(self._run_uri()):
            return None
        return "serve" if json.loads(storage.get(self._run_uri()))["via"] == "serve" else "pool"

    def store_via(self, via: Via) -> None:
        """Kept on resume, so that one night is not scored in two ways."""
        storage.put(self._run_uri(), json.dumps({"via": via}).encode())

    def remove(self) -> None:
        """Forgets all of it: published, or not worth keeping. What a kill leaves, gc removes.

        Checkpoints and markers go first: rows that count as done while their data is gone would be lost.
        """
        for folder in ("checkpoints", "staging"):
            entries = storage.list_if_any(storage.join(self.output, f"{folder}/{self.run_key}"))
            for entry in sorted(entries, key=lambda entry: entry.uri.endswith(".parquet")):
                storage.delete(entry.uri)

    def _done_uri(self, shard: int) -> str:
        return f"{self.rows_uri(shard)}.done"

    def _run_uri(self) -> str:
        return storage.join(self.output, f"staging/{self.run_key}/run.json")


def exists(uri: str) -> bool:
    """Whether there is such an object."""
    try:
        storage.head(uri)
    except FileNotFoundError:
        return False
    return True


def row_count(uri: str) -> int:
    """Rows of one Parquet object, from its footer."""
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        return int(pq.ParquetFile(file).metadata.num_rows)
