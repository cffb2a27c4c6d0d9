"""Rewards per second of LLaVA-Reward (phi3v) against the straightforward way, interleaved in one run.

``python -m tests.benchmarks.reward_speed [--scale cpu|full] [--device cpu|cuda] [--size 1024x1024]``
``[--perspectives 4] [--batch N] [--rounds 5] [--threads 2] [--steps]``
``[--mode int8|fp8|few_crops]``: instead, that mode against exact rewards, both in our way.

Random weights, real crop and token counts; preprocessing is not part of it. The straightforward way is the released
one: a full forward per perspective, 17 crops always, every position in the last layer and in SkipCA, LoRA unmerged,
one image at a time. ``--scale cpu`` narrows the network so that tower and language model keep their share of the
work; ``--scale full`` has the published sizes, in bfloat16. Needs neither weights nor Ray.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.modes import EXACT, MODES
from model.perspectives import Perspective
from tests.benchmarks.mode_speed import compare_mode
from tests.benchmarks.reward_flops import flops_ours, flops_straightforward
from tests.benchmarks.reward_models import STEPS, Built, rewards_by_steps
from tests.benchmarks.reward_options import begin, noise_pictures, reward_parser
from tests.benchmarks.reward_shares import print_shares
from tests.benchmarks.reward_timing import Rewards, interleaved, largest_difference, ours, peak_bytes

PEAK_FLOPS_H200 = 790e12  # bfloat16, what large matrix products reach; the roofline of the floors


def one_by_one(
    built: Built, samples: Sequence[Phi3VSample], perspectives: Sequence[Perspective], steps: Sequence[str]
) -> Rewards:
    """One image at a time with some of the steps; none of them is the straightforward way."""
    parts = [rewards_by_steps(built, sample, perspectives, steps) for sample in samples]
    return {p: torch.cat([part[p] for part in parts]) for p in perspectives}


def print_flops(built: Built, sample: Phi3VSample, perspectives: int, rates: tuple[float, float], *, gpu: bool) -> None:
    """Work by component and how much of it is done a second; ``rates``: images/s of ours and straightforward."""
    tokens, length = int((sample.input_ids < 0).sum()), len(sample.input_ids)
    plain = {n: perspectives * v for n, v in flops_straightforward(built.scale, tokens, length).items()}
    mine = flops_ours(built.scale, len(sample.crops), tokens, length, perspectives)
    print("GFLOP an image       straightforward   ours")
    for name in (*plain, "total"):
        pair = [sum(part.values()) if name == "total" else part[name] for part in (plain, mine)]
        print(f"  {name:<18} {pair[0] / 1e9:>12.1f} {pair[1] / 1e9:>12.1f}")
    totals = sum(mine.values()), sum(plain.values())
    print(f"the work alone allows {totals[1] / totals[0]:.3f}x")
    for name, rate, total in zip(("ours", "straightforward"), rates, totals, strict=True):
        share = f", {rate * total / PEAK_FLOPS_H200:.1%} of 790 TFLOP/s" if gpu else ""
        print(f"  {name}: {rate * total / 1e9:.1f} GFLOP/s{share}")


def compare(built: Built, samples: list[Phi3VSample], args: Any) -> None:
    """The two ways side by side."""
    device: torch.device = args.device

    def new() -> Rewards:
        return ours(built, samples, args.perspectives, args.batch)

    def old() -> Rewards:
        return one_by_one(built, samples, args.perspectives, ())

    peaks = [peak_bytes(device, way) for way in (new, old)]  # also the warm-up
    difference = largest_difference(new(), old())
    new_s, old_s = interleaved(device, (new, old), args.rounds)
    rates = [len(samples) / statistics.median(s) for s in (new_s, old_s)]
    ratios = [b / a for a, b in zip(new_s, old_s, strict=True)]
    print(f"images/s: ours {rates[0]:.3f}, straightforward {rates[1]:.3f}")
    shown = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"ratio: median {statistics.median(ratios):.3f} of pairs {shown}")
    print(f"largest reward difference: {difference:.2e}")
    print(
        f"peak memory: ours {peaks[0] / 2**30:.2f} GiB, straightforward {peaks[1] / 2**30:.2f} GiB (weights included)"
    )
    print_flops(built, samples[0], len(args.perspectives), (rates[0], rates[1]), gpu=device.type == "cuda")
    print_shares(built, device, new)


def print_steps(built: Built, samples: list[Phi3VSample], args: Any) -> None:
    """What each step gives when added to those before it."""

    def way(count: int) -> Callable[[], Rewards]:
        return lambda: one_by_one(built, samples, args.perspectives, STEPS[:count])

    seconds = interleaved(args.device, [way(count) for count in range(len(STEPS) + 1)], args.rounds)
    medians = [statistics.median(s) / len(samples) for s in seconds]
    for name, now, before in zip(("straightforward", *STEPS), medians, [medians[0], *medians], strict=False):
        print(f"  {name:<22} {1000 * now:>9.1f} ms an image  {before / now:.3f}x  (so far {medians[0] / now:.3f}x)")


def parse_args() -> argparse.Namespace:
    parser = reward_parser(__doc__)
    parser.add_argument("--images", type=int, default=1, help="images of one timed call")
    parser.add_argument("--batch", type=int, default=1, help="images of one of our passes")
    parser.add_argument("--mode", choices=MODES, default=EXACT, help="measure this mode against exact rewards instead")
    parser.add_argument("--steps", action="store_true", help="measure each step by itself, too")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    built = begin(args)
    samples = noise_pictures(built, args, args.images)
    crops, tokens = len(samples[0].crops), int((samples[0].input_ids < 0).sum())
    print(f"{args.size}: {crops} crops, {tokens} image tokens, no padding; {len(args.perspectives)} perspectives")
    if args.mode != EXACT:
        compare_mode(built, samples, args)
        return
    compare(built, samples, args)
    if args.steps:
        print_steps(built, samples, args)


if __name__ == "__main__":
    main()
