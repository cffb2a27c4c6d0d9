"""Where a run keeps its unpublished work, and what an earlier attempt at the same work has left there.

``staging/<run key>/S-G/shard-N/*.parquet`` are scored rows, ``checkpoints/<run key>/S-G/shard-N`` is Ray's record of
which of them are committed, ``shard-N.done`` beside them the completion marker of a shard, and ``run.json`` the way of
scoring that was chosen. S is the size of a shard, because shard N of another size holds other rows; G counts how often
the work was abandoned, because tasks of an abandoned run may write for a while after it has ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
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
    generation: int = 0

    @classmethod
    def open(cls, output: str, run_key: str, rows_per_shard: int, shards: int) -> Staging:
        """The work of this key that has not been abandoned."""
        fresh = cls(output, run_key, rows_per_shard, shards)
        uri = fresh._generation_uri()
        return replace(fresh, generation=int(storage.get(uri)) if exists(uri) else 0)

    def rows_uri(self, shard: int) -> str:
        """Folder of the scored rows of a shard."""
        return storage.join(self.output, f"staging/{self.run_key}/{self._folder()}/shard-{shard:05d}")

    def checkpoint_uri(self, shard: int) -> str:
        """Folder of Ray's checkpoint of a shard."""
        return storage.join(self.output, f"checkpoints/{self.run_key}/{self._folder()}/shard-{shard:05d}")

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

    def abandon(self) -> None:
        """Lets the next run begin afresh: what lies here must not become a result. gc removes it."""
        storage.put(self._generation_uri(), str(self.generation + 1).encode())

    def remove(self) -> None:
        """After publication nothing here is of use; what a kill or a late task leaves, gc removes."""
        for folder in ("checkpoints", "staging"):
            for entry in storage.list_if_any(storage.join(self.output, f"{folder}/{self.run_key}")):
                storage.delete(entry.uri)

    def _folder(self) -> str:
        return f"{self.rows_per_shard}-{self.generation}"

    def _generation_uri(self) -> str:
        return storage.join(self.output, f"staging/{self.run_key}/generation")

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
