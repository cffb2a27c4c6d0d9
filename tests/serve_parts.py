"""Parts of the Serve side without Ray: a replica with the fake scorer, a policy for it, small images."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from deployments.config import IngressArgs
from deployments.ingress import create_app
from deployments.replica import Replica
from jobs.local_processes import free_port
from model.fake import FakeScorer
from model.perspectives import PERSPECTIVES, Perspective
from model.policy_file import load_policy


def policy_file(folder: Path, checkpoints: dict[Perspective, str]) -> Path:
    """A policy that reviews negative rewards and blocks very negative ones."""
    lines = ["id: test", "rules:"]
    for perspective, checkpoint in checkpoints.items():
        lines += [
            f"  {perspective}:",
            f"    checkpoint: {checkpoint}",
            "    levels:",
            "      - {below: 0.0, verdict: review, severity: low}",
            "      - {below: -2.0, verdict: block, severity: high}",
        ]
    path = folder / "policy.yaml"
    path.write_text("\n".join(lines))
    return path


def replica_args(policy: Path, **overrides: Any) -> dict[str, object]:
    return {"checkpoint": "fake", "policy": str(policy), "batching": {"batch_wait_timeout_s": 0.0}, **overrides}


def fake_replica(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    scorer: FakeScorer | None = None,
    perspectives: Sequence[Perspective] = PERSPECTIVES,
    **overrides: Any,
) -> Replica:
    """The real ``Replica`` around a ``FakeScorer``. Make it inside the event loop that will use it."""
    scorer = scorer or FakeScorer(perspectives)
    monkeypatch.setattr("deployments.replica.load", lambda *args, **options: scorer)
    monkeypatch.setattr("deployments.replica.resolve", lambda name: folder)
    return Replica(replica_args(policy_file(folder, dict(scorer.identity.checkpoints)), **overrides))


@contextmanager
def endpoint_of(make_replica: Callable[[], Replica], policy: Path) -> Iterator[str]:
    """The URL of the real application around a replica, served by uvicorn on loopback for as long as the block runs.

    - make_replica: called inside the event loop of the server
    """
    port = free_port()
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        app = create_app(make_replica(), load_policy(policy), IngressArgs())  # type: ignore[arg-type]
        servers.append(uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")))
        task = asyncio.create_task(servers[0].serve())
        while not servers[0].started:
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        servers[0].should_exit = True
        thread.join(20)


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
