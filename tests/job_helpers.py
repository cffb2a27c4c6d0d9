"""Small logs and staged rows for the tests of jobs/."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.logs import LogFile, format_of
from jobs.parquet import FACTS_SCHEMA
from jobs.rows import row_key
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import Level, Policy, Rule, Severity, Verdict
from model.scorer import resolve
from model.storage import head

NIGHT = date(2026, 11, 20)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
CHECKPOINT = "c@sha256:" + "0" * 64


def generation(number: int, **changes: Any) -> dict[str, Any]:
    """A sound log row."""
    row = {"generation_id": f"g{number}", "created_at": NOON, "prompt": "a red ball", "image_uri": f"{number}.png"}
    return row | changes


def untrained_copy(folder: Path) -> Path:
    """The shipped checkpoint in ``folder``, saying of itself that it is untrained."""
    shutil.copytree(resolve("demo"), folder)
    values = json.loads((folder / "scorer.json").read_text(encoding="utf-8")) | {"is_trained": False}
    (folder / "scorer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> LogFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return log_file(path)


def write_jsonl(path: Path, rows: list[dict[str, Any] | str]) -> LogFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, default=str) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return log_file(path)


def log_file(path: Path) -> LogFile:
    facts = head(str(path))
    kind = format_of(str(path))
    assert kind is not None
    return LogFile(facts.uri, facts.version, facts.size_bytes, kind)


def policy(below: float = 0.0, policy_id: str = "p", checkpoint: str = CHECKPOINT) -> Policy:
    """Reviews and flags whatever has a safety reward below the threshold."""
    rule = Rule(checkpoint, (Level(below, Verdict.REVIEW, Severity.MEDIUM),))
    return Policy(policy_id, "for tests", {Perspective.SAFETY: rule})


def staged_row(log_uri: str, version: str, position: int, reward: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """A row of FACTS_SCHEMA: scored with equal rewards, or a dead letter where ``reward`` is None."""
    row: dict[str, Any] = dict.fromkeys(FACTS_SCHEMA.names)
    row |= {
        "row_key": row_key(log_uri, version, position),
        "generation_id": f"g{position}",
        "created_at": NOON,
        "prompt": "a red ball",
        "source_file": log_uri,
        "source_version": version,
        "source_row": position,
        "status": "scored",
        "not_scored": [],
        "preprocessing_hash": "p" * 64,
        "code_version": "0",
        "run_id": "run-1",
        "scored_at": NOON,
    }
    if reward is None:
        row |= {"status": "error", "error_code": "image_not_found", "error_stage": "fetch", "error_message": "gone"}
        row["not_scored"] = [str(perspective) for perspective in PERSPECTIVES]
    else:
        row |= {f"reward_{perspective}": reward for perspective in PERSPECTIVES}
    return row | changes


def write_staged(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, FACTS_SCHEMA), path)
    return str(path)


@contextmanager
def s3_that_answers(status: int, code: str) -> Iterator[dict[str, str]]:
    """A server that answers every request with one error; gives the environment that leads to it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _answer(self) -> None:
            self.send_response(status)
            has_body = self.command != "HEAD" and status != 304
            self.send_header("Content-Length", str(len(body)) if has_body else "0")
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        do_GET = do_HEAD = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
