"""Two-class dynamic batching: online items before job items, one forward pass at a time, in one thread.

A pass is formed by size (``max_batch_size``) and, for online items, by time (``batch_wait_timeout_s``). Work
of the nightly job is cut into passes of the same size, so an online item waits for at most one of them. Knows
nothing about models, Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from model.errors import AssayError, OverloadedError, TransientError

logger = logging.getLogger("ray.serve")
Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")

# A pass that ends with one of these says something about its items, and nothing about the model.
RECOVERABLE = (AssayError,)


class Priority(IntEnum):
    """Lower goes first."""

    ONLINE = 0
    JOB = 1


@dataclass(eq=False)
class _Request(Generic[Result]):
    """One call of ``submit``: its results come in over one or more passes."""

    future: asyncio.Future[list[Result]]
    results: list[Result | None]
    missing: int


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    request: _Request[Result]
    index: int
    item: Item
    key: Hashable
    queued_s: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Runs ``run_pass(items, key)`` over items of one key at a time; it must return one result per item.

    ``max_queued_items``: online items that may wait; more are refused. Job items are not counted: their number
    is bounded by what the job keeps in flight. ``verify``: run after a pass has failed in a way that nobody
    listed; if it raises too, the batcher is broken and refuses everything.

    Not thread-safe: use it from one event loop.
    """

    def __init__(
        self,
        run_pass: Callable[[Sequence[Item], Hashable], Sequence[Result]],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float,
        max_queued_items: int,
        verify: Callable[[], None],
    ) -> None:
        self._run_pass = run_pass
        self._max_batch_size = max_batch_size
        self._batch_wait_timeout_s = batch_wait_timeout_s
        self._max_queued_items = max_queued_items
        self._verify = verify
        self._queues: dict[Priority, deque[_Entry[Item, Result]]] = {priority: deque() for priority in Priority}
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._loop_task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    async def submit(self, items: Sequence[Item], *, key: Hashable, priority: Priority) -> list[Result]:
        """Results of ``items``, in order. Cancelling the caller drops those of its items that have not started.

        Raises: OverloadedError when too many online items wait; TransientError when the batcher is broken;
        whatever ``run_pass`` raised in a pass with one of the items.
        """
        self.check()
        if not items:
            return []
        queue = self._queues[priority]
        if priority is Priority.ONLINE and len(queue) + len(items) > self._max_queued_items:
            raise OverloadedError(f"{len(queue)} items wait already, max_queued_items={self._max_queued_items}")
        request: _Request[Result] = _Request(
            asyncio.get_running_loop().create_future(), [None] * len(items), len(items)
        )
        queue.extend(_Entry(request, index, item, key) for index, item in enumerate(items))
        self._start()
        self._wake.set()
        try:
            return await request.future
        finally:
            # Also when the caller was cancelled: nothing of it may start now.
            self._drop(request)

    async def run_alone(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the worker thread, between two passes."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, _guard(function))

    def check(self) -> None:
        """Raises TransientError when the batcher is broken: its owner has to be replaced."""
        if self._failure is not None:
            raise TransientError(f"this replica is being replaced after {type(self._failure).__name__}")

    def queued(self, priority: Priority) -> int:
        """Items that wait; those of the running pass are not among them."""
        return len(self._queues[priority])

    def _start(self) -> None:
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
            self._loop_task.add_done_callback(self._on_end)

    async def _run(self) -> None:
        while True:
            await self._wait_until_due()
            await self._do_pass(self._take())

    async def _wait_until_due(self) -> None:
        while True:
            online, jobs = self._queues[Priority.ONLINE], self._queues[Priority.JOB]
            timeout_s = None
            if online:
                timeout_s = online[0].queued_s + self._batch_wait_timeout_s - time.monotonic()
                if timeout_s <= 0 or self._count_like_first(online) >= self._max_batch_size:
                    return
            elif jobs:
                return
            # Nothing is awaited between the look at the queues and this line, so no wake-up is lost.
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()

    def _count_like_first(self, queue: deque[_Entry[Item, Result]]) -> int:
        return sum(entry.key == queue[0].key for entry in queue)

    def _take(self) -> list[_Entry[Item, Result]]:
        """The next pass: the oldest entries of the first class that has any, all with the key of the oldest."""
        priority = Priority.ONLINE if self._queues[Priority.ONLINE] else Priority.JOB
        queue = self._queues[priority]
        taken: list[_Entry[Item, Result]] = []
        left: deque[_Entry[Item, Result]] = deque()
        for entry in queue:
            fits = len(taken) < self._max_batch_size and entry.key == queue[0].key
            (taken if fits else left).append(entry)
        self._queues[priority] = left
        return taken

    async def _do_pass(self, entries: list[_Entry[Item, Result]]) -> None:
        try:
            results = await self.run_alone(lambda: self._checked_pass(entries))
        except asyncio.CancelledError:
            self._fail(entries, TransientError("this replica is shutting down"))
            raise
        except Exception as error:  # noqa: BLE001 - not swallowed: every caller of this pass gets it
            self._fail(entries, error)
            if not isinstance(error, RECOVERABLE):
                await self._verify_after(error)
            return
        for entry, result in zip(entries, results, strict=True):
            request = entry.request
            request.results[entry.index] = result
            request.missing -= 1
            if request.missing == 0 and not request.future.done():
                request.future.set_result(request.results)  # type: ignore[arg-type]  # none is missing

    def _checked_pass(self, entries: list[_Entry[Item, Result]]) -> Sequence[Result]:
        results = self._run_pass([entry.item for entry in entries], entries[0].key)
        if len(results) != len(entries):
            raise RuntimeError(f"a forward pass over {len(entries)} items gave {len(results)} results")
        return results

    def _fail(self, entries: list[_Entry[Item, Result]], error: BaseException) -> None:
        for request in {entry.request for entry in entries}:
            if not request.future.done():
                request.future.set_exception(error)
            self._drop(request)

    def _drop(self, request: _Request[Result]) -> None:
        for priority, queue in self._queues.items():
            if any(entry.request is request for entry in queue):
                self._queues[priority] = deque(entry for entry in queue if entry.request is not request)

    async def _verify_after(self, error: BaseException) -> None:
        """An unknown failure may have left the model or its device in any state: go on only if it proves sound."""
        try:
            await self.run_alone(self._verify)
        except Exception:
            self._failure = error
            logger.exception("the scorer is not sound after %s; this replica scores no more", type(error).__name__)
            raise

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """The loop has ended, for whatever reason: nobody may be left waiting."""
        error = None if task.cancelled() else task.exception()
        self._failure = self._failure or error or asyncio.CancelledError()
        waiting = [entry for queue in self._queues.values() for entry in queue]
        self._fail(waiting, TransientError("this replica stopped before it scored this; try again"))


def _guard(function: Callable[[], T]) -> Callable[[], T]:
    """Turns what no future can carry into a RuntimeError.

    A waiter for StopIteration would wait for ever, and SystemExit would end the event loop.
    """

    def guarded() -> T:
        try:
            return function()
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            raise RuntimeError(f"{type(error).__name__} left a forward pass") from error

    return guarded
