"""Speed of the modes of ``model/modes.py`` against exact rewards; the part of ``reward_speed`` behind ``--mode``.

Same network, same pictures, interleaved. With fewer crops a picture is a smaller noise picture, so only the modes
that round have a reward difference worth a line.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.llava_reward.quantized import check_device, quantize
from model.modes import FEW_CROPS, ROUNDED_MODES, crops_of
from tests.benchmarks.reward_models import SLOTS, Built, make_sample
from tests.benchmarks.reward_timing import Rewards, interleaved, largest_difference, ours, peak_bytes


def in_mode(built: Built, mode: str) -> Built:
    """The same weights in the mode; those of ``built`` stay as they are."""
    if mode not in ROUNDED_MODES:
        return built
    network = copy.deepcopy(built.network)
    quantize(network, mode)
    return dataclasses.replace(built, network=network)


def _print_ratio(name: str, mode_s: Sequence[float], exact_s: Sequence[float]) -> None:
    ratios = [exact / mode for mode, exact in zip(mode_s, exact_s, strict=True)]
    shown = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"{name}: median {statistics.median(ratios):.3f} of pairs {shown}")


def compare_mode(built: Built, samples: Sequence[Phi3VSample], args: Any) -> None:
    """Exact rewards and those of ``args.mode`` side by side, both in our way."""
    device: torch.device = args.device
    check_device(args.mode, device)
    other = in_mode(built, args.mode)
    fewer = list(samples)
    if args.mode == FEW_CROPS:
        crops = crops_of(args.mode, "phi3v", SLOTS - 1)
        fewer = [make_sample(built, *args.size, device, seed, crops) for seed in range(len(samples))]
        tokens = int((fewer[0].input_ids < 0).sum())
        print(f"{args.mode}: {len(fewer[0].crops)} crops, {tokens} image tokens")

    worked_s: tuple[list[float], list[float]] = ([], [])  # processor time: what other work on a machine changes least

    def way(index: int) -> Rewards:
        start = time.process_time()
        rewards = ours(*((other, fewer), (built, samples))[index], args.perspectives, args.batch)
        worked_s[index].append(time.process_time() - start)
        return rewards

    ways = (partial(way, 0), partial(way, 1))
    peaks = [peak_bytes(device, one) for one in ways]  # also the warm-up
    mode_s, exact_s = interleaved(device, ways, args.rounds)
    rates = [len(samples) / statistics.median(s) for s in (mode_s, exact_s)]
    print(f"images/s: {args.mode} {rates[0]:.3f}, exact {rates[1]:.3f}")
    _print_ratio("ratio", mode_s, exact_s)
    if device.type == "cpu":
        _print_ratio("ratio of processor time", *(seconds[1:] for seconds in worked_s))
    if args.mode in ROUNDED_MODES:
        print(f"largest reward difference: {largest_difference(*(one() for one in ways)):.2e}")
    print(f"peak memory: {args.mode} {peaks[0] / 2**30:.2f} GiB, exact {peaks[1] / 2**30:.2f} GiB, both networks held")
