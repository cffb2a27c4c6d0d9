"""Where a run keeps its unpublished work, and what an earlier attempt at the same work has left there.

``staging/<run key>/shard-N/*.parquet`` are scored rows, ``checkpoints/<run key>/shard-N`` Ray's record of which
of them are committed, ``staging/<run key>/shard-N.done`` the completion marker of a shard, ``run.json`` the way
of scoring that was chosen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow.parquet as pq

from model import storage


@dataclass(frozen=True)
class Staging:
    """The unpublished work of one run key."""

    output: str
    run_key: str
    shards: int

    def rows_uri(self, shard: int) -> str:
        """Folder of the scored rows of a shard."""
        return storage.join(self.output, f"staging/{self.run_key}/shard-{shard:05d}")

    def checkpoint_uri(self, shard: int) -> str:
        """Folder of Ray's checkpoint of a shard."""
        return storage.join(self.output, f"checkpoints/{self.run_key}/shard-{shard:05d}")

    def is_done(self, shard: int) -> bool:
        """Whether every row of the shard is committed."""
        return exists(self._done_uri(shard))

    def mark_done(self, shard: int) -> None:
        """Called after the shard's last block."""
        storage.put(self._done_uri(shard), b"")

    def committed_rows(self) -> int:
        """Rows of finished blocks. Pending ones do not count: Ray removes them when the shard is resumed."""
        return sum(
            row_count(entry.uri)
            for shard in range(self.shards)
            for entry in storage.list_if_any(self.checkpoint_uri(shard))
            if entry.uri.endswith(".parquet") and ".pending" not in entry.uri
        )

    def files(self) -> list[str]:
        """All staged Parquet files."""
        found = [entry.uri for shard in range(self.shards) for entry in storage.list_if_any(self.rows_uri(shard))]
        return [uri for uri in found if uri.endswith(".parquet")]

    def stored_via(self) -> str | None:
        """The way of scoring that the run was begun with."""
        return str(json.loads(storage.get(self._run_uri()))["via"]) if exists(self._run_uri()) else None

    def store_via(self, via: str) -> None:
        """Kept on resume, so that one night is not scored in two ways."""
        storage.put(self._run_uri(), json.dumps({"via": via}).encode())

    def remove(self) -> None:
        """After publication nothing here is of use; what a kill leaves, gc removes."""
        for folder in ("checkpoints", "staging"):
            for entry in storage.list_if_any(storage.join(self.output, f"{folder}/{self.run_key}")):
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
