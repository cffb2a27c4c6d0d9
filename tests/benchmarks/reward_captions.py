"""Captions per second of one picture (phi3v): what they share computed once, against every caption by itself.

``python -m tests.benchmarks.reward_captions [--scale cpu|full] [--device cpu|cuda] [--size 1024x1024]``
``[--captions 1,8,32] [--apart 4] [--perspectives 4] [--batch 1] [--rounds 5] [--threads 2]``

Random weights as in ``reward_speed``, preprocessing left out. Both ways are the network itself: with the prefix, all
captions are one pass whose samples hold one picture; without, each holds a copy, in passes of ``--batch`` samples.
Of the latter at most ``--apart`` are run: each costs the same, so they give the rate of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.llava_reward.backbones.prefix import tokens_before
from tests.benchmarks.reward_models import Built
from tests.benchmarks.reward_options import begin, noise_pictures, reward_parser
from tests.benchmarks.reward_timing import interleaved, largest_difference, ours


def captions_of(sample: Phi3VSample, count: int, vocabulary: int) -> list[Phi3VSample]:
    """Samples of one picture with other text of equal length behind it."""
    before, generator = tokens_before(sample.input_ids), torch.Generator().manual_seed(1)
    length = len(sample.input_ids) - before
    texts = torch.randint(vocabulary, (count, length), generator=generator).to(sample.input_ids.device)
    return [dataclasses.replace(sample, input_ids=torch.cat((sample.input_ids[:before], text))) for text in texts]


def compare(built: Built, sample: Phi3VSample, count: int, args: Any) -> None:
    """Both ways side by side for ``count`` captions."""
    together = captions_of(sample, count, built.scale.config.vocab_size)
    apart = [dataclasses.replace(item, crops=item.crops.clone()) for item in together[: args.apart]]
    ways = (
        lambda: ours(built, together, args.perspectives, count),
        lambda: ours(built, apart, args.perspectives, args.batch),
    )
    joined, single = (way() for way in ways)  # also the warm-up
    difference = largest_difference({p: values[: len(apart)] for p, values in joined.items()}, single)
    seconds = interleaved(args.device, ways, args.rounds)
    rates = [[n / s for s in way] for n, way in zip((count, len(apart)), seconds, strict=True)]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    medians = [statistics.median(way) for way in rates]
    print(
        f"{count:>3} captions: with prefix {medians[0]:.3f} captions/s, without {medians[1]:.3f}; ratio: median "
        f"{statistics.median(ratios):.2f} of {', '.join(f'{r:.2f}' for r in ratios)}; "
        f"largest reward difference {difference:.1e}",
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = reward_parser(__doc__)
    parser.add_argument("--captions", default="1,8,32", help="how many, each number by itself")
    parser.add_argument("--apart", type=int, default=4, help="most captions of a round without the prefix")
    parser.add_argument("--batch", type=int, default=1, help="samples of a pass without the prefix")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    built = begin(args)
    [sample] = noise_pictures(built, args, 1)
    before, length = tokens_before(sample.input_ids), len(sample.input_ids)
    print(f"{args.size}: {before} tokens before a caption of {length - before}; {len(args.perspectives)} heads")
    for count in map(int, args.captions.split(",")):
        compare(built, sample, count, args)


if __name__ == "__main__":
    main()
