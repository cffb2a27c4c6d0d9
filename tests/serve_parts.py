"""Parts of the Serve side without Ray: a replica with the fake scorer, a policy for it, small images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.replica import Replica
from model.fake import FakeScorer
from model.perspectives import PERSPECTIVES, Perspective


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


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
