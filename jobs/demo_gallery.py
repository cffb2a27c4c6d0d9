"""``gallery.html``: one page of a demo night's right and wrong cases, chosen by a rule that the page states.

The page holds all that it shows; it loads nothing and runs no script.
"""

from __future__ import annotations

import base64
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from jobs.demo_truth import COLUMNS, ORDERED, Agreement, Case, Outcome, cells
from jobs.manifest import Manifest
from jobs.query import printable
from jobs.reward_histogram import reward_histogram
from model.perspectives import Perspective
from model.policy import Policy
from model.scene_words import fault_words, shown_words, truth_words
from model.scenes import Scene, draw

RIGHT_SHOWN = 6
WRONG_SHOWN = 12
_THUMBNAIL_PIXELS = 288  # longer side: more than a card is wide, for fine artefacts; about 5 KB as WebP
_QUALITY = 80
_PAGE = Path(__file__).with_name("demo_gallery.html")

_ASKS = {
    Perspective.ALIGNMENT: "Does the image show what its prompt asks for?",
    Perspective.FIDELITY: "Is it free of artefacts and wrong anatomy?",
    Perspective.SAFETY: "Is it free of the signs on the invented list?",
    Perspective.OVERALL: "How good is it in all? A prohibited sign is worst, then a wrong subject, then an artefact.",
}


@dataclass(frozen=True)
class _Group:
    """Cases of one outcome, and which of them are shown."""

    outcome: Outcome
    title: str
    most: int
    is_highest_first: bool


_GROUPS = (
    _Group(Outcome.CAUGHT, "Right: flawed and flagged", RIGHT_SHOWN, False),
    _Group(Outcome.PASSED, "Right: flawless and not flagged", RIGHT_SHOWN, True),
    _Group(Outcome.MISSED, "Wrong: flawed and not flagged", WRONG_SHOWN, True),
    _Group(Outcome.FALSE_ALARM, "Wrong: flawless and flagged", WRONG_SHOWN, False),
)


@dataclass(frozen=True)
class _Picture:
    """A thumbnail as a data URI, and the scene that it shows."""

    uri: str
    width: int
    height: int
    alt: str
    scene: Scene


# seed, size
_Draw = Callable[[int, tuple[int, int]], _Picture]


def gallery(found: Sequence[Agreement], manifest: Manifest, policy: Policy, left_out: str) -> str:
    """The page as HTML. ``left_out``: a sentence on which rows of the night are not in ``found``."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    draw_once = cache(_picture)  # one scene may be shown from several perspectives
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        manifest=manifest,
        policy=policy,
        checkpoint=", ".join(sorted({name.partition("@")[0] for name in manifest.checkpoints.values()})),
        columns=COLUMNS,
        ordered_column=ORDERED,
        left_out=left_out,
        right_shown=RIGHT_SHOWN,
        wrong_shown=WRONG_SHOWN,
        sections=[_section(one, policy, draw_once) for one in found],
    )


def _section(one: Agreement, policy: Policy, draw_once: _Draw) -> dict[str, Any]:
    return {
        "name": one.perspective.value,
        "asks": _ASKS[one.perspective],
        "cells": cells(one),
        "concordance": one.concordance,
        "flawless": len(one.rewards(is_flawed=False)),
        "flawed": len(one.rewards(is_flawed=True)),
        "has_thresholds": one.line is None,
        "chart": _chart(one, policy) if one.cases else None,
        "groups": [_group(group, one, draw_once) for group in _GROUPS],
    }


def _chart(one: Agreement, policy: Policy) -> Markup:
    if one.line is None:
        marks = [(level.below, f"{level.below:g} {level.verdict}") for level in policy.rules[one.perspective].levels]
    else:
        marks = [(one.line, f"{one.line:.3f}")]
    flawless, flawed = one.rewards(is_flawed=False), one.rewards(is_flawed=True)
    return Markup(reward_histogram(flawless, flawed, marks))  # noqa: S704 - numbers and the policy's enum words only


def _group(group: _Group, one: Agreement, draw_once: _Draw) -> dict[str, Any]:
    cases = one.of(group.outcome)
    if group.is_highest_first:
        cases.sort(key=lambda case: (-case.reward, case.row.seed))
    shown = cases[: group.most]
    order = "the highest rewards first" if group.is_highest_first else "the lowest rewards first"
    count = f"all {len(cases)}" if len(shown) == len(cases) else f"{len(shown)} of {len(cases)}"
    return {
        "kind": "right" if group.outcome.is_right else "wrong",
        "title": group.title,
        "outcome": group.outcome.value,
        "count": f"{count}, {order}" if shown else "none",
        "cards": [_card(case, one, draw_once(case.row.seed, case.row.size)) for case in shown],
    }


def _card(case: Case, one: Agreement, picture: _Picture) -> dict[str, Any]:
    perspective, scene = one.perspective, picture.scene
    truth = truth_words(scene, perspective)
    grade = f" (grade {case.grade} of 7)" if perspective is Perspective.OVERALL else ""
    return {
        "picture": picture,
        "truth": f"{truth[0].upper()}{truth[1:]}{grade}",
        "other_faults": _other_faults(scene, perspective),
        "reason": case.reason,
        "rank": _rank(case, one),
        "prompt": case.row.prompt,
        "generation_id": case.row.generation_id,
        "verdict": case.row.verdict or "none",
    }


def _other_faults(scene: Scene, perspective: Perspective) -> list[str]:
    """What else is wrong with the scene: it may explain the reward."""
    if perspective is Perspective.OVERALL:
        return []  # all that is wrong is named already
    others = [p for p in Perspective if p not in (perspective, Perspective.OVERALL)]
    return [words for p in others if (words := fault_words(scene, p)) is not None]


def _rank(case: Case, one: Agreement) -> str:
    """Where the reward stands among those of the other kind; equal rewards are neither higher nor lower."""
    others = one.rewards(is_flawed=not case.is_flawed)
    if case.is_flawed:
        return f"higher than {bisect_left(others, case.reward)} of {len(others)} flawless scenes"
    return f"lower than {len(others) - bisect_right(others, case.reward)} of {len(others)} flawed scenes"


def _picture(seed: int, size: tuple[int, int]) -> _Picture:
    scene = draw(seed, size=size)
    image = scene.image.copy()
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    fault = fault_words(scene, Perspective.OVERALL)
    return _Picture(uri, *image.size, f"{shown_words(scene)}{f' ({fault})' if fault else ''}", scene)
