"""The checkpoints that one may name: those that ship with the code, and those that the authors publish.

Reads two kinds of JSON file; loads nothing and asks no server. What was not verified is marked as such.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.scorer import SHIPPED

PUBLISHED = Path(__file__).parent / "llava_reward" / "published.json"


@dataclass(frozen=True)
class ListedCheckpoint:
    """One line of ``assay checkpoints``.

    - perspectives: names; licence: of its own weights, None where it is not known
    - location: what ``scorer.json`` or ``load`` takes; of a published one the repository (and folder, if known),
      to which the user adds a commit
    - is_verified: that somebody looked at the weights behind this line
    """

    name: str
    source: str
    family: str
    backbone: str
    perspectives: tuple[str, ...]
    licence: str | None
    backbone_licence: str
    location: str
    is_verified: bool
    note: str


def list_checkpoints() -> list[ListedCheckpoint]:
    """Shipped ones first, each group in order of its source."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    folders = sorted(path.parent for path in SHIPPED.glob("*/scorer.json"))
    return [*map(_shipped, folders), *(_published(one, published["backbones"]) for one in published["checkpoints"])]


def notes() -> list[str]:
    """What holds for all published ones."""
    found: list[str] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["notes"]
    return found


def _shipped(folder: Path) -> ListedCheckpoint:
    values = json.loads((folder / "scorer.json").read_text(encoding="utf-8"))
    return ListedCheckpoint(
        name=folder.name,
        source="shipped",
        family=values["family"],
        backbone="its own, tiny",
        perspectives=tuple(values["adapters"]),
        licence=values["licence"],
        backbone_licence=values["licence"],
        location=folder.name,
        is_verified=True,
        note="for demonstrations" if values["is_trained"] else "untrained: its rewards mean nothing",
    )


def _published(values: dict[str, Any], backbones: dict[str, dict[str, str]]) -> ListedCheckpoint:
    backbone = backbones[values["family"]]
    folder = values["folder"]
    return ListedCheckpoint(
        name=values["name"],
        source="published",
        family=values["family"],
        backbone=backbone["repo"],
        perspectives=(values["perspective"],),
        licence=values["licence"],
        backbone_licence=backbone["licence"],
        location=f"{values['repo']}/{folder}" if folder else values["repo"],
        is_verified=values["is_verified"],
        note=values["note"],
    )
