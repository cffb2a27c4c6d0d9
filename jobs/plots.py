"""Plots as PNG files: measures with intervals, ROC and precision-recall curves, reliability, a threshold's price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.figures import COLOURS, add_grid, new_figure, png
from model.evaluation.calibration import Bin, Calibration
from model.evaluation.labels import Curve
from model.evaluation.libraries import Bools, Floats
from model.evaluation.measures import Measure
from model.evaluation.thresholds import Threshold

_MAX_ROWS = 60  # of one picture; what is beyond stands in the table


def measures_plot(measures: Sequence[Measure], title: str, chance: float | None = None) -> bytes:
    """One line a measure: its value as a dot, its interval as a bar; ``chance``: what guessing would give."""
    # By question, so that scorers stand side by side.
    places = {key: i for i, key in enumerate(dict.fromkeys((one.group, one.metric) for one in measures))}
    ordered = sorted(measures, key=lambda one: places[one.group, one.metric])
    shown = [one for one in ordered if one.value is not None][:_MAX_ROWS]
    figure, [axes] = new_figure(8.0, 1.4 + 0.28 * len(shown))
    columns = list(dict.fromkeys(one.column for one in shown))
    for row, one in enumerate(shown):
        colour = COLOURS[columns.index(one.column) % len(COLOURS)]
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([one.value], [row], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(shown)), [_measure_title(one) for one in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    add_grid(axes, "x")
    axes.set_axisbelow(True)
    if chance is not None:
        axes.axvline(chance, color="#666666", linewidth=1, linestyle="--", label="chance")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=8)
    return _titled(figure, axes, title)


def _measure_title(one: Measure) -> str:
    group = f" ({one.group})" if one.group else ""
    text = f"{one.column.title}: {one.metric.replace('_', ' ')}{group}"
    return text if len(text) <= 70 else text[:69] + "\N{HORIZONTAL ELLIPSIS}"


def curves_plot(
    curves: Mapping[str, Curve], title: str, labels: tuple[str, str], area: str, chance: float | None
) -> bytes:
    """ROC or precision-recall curves, one a scorer.

    - labels: of x and y; area: what the area is called; chance: the level of a guess, or None for the diagonal
    """
    figure, [axes] = new_figure(6.0, 6.0)
    if chance is None:
        axes.plot([0, 1], [0, 1], color="#666666", linewidth=1, linestyle="--", label="chance")
    else:
        axes.axhline(chance, color="#666666", linewidth=1, linestyle="--", label=f"chance ({chance:.2f})")
    for colour, (name, curve) in zip(_cycle(len(curves)), curves.items(), strict=True):
        style = "default" if chance is None else "steps-pre"  # between two thresholds precision is not a straight line
        axes.plot(
            curve.x, curve.y, color=colour, linewidth=1.8, drawstyle=style, label=f"{name} ({area} {curve.area:.3f})"
        )
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    add_grid(axes)
    axes.legend(loc="lower right" if chance is None else "lower left", fontsize=8)
    return _titled(figure, axes, title)


def reliability_plot(bins: Sequence[Bin], title: str) -> bytes:
    """Probability against the share that people call safe, with 95 % intervals; on the diagonal it keeps its word."""
    figure, [axes] = new_figure(6.0, 6.0)
    predicted = [one.predicted for one in bins]
    observed = np.asarray([one.observed for one in bins])
    ends = np.asarray([[one.low, one.high] for one in bins]).T
    axes.plot([0, 1], [0, 1], color="#666666", linewidth=1, linestyle="--", label="perfectly calibrated")
    # Exact limits of a share hold the share itself, but for rounding.
    errors = np.maximum(0.0, np.stack([observed - ends[0], ends[1] - observed]))
    axes.errorbar(
        predicted, observed, yerr=errors, fmt="o-", color=COLOURS[0], ecolor=COLOURS[5], capsize=3, label="held out"
    )
    axes.set(xlabel="probability given", ylabel="share called safe by people", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    add_grid(axes)
    axes.legend(loc="upper left", fontsize=8)
    return _titled(figure, axes, title)


def calibration_plot(calibration: Calibration, is_safe: Bools, rewards: Floats, below: float, title: str) -> bytes:
    """The curve from reward to probability over the labelled rewards of both classes, with the threshold."""
    figure, [axes] = new_figure(7.5, 5.0)
    low, high = float(rewards.min()), float(rewards.max())
    edges = np.linspace(low, high, 31)
    counts = axes.twinx()
    names = (("called unsafe", ~is_safe, COLOURS[1]), ("called safe", is_safe, COLOURS[2]))
    for name, chosen, colour in names:
        counts.hist(rewards[chosen], bins=edges, color=colour, alpha=0.35, label=name)
    counts.set_ylabel("labelled images")
    grid = np.linspace(low, high, 400)
    axes.plot(grid, calibration(grid), color=COLOURS[0], linewidth=2, label="P(safe)")
    axes.axvline(below, color="#000000", linewidth=1.2, linestyle="--", label=f"threshold {below:.4g}")
    axes.set(xlabel="reward", ylabel="probability of being safe", ylim=(-0.02, 1.02))
    axes.set_zorder(counts.get_zorder() + 1)  # the curve before the bars
    axes.patch.set_visible(False)
    lines, titles = axes.get_legend_handles_labels()
    bars, bar_titles = counts.get_legend_handles_labels()
    axes.legend(
        lines + bars, titles + bar_titles, loc="upper left", bbox_to_anchor=(1.1, 1.0), fontsize=8, frameon=False
    )
    return _titled(figure, axes, title)


def threshold_plot(is_safe: Bools, rewards: Floats, chosen: Threshold, title: str) -> bytes:
    """Shares of unsafe images missed and of safe images flagged, at each threshold."""
    figure, [axes] = new_figure(7.5, 5.0)
    grid = np.linspace(float(rewards.min()), float(rewards.max()), 400)
    missed = [(rewards[~is_safe] >= one).mean() for one in grid]
    flagged = [(rewards[is_safe] < one).mean() for one in grid]
    axes.plot(grid, missed, color=COLOURS[1], linewidth=2, label="unsafe images missed")
    axes.plot(grid, flagged, color=COLOURS[2], linewidth=2, label="safe images flagged")
    axes.axhline(chosen.claim.alpha, color="#666666", linewidth=1, linestyle=":", label=f"alpha {chosen.claim.alpha:g}")
    axes.axvline(chosen.below, color="#000000", linewidth=1.2, linestyle="--", label=f"threshold {chosen.below:.4g}")
    axes.set(xlabel="threshold (reward)", ylabel="share of labelled images", ylim=(-0.02, 1.02))
    add_grid(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8, frameon=False)
    return _titled(figure, axes, title)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _titled(figure: Any, axes: Any, title: str) -> bytes:
    axes.set_title(title, fontsize=11, pad=22 if axes.get_legend() is not None else 10)
    return png(figure)
