"""Timing of rewards: our way in passes, ways interleaved in rounds, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.perspectives import Perspective
from tests.benchmarks.reward_models import Built

Rewards = dict[Perspective, Tensor]


def ours(built: Built, samples: Sequence[Phi3VSample], perspectives: Sequence[Perspective], batch: int) -> Rewards:
    """The network itself, in passes of ``batch`` images."""
    parts = [built.network(samples[i : i + batch], perspectives) for i in range(0, len(samples), batch)]
    return {p: torch.cat([part[p] for part in parts]) for p in perspectives}


def timed(device: torch.device, run: Callable[[], Rewards]) -> tuple[float, Rewards]:
    """Seconds until the device is done, and the rewards."""
    _wait(device)
    start = time.perf_counter()
    rewards = run()
    _wait(device)
    return time.perf_counter() - start, rewards


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, run: Callable[[], Rewards]) -> int:
    """Most memory held while running: on a GPU of this run, on a CPU of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    run()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def interleaved(device: torch.device, ways: Sequence[Callable[[], Rewards]], rounds: int) -> list[list[float]]:
    """Seconds by way and round. Every other round runs backwards, so that no way always comes first."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds):
        order = list(enumerate(ways))
        for index, run in order if number % 2 == 0 else reversed(order):
            seconds[index].append(timed(device, run)[0])
    return seconds


def largest_difference(a: Rewards, b: Rewards) -> float:
    return max(float((a[p].float() - b[p].float()).abs().max()) for p in a)
