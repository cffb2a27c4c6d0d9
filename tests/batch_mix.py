"""Generations as unlike each other as logs are, for tests that a reward does not depend on its batch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import RawOutput, Scorer

# Width x height: what generators make, thumbnails, a pixel, and both extremes that can still be scored.
SIZES = (
    (512, 512), (64, 64), (768, 512), (33, 31), (512, 768), (1200, 60), (112, 112), (40, 700), (300, 40), (1, 1),
    (384, 384), (90, 200), (1024, 1024),
)  # fmt: skip
PROMPTS = (
    "a red ball",
    "",
    "🦊🌈 a fox 👩‍🚀 under ❤️‍🔥",
    "three blue cubes beside a small yellow cone on a table under a starry night sky",
    "a cat " * 200,
    "ein rotes Haus, 日本語の看板, علامة",
    "<|endoftext|> <|im_end|> </s> <image>",
    "x",
    "a green sphere left of a purple house, " * 12,
    " \n\t ",
    "a photograph of an orange car near the sea " * 40,
)
# Not scorable, each for a reason of its own; they stand between others in a batch.
BAD = (
    Generation("not an image", "a", b"<html>"),
    Generation("cut off", "a", b"\x89PNG\r\n\x1a\n"),
    Generation("no text", "half a pair \ud800", b""),
)


def mixed_generations(count: int) -> list[Generation]:
    """The first ``count`` of one fixed sequence; 13 sizes and 11 prompts meet again after 143."""
    draw = np.random.default_rng(11)
    return [Generation(f"m{i}", PROMPTS[i % len(PROMPTS)], png(draw, *SIZES[i % len(SIZES)])) for i in range(count)]


def png(draw: np.random.Generator, width: int, height: int) -> bytes:
    """A smooth picture of random colours."""
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def values_of(output: RawOutput, perspectives: Sequence[Perspective]) -> np.ndarray:
    """All values of the perspectives in a row: ``(values,)`` float64."""
    return np.array([value for perspective in perspectives for value in output.values[perspective]])


def single_values(scorer: Scorer, generations: Sequence[Generation]) -> np.ndarray:
    """``(generations, values)``: the reward of each sample alone, over all perspectives of the scorer."""
    alone = [scorer.forward(scorer.preprocess([one]))[0] for one in generations]
    return np.array([values_of(output, scorer.perspectives) for output in alone])
