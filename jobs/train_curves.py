"""Loss and accuracy of a training run as a picture, for TensorBoard, and as JSON lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.figures import add_grid, new_figure, png
from model import storage

History = Sequence[Mapping[str, float]]
# One panel each: title, what is drawn of the training steps, and of the held-out records.
_PANELS = (("loss", "loss", "eval_loss"), ("accuracy", "accuracy", "eval_accuracy"))
_TAGS = ("loss", "accuracy", "probability", "learning_rate", "gradient_norm", "seconds")


def write_curves(out: Path, history: History) -> None:
    """``curves.png``, ``tensorboard/`` and ``history.jsonl`` in ``out``, from the whole history; earlier ones go."""
    lines = "".join(json.dumps(dict(line)) + "\n" for line in history)
    storage.put(str(out / "history.jsonl"), lines.encode())
    storage.put(str(out / "curves.png"), _picture(history))
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    _write_events(out / "tensorboard", history)


def _picture(history: History) -> bytes:
    figure, row = new_figure(10, 4, panels=len(_PANELS))
    for axes, (title, own, held_out) in zip(row, _PANELS, strict=True):
        steps = [line["step"] for line in history]
        axes.plot(steps, [line[own] for line in history], linewidth=0.8, alpha=0.6, label="each step")
        axes.plot(steps, _smoothed([line[own] for line in history]), label="smoothed")
        found = [(line["step"], line[held_out]) for line in history if held_out in line]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", label="held out")
        axes.set(title=title, xlabel="step")
        add_grid(axes)
        axes.legend()
    return png(figure)


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
