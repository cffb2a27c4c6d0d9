"""The JSON report of a run, beside the Parquet that it published."""

from __future__ import annotations

import json
from typing import Any

from jobs.manifest import Manifest
from jobs.precision_file import describe
from jobs.progress import SCORED, Snapshot
from model import storage


def uri_of(output: str, manifest: Manifest) -> str:
    """Beside the parts; the underscore keeps readers of a folder from taking it for data."""
    name = f"_report-{manifest.version:08d}.json"
    return storage.join(output, f"scores/dt={manifest.date}/run={manifest.run_key}/{name}")


def write(
    output: str, manifest: Manifest, snapshot: Snapshot, wall_s: float, rows_before: int, rows_repeated: int
) -> None:
    """Writes the report. ``rows_before``: rows that this run found done; ``rows_repeated``: staged more than once."""
    storage.put(
        uri_of(output, manifest),
        json.dumps(_content(manifest, snapshot, wall_s, rows_before, rows_repeated), indent=1).encode(),
    )


def _content(
    manifest: Manifest, snapshot: Snapshot, wall_s: float, rows_before: int, rows_repeated: int
) -> dict[str, Any]:
    return {
        "night": manifest.model_dump(mode="json", exclude={"files", "inputs"}),
        "precision": describe(manifest.precision),
        "bytes_published": sum(file.size_bytes for file in manifest.files),
        "bytes_fetched": int(snapshot.stages.get("fetch", [0, 0, 0])[2]),
        "this_run": {
            "wall_s": round(wall_s, 2),
            "rows": snapshot.rows,
            "rows_found_done": rows_before,
            "rows_staged_twice": rows_repeated,
            "rows_per_s": round(snapshot.rows / wall_s, 2) if wall_s else None,
            "errors_by_code": {code: count for code, count in snapshot.codes.items() if code != SCORED},
            # Seconds of work summed over workers: they overlap, so their sum may exceed the wall time.
            "stages": {
                name: {"rows": int(rows), "worker_s": round(seconds, 3), "bytes": int(size)}
                for name, (rows, seconds, size) in sorted(snapshot.stages.items())
            },
        },
    }
