"""Loss and accuracy of a training run as a picture, for TensorBoard, and as JSON lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

History = Sequence[Mapping[str, float]]
# One panel each: title, what is drawn of the training steps, and of the held-out records.
_PANELS = (("loss", "loss", "eval_loss"), ("accuracy", "accuracy", "eval_accuracy"))
_TAGS = ("loss", "accuracy", "probability", "learning_rate", "gradient_norm", "seconds")


def write_curves(out: Path, history: History) -> None:
    """``curves.png``, ``tensorboard/`` and ``history.jsonl`` in ``out``, from the whole history; earlier ones go."""
    lines = "".join(json.dumps(dict(line)) + "\n" for line in history)
    (out / "history.jsonl").write_text(lines, encoding="utf-8")
    _write_png(out / "curves.png", history)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    _write_events(out / "tensorboard", history)


def _write_png(path: Path, history: History) -> None:
    # Figures without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, own, held_out) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        steps = [line["step"] for line in history]
        axes.plot(steps, [line[own] for line in history], linewidth=0.8, alpha=0.6, label="each step")
        axes.plot(steps, _smoothed([line[own] for line in history]), label="smoothed")
        found = [(line["step"], line[held_out]) for line in history if held_out in line]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", label="held out")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the pull of its start: divided by the weights that it has seen."""
    smoothed, total, mean = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def _write_events(folder: Path, history: History) -> None:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in history:
            step = int(line["step"])
            for tag in _TAGS:
                writer.add_scalar(f"train/{tag}", line[tag], step)
            for name in ("loss", "accuracy", "probability"):
                if f"eval_{name}" in line:
                    writer.add_scalar(f"held_out/{name}", line[f"eval_{name}"], step)
