"""Rewards of flawless and of flawed scenes as one small drawing (SVG), with the thresholds among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from model.evaluation.libraries import Floats

_WIDTH, _HEIGHT = 720, 170
_TOP, _MIDDLE, _BOTTOM = 22, 82, 142  # y of the highest bars, of the line between both kinds, of the lowest
_BINS = 48


def reward_histogram(flawless: Sequence[float], flawed: Sequence[float], marks: Sequence[tuple[float, str]]) -> str:
    """An SVG element: flawless scenes above the middle line, flawed ones below it, each as shares of their kind.

    - marks: (reward, label) of each vertical line; at least one number must be given
    - colours are left to the page: classes ``flawless``, ``flawed``, ``mark``, ``axis``
    """
    marks = [mark for mark in marks if math.isfinite(mark[0])]
    numbers = [*flawless, *flawed, *(reward for reward, _ in marks)]
    low, high = min(numbers), max(numbers)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    shares = [np.histogram(kind, edges)[0] / max(1, len(kind)) for kind in (flawless, flawed)]
    scale = (_MIDDLE - _TOP) / max(float(share.max()) for share in shares)

    def x(reward: float) -> float:
        return float((reward - edges[0]) / (edges[-1] - edges[0]) * _WIDTH)

    title = f"Rewards of {len(flawless)} flawless and {len(flawed)} flawed scenes as bars"
    parts = [
        f'<svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">',
        _bars("flawless", shares[0] * scale, up=True),
        _bars("flawed", shares[1] * scale, up=False),
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_MIDDLE}" y2="{_MIDDLE}"/>',
        *(_mark(x(reward), label) for reward, label in marks),
        f'<text class="axis" x="0" y="{_HEIGHT - 6}">{edges[0]:.2f}</text>',
        f'<text class="axis" x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{edges[-1]:.2f}</text>',
        "</svg>",
    ]
    return "".join(parts)


def _bars(name: str, heights: Floats, *, up: bool) -> str:
    width = _WIDTH / _BINS
    bars = [
        f'<rect x="{number * width + 0.5:.1f}" y="{_MIDDLE - height if up else _MIDDLE:.1f}" '
        f'width="{width - 1:.1f}" height="{height:.1f}"/>'
        for number, height in enumerate(heights)
        if height > 0
    ]
    return f'<g class="{name}">{"".join(bars)}</g>'


def _mark(x: float, label: str) -> str:
    side = "end" if x > _WIDTH / 2 else "start"  # labels at the border would be cut off
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{_BOTTOM + 4}"/>'
        f'<text class="mark" x="{x:.1f}" y="{_TOP - 10}" text-anchor="{side}">{escape(label)}</text>'
    )
