"""Lines of progress from the first worker to the driver, through a file in the output folder that both see.

Ray could forward what workers print, together with all that it has to say itself; this brings our lines alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRESS_FILE = "progress.log"
_POLL_S = 0.5


def tell(folder: Path, line: str) -> None:
    """Append one line."""
    with (folder / PROGRESS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class Follow:
    """Says each line that is appended from ``with`` to the end of its block."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = folder / PROGRESS_FILE, say
        self._path.touch()
        self._seen = self._path.stat().st_size
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._forward()

    def _run(self) -> None:
        while not self._is_over.wait(_POLL_S):
            self._forward()

    def _forward(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._seen)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line being written is left for the next time
        self._seen += len(whole)
        for line in whole.decode("utf-8").splitlines():
            self._say(line)
