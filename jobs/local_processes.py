"""Start processes, remember which ones are ours, and stop exactly those.

A process is ours when its pid and its start time are the ones that were written down; a pid alone may have
been given to somebody else since. Knows nothing about Ray, S3 or Serve.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from model.errors import InfrastructureError

# Start times are computed from the boot time, which moves a little when the clock is set.
START_TIME_TOLERANCE_S = 2.0
_POLL_S = 0.1
# Below the range from which the kernel takes ports for outgoing connections (Linux: 32768 and up), so that
# none of them takes a port between our look and the server's bind.
_PORT_RANGE = (20_000, 32_000)


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one with the same pid by its start time (seconds since the epoch)."""

    name: str
    pid: int
    created_s: float

    @classmethod
    def of(cls, process: psutil.Process, name: str) -> ProcessId:
        return cls(name, process.pid, process.create_time())

    def find(self) -> psutil.Process | None:
        """The process, or None when it has ended or its pid now belongs to another."""
        try:
            process = psutil.Process(self.pid)
            is_ours = abs(process.create_time() - self.created_s) < START_TIME_TOLERANCE_S
            return process if is_ours and is_alive(process) else None
        except psutil.NoSuchProcess:
            return None


@dataclass
class ProcessRecord:
    """What a stack has started, kept in a file so that the next start can clean up after a kill -9."""

    path: Path
    owner: ProcessId
    temp_dir: str
    processes: list[ProcessId]

    @classmethod
    def new(cls, path: Path, temp_dir: Path) -> ProcessRecord:
        record = cls(path, ProcessId.of(psutil.Process(), "owner"), str(temp_dir), [])
        record.write()
        return record

    @classmethod
    def read(cls, path: Path) -> ProcessRecord | None:
        """The record at ``path``; None when there is none, or it was cut short while it was written."""
        try:
            data = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        processes = [ProcessId(**process) for process in data["processes"]]
        return cls(path, ProcessId(**data["owner"]), data["temp_dir"], processes)

    def add(self, processes: Iterable[ProcessId]) -> None:
        self.processes += [process for process in processes if process not in self.processes]
        self.write()

    def write(self) -> None:
        data = {
            "owner": asdict(self.owner),
            "temp_dir": self.temp_dir,
            "processes": [asdict(process) for process in self.processes],
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1))
        partial.replace(self.path)

    def roots(self, name: str | None = None) -> list[psutil.Process]:
        """The recorded processes (those called ``name``) that still run."""
        recorded = [identity for identity in self.processes if name in (None, identity.name)]
        return [process for identity in recorded if (process := identity.find())]


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. A zombie does not: where nobody reaps orphans it would seem to live for ever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and everything below them, each once, parents first."""
    found: dict[psutil.Process, None] = {}
    for root in roots:
        found[root] = None
        with suppress(psutil.NoSuchProcess):
            found.update(dict.fromkeys(root.children(recursive=True)))
    return list(found)


def spawn(argv: Sequence[str], *, env: Mapping[str, str], log_path: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """Start a background process with its output in ``log_path``.

    It gets a session of its own: Ctrl-C at the terminal must reach us alone, or Ray would be gone before
    Serve was shut down.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(processes: Iterable[psutil.Process], *, roots: Iterable[psutil.Process], wait_s: float) -> None:
    """SIGTERM to the roots; wait until ``processes`` and all their descendants are gone; SIGKILL to what is
    left after ``wait_s`` seconds."""
    roots = list(roots)
    everything = dict.fromkeys(with_descendants([*roots, *processes]))
    _signal_all(roots, signal.SIGTERM)
    deadline = time.monotonic() + wait_s
    while (left := [process for process in everything if is_alive(process)]) and time.monotonic() < deadline:
        # A stopping server may still fork: whatever it starts now belongs to us as well.
        everything.update(dict.fromkeys(with_descendants(left)))
        time.sleep(_POLL_S)
    _signal_all(with_descendants(left), signal.SIGKILL)


def _signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        # send_signal compares the start time again, so a pid that was reused meanwhile is safe.
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now, on any interface.

    Raises: InfrastructureError when 200 random ports were all taken.
    """
    for _ in range(200):
        port = random.randint(*_PORT_RANGE)  # noqa: S311 - nothing secret
        if is_port_free(port, host) and is_port_free(port, ""):
            return port
    raise InfrastructureError(f"no free TCP port found between {_PORT_RANGE[0]} and {_PORT_RANGE[1]}")


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As servers do: a port in TIME_WAIT from the last run is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


class SignalGate:
    """Turns SIGINT, SIGTERM and SIGHUP into an exception in the main thread, except while held.

    Held means: while a process is started but not yet written down, and while things are being stopped. The
    signal is then kept and takes effect when the hold ends, so a second Ctrl-C cannot leave half a stack.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._holds = 0
        self._pending: int | None = None
        self._previous: dict[int, signal.Handlers | int | object] = {}

    def install(self) -> None:
        # Python allows handlers in the main thread only; elsewhere signals are the caller's business.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._previous = {}

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._holds == 0 and self._pending is not None:
            number, self._pending = self._pending, None
            self._raise(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holds:
            self._pending = number
        else:
            self._raise(number)

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log file, or nothing when it does not exist."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def base_environment(drop_prefixes: Sequence[str]) -> dict[str, str]:
    """A copy of our environment without the variables that start with one of ``drop_prefixes``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(tuple(drop_prefixes))}
