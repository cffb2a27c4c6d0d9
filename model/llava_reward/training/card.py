"""``MODEL_CARD.md``: what a perspective was trained on, with which settings, and how it went. No prompt is quoted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.llava_reward.training.objective import SYMMETRIC, Objective
from model.llava_reward.training.writer import Trained
from model.meaning import HeadTraining

_NOTES = {
    HeadTraining.CLS: "Trained on labels: sigmoid(reward) is the probability of label 1, as far as the data reach.",
    HeadTraining.BT: "Trained on pairs: only differences of rewards mean something; a threshold needs calibration.",
    None: "A general-preference head: it gives vectors, which mean something beside each other only.",
}
_SYMMETRIC_NOTE = "This loss does not know which image is the better one: do not read preferences off this head."


@dataclass(frozen=True)
class DataFacts:
    """What is told of a set of records.

    - source: as given; sha256: of the records; skipped: records left out because an image could not be used
    - majority: share of the commoner label among those that are used, in [0.5, 1]; None for pairs
    """

    source: str
    kind: str
    records: int
    sha256: str
    skipped: int = 0
    majority: float | None = None


def model_card(
    name: str,
    trained: Trained,
    *,
    data: DataFacts,
    held_out: DataFacts | None,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    temperature: float | None,
    groups: Mapping[str, tuple[int, float]],
    versions: Mapping[str, str],
) -> str:
    """Markdown.

    - temperature: what rewards were divided by after the last step, where one was fitted
    - groups: per group its parameters, and the root mean square of how far they moved
    """
    last = history[-1]
    lines = [
        f"# {name}",
        "",
        f"Perspective `{trained.perspective}`, {trained.base.family}, loss `{trained.objective.name}`. "
        f"{_note(trained.objective)}",
        "",
        f"Backbone: `{trained.base.entry}` (licence as stated there: {trained.base.licence}).",
        "",
        "## Data",
        "",
        *_data_lines("trained on", data),
        *(_data_lines("held out", held_out) if held_out else ["- held out: nothing, so that no accuracy below is one"]),
        "",
        "## Metrics",
        "",
        f"{int(last['step'])} steps, {last['epoch']:.2f} epochs. The first row is of the last steps' own records.",
        "",
        "| | loss | accuracy | probability of the right answer |",
        "|---|---|---|---|",
        _row("training", _mean(history[-20:])),
        *([_row("held out", {key: last[f"eval_{key}"] for key in _KEYS})] if "eval_loss" in last else []),
        *_majority_row(held_out or data),
        *_temperature_lines(temperature),
        "",
        "## What was trained",
        "",
        "| group | parameters | moved by (root mean square) |",
        "|---|---|---|",
        *(f"| {group} | {count} | {moved:.3g} |" for group, (count, moved) in sorted(groups.items())),
        "",
        "Frozen: image tower, embeddings, weights of the language model.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(dict(config), indent=1, ensure_ascii=False),
        "```",
        "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


_KEYS = ("loss", "accuracy", "probability")


def _temperature_lines(temperature: float | None) -> list[str]:
    if temperature is None:
        return []
    said = f"After the last step rewards were divided by {temperature:.4g}, the temperature with which the held-out"
    return ["", f"{said} records are likeliest; losses, probabilities and moves on this page are from before."]


def _note(objective: Objective) -> str:
    return _SYMMETRIC_NOTE if objective.name == SYMMETRIC else _NOTES[objective.training]


def _data_lines(what: str, data: DataFacts) -> list[str]:
    skipped = f"; {data.skipped} left out because an image could not be used" if data.skipped else ""
    return [f"- {what}: `{data.source}`, {data.records} {data.kind} records{skipped}", f"  sha256 `{data.sha256}`"]


def _majority_row(data: DataFacts) -> list[str]:
    """What an accuracy must be compared with: that of a head which has learnt nothing but which label is commoner."""
    return [] if data.majority is None else [f"| always the commoner label | | {data.majority:.4f} | |"]


def _mean(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(line[key] for line in lines) / len(lines) for key in _KEYS}


def _row(name: str, values: Mapping[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{values[key]:.4f}" for key in _KEYS) + " |"
