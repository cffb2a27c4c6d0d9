"""The batcher: order, cutting, cancellation, failures, and that no item is ever lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

import pytest

from deployments.batching import Batcher, Priority
from model.errors import ErrorCode, InputError, OverloadedError, Stage, TransientError

ONLINE, JOB = Priority.ONLINE, Priority.JOB


class Device:
    """Stands in for the model: keeps every pass, takes ``delay_s`` for each, doubles its numbers."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.passes: list[tuple[Hashable, list[int]]] = []
        self.error_at: dict[int, BaseException] = {}  # item -> what a pass with it raises
        self.gate = threading.Event()
        self.gate.set()
        self.running = 0
        self.verify_error: BaseException | None = None

    def run(self, items: Sequence[int], key: Hashable) -> list[int]:
        self.running += 1
        assert self.running == 1, "two passes at once"
        self.passes.append((key, list(items)))
        self.gate.wait(10)
        time.sleep(self.delay_s)
        self.running -= 1
        for item in items:
            if item in self.error_at:
                raise self.error_at[item]
        return [2 * item for item in items]

    def verify(self) -> None:
        if self.verify_error is not None:
            raise self.verify_error

    @property
    def batches(self) -> list[list[int]]:
        return [items for _, items in self.passes]


def run_with(
    device: Device,
    scenario: Callable[[Batcher[int, int]], Awaitable[Any]],
    *,
    size: int = 4,
    wait_s: float = 0.0,
    limit: int = 100,
) -> Any:
    async def main() -> Any:
        batcher: Batcher[int, int] = Batcher(
            device.run, max_batch_size=size, batch_wait_timeout_s=wait_s, max_queued_items=limit, verify=device.verify
        )
        try:
            # A lost wake-up or item would hang: the bound turns that into a failure.
            return await asyncio.wait_for(scenario(batcher), 20)
        finally:
            device.gate.set()  # its thread must end, or the process would not

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_results_come_in_the_order_of_the_items() -> None:
    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        return await batcher.submit([5, 3, 9], key="k", priority=ONLINE)

    assert run_with(Device(), scenario) == [10, 6, 18]


def test_no_items_is_no_pass() -> None:
    device = Device()

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        return await batcher.submit([], key="k", priority=ONLINE)

    assert run_with(device, scenario) == []
    assert device.passes == []


def test_requests_within_the_wait_share_a_pass() -> None:
    device = Device()

    async def scenario(batcher: Batcher[int, int]) -> list[list[int]]:
        return await asyncio.gather(*(batcher.submit([n], key="k", priority=ONLINE) for n in range(3)))

    assert run_with(device, scenario, wait_s=0.05) == [[0], [2], [4]]
    assert device.batches == [[0, 1, 2]]


def test_a_full_batch_does_not_wait() -> None:
    async def scenario(batcher: Batcher[int, int]) -> float:
        started_s = time.monotonic()
        await asyncio.gather(*(batcher.submit([n], key="k", priority=ONLINE) for n in range(4)))
        return time.monotonic() - started_s

    assert run_with(Device(), scenario, wait_s=5.0) < 2.0


def test_a_lone_item_waits_no_longer_than_the_timeout() -> None:
    async def scenario(batcher: Batcher[int, int]) -> float:
        started_s = time.monotonic()
        await batcher.submit([1], key="k", priority=ONLINE)
        return time.monotonic() - started_s

    assert 0.05 <= run_with(Device(), scenario, wait_s=0.05) < 1.0


def test_job_items_do_not_wait_for_company() -> None:
    async def scenario(batcher: Batcher[int, int]) -> float:
        started_s = time.monotonic()
        await batcher.submit([1], key="k", priority=JOB)
        return time.monotonic() - started_s

    assert run_with(Device(), scenario, wait_s=5.0) < 2.0


def test_passes_hold_one_key_only_and_the_oldest_goes_first() -> None:
    device = Device()

    async def scenario(batcher: Batcher[int, int]) -> None:
        calls = [batcher.submit([n], key=key, priority=ONLINE) for n, key in enumerate("abab")]
        await asyncio.gather(*calls)

    run_with(device, scenario, wait_s=0.02)
    assert device.passes == [("a", [0, 2]), ("b", [1, 3])]


def test_online_goes_before_job_and_waits_for_one_short_pass_at_most() -> None:
    device = Device()
    device.gate.clear()

    async def scenario(batcher: Batcher[int, int]) -> list[list[int]]:
        job = asyncio.create_task(batcher.submit(list(range(100, 112)), key="k", priority=JOB))
        await until(lambda: len(device.passes) == 1)  # the first job pass is running
        online = asyncio.create_task(batcher.submit([1], key="k", priority=ONLINE))
        await asyncio.sleep(0)
        device.gate.set()
        return [await online, await job]

    online, job = run_with(device, scenario)
    # 12 job items in passes of 4, and the online item straight after the pass that was running.
    assert device.batches == [[100, 101, 102, 103], [1], [104, 105, 106, 107], [108, 109, 110, 111]]
    assert online == [2]
    assert job == [2 * n for n in range(100, 112)]


def test_cancelled_caller_is_not_started_and_costs_nobody_else() -> None:
    device = Device()
    device.gate.clear()

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        running = asyncio.create_task(batcher.submit([1], key="k", priority=ONLINE))
        await until(lambda: len(device.passes) == 1)
        cancelled = asyncio.create_task(batcher.submit([2, 3], key="k", priority=ONLINE))
        other = asyncio.create_task(batcher.submit([4], key="k", priority=ONLINE))
        await asyncio.sleep(0)
        assert batcher.queued(ONLINE) == 3
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert batcher.queued(ONLINE) == 1
        device.gate.set()
        return await running + await other

    assert run_with(device, scenario) == [2, 8]
    assert device.batches == [[1], [4]]


def test_cancelled_while_its_pass_runs_loses_only_its_own_answer() -> None:
    device = Device()
    device.gate.clear()

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        calls = [asyncio.create_task(batcher.submit([n], key="k", priority=ONLINE)) for n in (1, 2)]
        await until(lambda: len(device.passes) == 1)
        calls[0].cancel()
        await asyncio.sleep(0)
        device.gate.set()
        return await calls[1]

    assert run_with(device, scenario, wait_s=0.02) == [4]
    assert device.batches == [[1, 2]]


def test_too_many_online_items_are_refused_and_job_items_are_not_counted() -> None:
    device = Device()
    device.gate.clear()

    async def scenario(batcher: Batcher[int, int]) -> list[list[int]]:
        job = asyncio.create_task(batcher.submit(list(range(8)), key="k", priority=JOB))
        await until(lambda: len(device.passes) == 1)
        accepted = asyncio.create_task(batcher.submit([10, 11], key="k", priority=ONLINE))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="max_queued_items=3"):
            await batcher.submit([12, 13], key="k", priority=ONLINE)
        third = asyncio.create_task(batcher.submit([14], key="k", priority=ONLINE))
        await asyncio.sleep(0)
        device.gate.set()
        return [await accepted, await third, await job]

    assert run_with(device, scenario, limit=3) == [[20, 22], [28], [2 * n for n in range(8)]]


@pytest.mark.parametrize(
    "error",
    [ValueError("boom"), InputError(ErrorCode.IMAGE_CORRUPT, Stage.SCORE, "bad"), StopIteration(), SystemExit(1)],
)
def test_a_failed_pass_reaches_each_of_its_callers_and_nobody_else(error: BaseException) -> None:
    device = Device()
    device.error_at = {2: error}
    # Two kinds that no future can carry come out as RuntimeError.
    expected = RuntimeError if isinstance(error, (StopIteration, SystemExit)) else type(error)

    async def scenario(batcher: Batcher[int, int]) -> list[Any]:
        same_pass = [batcher.submit([n], key="a", priority=ONLINE) for n in (1, 2)]
        other_pass = batcher.submit([3], key="b", priority=ONLINE)
        first = await asyncio.gather(*map(asyncio.ensure_future, [*same_pass, other_pass]), return_exceptions=True)
        return [*first, await batcher.submit([4], key="a", priority=ONLINE)]

    one, two, three, four = run_with(device, scenario, wait_s=0.02)
    assert isinstance(one, expected)
    assert isinstance(two, expected)
    # The device proved sound afterwards, so the others are served.
    assert (three, four) == ([6], [8])


@pytest.mark.parametrize("error", [ValueError("boom"), TransientError("boom")])
def test_the_rest_of_a_failed_request_is_not_run(error: Exception) -> None:
    device = Device()
    device.error_at = {1: error}

    async def scenario(batcher: Batcher[int, int]) -> None:
        with pytest.raises(type(error), match="boom"):
            await batcher.submit(list(range(12)), key="k", priority=JOB)
        await batcher.submit([99], key="k", priority=JOB)

    run_with(device, scenario)
    assert device.batches == [[0, 1, 2, 3], [99]]


def test_wrong_number_of_results_is_a_failure_not_a_shift() -> None:
    async def scenario(batcher: Batcher[int, int]) -> None:
        with pytest.raises(RuntimeError, match="2 items gave 1 results"):
            await batcher.submit([1, 2], key="k", priority=ONLINE)

    device = Device()
    device.run = lambda items, key: [0]  # type: ignore[method-assign]
    run_with(device, scenario)


def test_unknown_failure_and_then_an_unsound_device_breaks_the_batcher() -> None:
    device = Device()
    device.error_at = {1: ValueError("boom")}
    device.verify_error = RuntimeError("rewards are off")

    async def scenario(batcher: Batcher[int, int]) -> None:
        failed = asyncio.create_task(batcher.submit([1], key="a", priority=ONLINE))
        waiting = asyncio.create_task(batcher.submit([2], key="b", priority=ONLINE))
        with pytest.raises(ValueError, match="boom"):
            await failed
        with pytest.raises(TransientError, match="try again"):
            await waiting
        with pytest.raises(TransientError, match="replaced after ValueError"):
            await batcher.submit([3], key="a", priority=ONLINE)
        with pytest.raises(TransientError):
            batcher.check()

    run_with(device, scenario)
    assert device.batches == [[1]]


def test_listed_failure_needs_no_verification() -> None:
    device = Device()
    device.error_at = {1: TransientError("later")}
    device.verify_error = AssertionError("must not be called")

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        with pytest.raises(TransientError, match="later"):
            await batcher.submit([1], key="k", priority=ONLINE)
        return await batcher.submit([2], key="k", priority=ONLINE)

    assert run_with(device, scenario) == [4]


def test_nobody_is_left_waiting_when_the_loop_ends() -> None:
    device = Device()
    device.gate.clear()

    async def scenario(batcher: Batcher[int, int]) -> None:
        calls = [asyncio.create_task(batcher.submit([n], key=n, priority=ONLINE)) for n in (1, 2)]
        await until(lambda: len(device.passes) == 1)
        assert batcher._loop_task is not None
        batcher._loop_task.cancel()
        for call in calls:
            with pytest.raises(TransientError):
                await call
        with pytest.raises(TransientError):
            await batcher.submit([3], key=3, priority=ONLINE)

    run_with(device, scenario)


def test_other_work_runs_between_passes() -> None:
    device = Device()
    device.gate.clear()
    seen: list[int] = []

    async def scenario(batcher: Batcher[int, int]) -> None:
        call = asyncio.create_task(batcher.submit([1], key="k", priority=ONLINE))
        await until(lambda: len(device.passes) == 1)
        check = asyncio.create_task(batcher.run_alone(lambda: seen.append(device.running)))
        await asyncio.sleep(0.02)
        assert seen == []
        device.gate.set()
        await asyncio.gather(call, check)

    run_with(device, scenario)
    assert seen == [0]


@pytest.mark.parametrize("seed", range(5))
def test_no_item_is_lost_or_mixed_up_under_random_load(seed: int) -> None:
    device = Device(delay_s=0.0005)
    chance = random.Random(seed)

    async def call(batcher: Batcher[int, int], number: int) -> bool:
        """Whether the call was answered; each answer is checked."""
        await asyncio.sleep(chance.random() * 0.1)
        items = [1000 * number + offset for offset in range(chance.randint(1, 10))]
        priority = chance.choice([ONLINE, JOB])
        submitted = asyncio.create_task(batcher.submit(items, key=chance.choice("ab"), priority=priority))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.01)
            submitted.cancel()
        try:
            assert await submitted == [2 * item for item in items]
        except asyncio.CancelledError:
            return False
        return True

    async def scenario(batcher: Batcher[int, int]) -> list[bool]:
        answers = await asyncio.gather(*(call(batcher, number) for number in range(100)))
        assert (batcher.queued(ONLINE), batcher.queued(JOB)) == (0, 0)
        return answers

    answers = run_with(device, scenario, wait_s=0.002, limit=10_000)
    assert 50 < sum(answers) < 100
    started = [item for batch in device.batches for item in batch]
    assert len(started) == len(set(started))
    assert max(map(len, device.batches)) <= 4
