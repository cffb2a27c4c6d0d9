"""Images per second of a checkpoint on all its perspectives, preprocessing included.

``python -m tests.benchmarks.scorer_throughput [--checkpoint demo] [--threads 2] [--images 256] [--batch 32]``

Pictures are smooth 512x512 JPEGs made here, prompts are those of drawn scenes. Each round scores all
images; the table shows every round, since a shared machine is noisy, and the median is the result.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time

import numpy as np
import torch
from PIL import Image

from model.scenes import asked_spec, prompt_of
from model.schema import Generation
from model.scorer import Scorer, load

ROUNDS = 5


def make_generations(count: int) -> list[Generation]:
    """Distinct pictures and prompts, equal in every run."""
    draw = np.random.default_rng(0)
    return [Generation(str(i), prompt_of(i, asked_spec(i)), _jpeg(draw)) for i in range(count)]


def _jpeg(draw: np.random.Generator) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def time_round(scorer: Scorer, generations: list[Generation], batch: int) -> tuple[float, float]:
    """Seconds of preprocessing and of everything behind it."""
    preprocess_s = rest_s = 0.0
    for start in range(0, len(generations), batch):
        before = time.perf_counter()
        prepared = scorer.preprocess(generations[start : start + batch])
        between = time.perf_counter()
        records = scorer.postprocess(scorer.forward(prepared))
        rest_s += time.perf_counter() - between
        preprocess_s += between - before
        if any(record.error for record in records):
            raise RuntimeError("a benchmark image could not be scored")
    return preprocess_s, rest_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scorer = load(args.checkpoint, device=args.device)
    generations = make_generations(args.images)
    time_round(scorer, generations[: args.batch], args.batch)  # warm-up: allocators and thread pools
    rates = []
    for number in range(ROUNDS):
        preprocess_s, rest_s = time_round(scorer, generations, args.batch)
        rates.append(len(generations) / (preprocess_s + rest_s))
        per_image_ms = [f"{1000 * s / len(generations):.1f}" for s in (preprocess_s, rest_s)]
        print(
            f"round {number}: {rates[-1]:6.1f} images/s  preprocess {per_image_ms[0]} ms  forward {per_image_ms[1]} ms"
        )
    shown = ", ".join(scorer.perspectives)
    print(f"{args.checkpoint} on {args.threads} threads, {shown}: median {statistics.median(rates):.1f} images/s")


if __name__ == "__main__":
    main()
