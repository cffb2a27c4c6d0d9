"""What the run reports while it runs, and the decision that a night is an outage rather than bad rows."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import ray

REPORT_EVERY_S = 5.0
_CODES_SHOWN = 4
SCORED = ""  # key of rows without an error in ``Snapshot.codes``


class SystemicFailureError(Exception):
    """Most of the first rows failed in one and the same way."""


@dataclass
class Snapshot:
    """Counts of this run so far. ``stages``: per stage rows, seconds of work (summed over workers) and bytes."""

    rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    stages: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class OutageRule:
    """More than ``share`` of the first ``window_rows`` with one code stops the run."""

    window_rows: int
    share: float


class Progress:
    """The actor that all stages of a run report to."""

    def __init__(self, outage: OutageRule | None) -> None:
        self._outage_rule = outage
        self._snapshot = Snapshot()
        self._stop_reason: str | None = None

    def stage(self, name: str, rows: int, seconds: float, size_bytes: int) -> None:
        """Adds one batch of one stage."""
        totals = self._snapshot.stages.setdefault(name, [0, 0.0, 0])
        for index, value in enumerate((rows, seconds, size_bytes)):
            totals[index] += value

    def rows(self, codes: list[str | None]) -> str | None:
        """Adds finished rows; returns why the run must stop, or None."""
        self._snapshot.rows += len(codes)
        self._snapshot.codes.update(code or SCORED for code in codes)
        self._stop_reason = self._stop_reason or self._outage()
        return self._stop_reason

    def stop_reason(self) -> str | None:
        """Why the run was stopped, if it was."""
        return self._stop_reason

    def snapshot(self) -> Snapshot:
        """The counts so far."""
        return self._snapshot

    def _outage(self) -> str | None:
        rule, seen = self._outage_rule, self._snapshot.rows
        if rule is None:
            return None
        for code, count in self._snapshot.codes.items():
            # A count only grows, so this can be said before the window is full.
            if code != SCORED and count > rule.share * rule.window_rows:
                return f"{count} of the first {seen} rows failed with {code}: this is an outage, not bad rows"
        if seen >= rule.window_rows:
            self._outage_rule = None
        return None


class Reporter:
    """Prints progress every few seconds from a thread of its own, until the block ends."""

    def __init__(self, progress: Any, total_rows: int, done_before: int, say: Callable[[str], None]) -> None:
        self._progress = progress
        self._total = total_rows
        self._done_before = done_before
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=REPORT_EVERY_S)

    def _run(self) -> None:
        while not self._stop.wait(REPORT_EVERY_S):
            try:
                snapshot = ray.get(self._progress.snapshot.remote(), timeout=REPORT_EVERY_S)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
                continue  # a busy or ending cluster; the next tick will tell
            self._say(self._line(snapshot))

    def _line(self, snapshot: Snapshot) -> str:
        done = self._done_before + snapshot.rows
        elapsed = time.monotonic() - self._started
        rate = snapshot.rows / elapsed if elapsed else 0.0
        left = f"{(self._total - done) / rate:.0f} s left" if rate else "waiting for the first rows"
        errors = [f"{code} {count}" for code, count in snapshot.codes.most_common() if code != SCORED]
        shown = ", ".join(errors[:_CODES_SHOWN]) or "none"
        if len(errors) > _CODES_SHOWN:
            shown += f" and {len(errors) - _CODES_SHOWN} other codes"
        share = 100 * done / self._total
        return f"{done}/{self._total} rows ({share:.1f} %), {rate:.1f} rows/s, {left}; errors: {shown}"
