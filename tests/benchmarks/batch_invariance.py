"""How far a reward moves with its batch, in bfloat16 and float32, on the CPU or a GPU.

``python -m tests.benchmarks.batch_invariance [--device cpu] [--dtype bfloat16] [--networks demo,qwen,llava,128x32]``

Per network: the standard deviation of the rewards (spread), the largest difference between a sample alone and the
same sample in any batch, and the largest difference from the same weights in float32. ``HxL`` is a random phi3v of
hidden size H with L layers. Its prompts of 1 to 300 tokens and pictures of 2 to 17 crops make padding the rule.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.llava_reward.config import ClipConfig
from model.llava_reward.scorer import LlavaRewardScorer
from model.perspectives import Perspective
from model.scorer import resolve
from tests.batch_mix import mixed_generations, values_of
from tests.benchmarks.reward_models import SCALES, Scale, build
from tests.llava_reward_bundles import ADAPTERS, write_bundle

BATCHES = 12
GRIDS = ((1, 1), (2, 1), (1, 4), (2, 3), (4, 4))
# Crops of 56 pixels give four image tokens each, so that most of the work is the language model's.
_CLIP = ClipConfig(128, 384, 5, 2, 56, 14, 1e-5)
Score = Callable[[Sequence[int]], np.ndarray]  # indices of samples, in one batch -> (samples, values)


def moved(score: Score, count: int, batches: int, most: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Each sample alone, and the largest difference from that in random batches of 2 to ``most``, per value.

    - returns: ``(count, values)`` and ``(values,)``
    """
    alone = np.concatenate([score([i]) for i in range(count)])
    rng = np.random.default_rng(0)
    largest = np.zeros(alone.shape[1])
    for number in range(batches):
        size = most if number == 0 else int(rng.integers(2, most + 1))
        chosen = rng.integers(0, count, size).tolist()
        largest = np.maximum(largest, np.abs(score(chosen) - alone[chosen]).max(axis=0))
    return alone, largest


def bundle_scores(folder: Path, device: str, dtype: str, count: int) -> Score:
    """The scorer itself, in its own passes, over a mix of real pictures and prompts."""
    scorer = LlavaRewardScorer(folder, device=device, dtype=dtype)
    prepared = scorer.preprocess(mixed_generations(count))

    def score(indices: Sequence[int]) -> np.ndarray:
        outputs = scorer.forward([prepared[i] for i in indices])
        return np.array([values_of(output, scorer.perspectives) for output in outputs])

    return score


def random_scores(hidden: int, layers: int, device: torch.device, dtype: torch.dtype, count: int) -> Iterator[Score]:
    """A random phi3v in ``dtype``, and then the same weights in float32; one perspective, one pass a batch."""
    heads = max(2, hidden // 64)
    config = replace(
        SCALES["cpu"].config, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
        rope=replace(SCALES["cpu"].config.rope, head_dim=hidden // heads),
    )  # fmt: skip
    wanted = [Perspective.OVERALL]
    network = build(Scale(config, _CLIP, 6, dtype), wanted, device).network
    samples = [_sample(config.vocab_size, i, device) for i in range(count)]
    for one in (network, copy.deepcopy(network).float()):

        def score(indices: Sequence[int], network: torch.nn.Module = one) -> np.ndarray:
            with torch.inference_mode():
                rewards = network([samples[i] for i in indices], wanted)[wanted[0]]
            return rewards.double().cpu().numpy()

        yield score


def _sample(vocabulary: int, seed: int, device: torch.device) -> Phi3VSample:
    draw = torch.Generator().manual_seed(seed)
    rows, columns = GRIDS[seed % len(GRIDS)]
    crops = torch.randn(1 + rows * columns, 3, _CLIP.image_size, _CLIP.image_size, generator=draw)
    side = _CLIP.merged_per_side
    slots = (rows * columns + 1) * side * side + 1 + (rows + 1) * side
    words = int(torch.randint(1, 301, (1,), generator=draw))
    text = torch.randint(vocabulary, (2 + words,), generator=draw)
    ids = torch.cat((text[:2], torch.full((slots,), -1), text[2:]))
    return Phi3VSample(ids.to(device), crops.to(device), (rows, columns))


def _scores_of(network: str, device: str, dtype: str, count: int, work: Path) -> tuple[Score, Score]:
    if "x" in network:
        hidden, layers = map(int, network.split("x"))
        in_dtype, in_float32 = random_scores(hidden, layers, torch.device(device), getattr(torch, dtype), count)
        return in_dtype, in_float32
    folder = resolve("demo") if network == "demo" else write_bundle(work / network, network, ADAPTERS[network])
    return bundle_scores(folder, device, dtype, count), bundle_scores(folder, device, "float32", count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="demo,qwen,llava,128x32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batches", type=int, default=BATCHES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        for network in args.networks.split(","):
            score, reference = _scores_of(network, args.device, args.dtype, args.samples, Path(work))
            alone, largest = moved(score, args.samples, args.batches)
            rounding = np.abs(alone - np.concatenate([reference([i]) for i in range(args.samples)])).max(axis=0)
            spread = alone.std(axis=0)
            print(
                f"{network} {args.dtype}: spread {spread.min():.2f} to {spread.max():.2f}, largest |reward| "
                f"{np.abs(alone).max():.2f}, batch to alone {largest.max():.2g} ({(largest / spread).max():.2%} of the "
                f"spread), to float32 {rounding.max():.2g} ({(rounding / spread).max():.2%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
