"""One run per night: a lock of numbered objects, each created once and renewed by its holder.

``locks/dt=D/<8-digit n>.json``: the highest number holds the night. Taking it over means creating the next
number with If-None-Match, so two claimants cannot both win; renewing means overwriting one's own object.
Clocks are never compared between machines: a claimant watches for a renewal. A live holder shows itself
within ``RENEW_EVERY_S`` or so; one that stays silent for ``SILENCE_S`` is taken for dead. A holder that was
only slow sees the higher number at its next renewal, and stops before it can publish.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any, Self

from model import storage
from model.errors import ConfigError, InfrastructureError, TransientError

RENEW_EVERY_S = 2.0
SILENCE_S = 12.0
_NUMBER = re.compile(r"/(\d{8})\.json$")


class NightLock:
    """Context manager around a run. ``on_lost`` is called from a thread when another run has taken over.

    Raises ``ConfigError``, naming the holder, when the night is being worked on.
    """

    def __init__(
        self, output: str, night: date, run_id: str, say: Callable[[str], None], on_lost: Callable[[], None]
    ) -> None:
        self._folder = storage.join(output, f"locks/dt={night}")
        self._night = night
        self._say = say
        self._on_lost = on_lost
        self._beat = 0
        self._number = 0
        self._holder = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self.is_lost = False

    def __enter__(self) -> Self:
        last = self._last()
        if last:
            self._wait_for_silence(last)
        self._number = last + 1
        try:
            storage.put(self._uri(self._number), self._content(), if_absent=True)
        except FileExistsError as error:
            raise ConfigError(self._taken(self._read(self._number))) from error
        for number in range(max(1, self._number - 3), self._number):
            storage.delete(self._uri(number))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        if not self.is_lost:
            try:
                storage.put(self._uri(self._number), self._content(is_released=True))
            except (TransientError, PermissionError) as error:
                self._say(f"warning: the lock was not released ({error}); the next run waits {SILENCE_S:.0f} s for it")

    def check(self) -> None:
        """Raises ``InfrastructureError`` when the lock was lost; called before anything is published."""
        if self.is_lost or self._last() != self._number:
            self.is_lost = True
            raise InfrastructureError(
                f"the lock of the night {self._night} is lost: another run took over, or it could not be renewed; "
                "this run publishes nothing more"
            )

    def _last(self) -> int:
        uris = [entry.uri for entry in storage.list_if_any(self._folder)]
        return max((int(match[1]) for uri in uris if (match := _NUMBER.search(uri))), default=0)

    def _wait_for_silence(self, number: int) -> None:
        first = self._read(number)
        if first.get("is_released"):
            return
        self._say(f"the night is locked by {_name(first)}; watching for {SILENCE_S:.0f} s whether it is alive")
        started = time.monotonic()
        while time.monotonic() - started < SILENCE_S:
            time.sleep(RENEW_EVERY_S / 4)
            now = self._read(number)
            if now.get("is_released"):
                return
            if now.get("beat") != first.get("beat"):
                raise ConfigError(self._taken(now))

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_EVERY_S):
            try:
                if self._last() != self._number:
                    self.is_lost = True
                    self._on_lost()
                    return
                self._beat += 1
                storage.put(self._uri(self._number), self._content())
            except TransientError:
                continue  # storage is away for everybody; whoever comes back first decides
            except Exception:
                # Silent for any reason, this run would be taken for dead while it goes on: it must stop.
                self.is_lost = True
                self._on_lost()
                raise

    def _content(self, is_released: bool = False) -> bytes:
        return json.dumps({**self._holder, "beat": self._beat, "is_released": is_released}).encode()

    def _read(self, number: int) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(storage.get(self._uri(number), 2**16))
        except FileNotFoundError:
            return {"is_released": True}  # a later holder has tidied up
        return content

    def _uri(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")

    def _taken(self, holder: dict[str, Any]) -> str:
        return f"the night {self._night} is being worked on by {_name(holder)}; wait for it or stop it"


def _name(holder: dict[str, Any]) -> str:
    return (
        f"run {holder.get('run_id')} (host {holder.get('host')}, pid {holder.get('pid')}, since {holder.get('since')})"
    )
