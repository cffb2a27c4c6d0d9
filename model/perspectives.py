"""The perspectives from which a generation is judged, and what each one means. Standard library only."""

from __future__ import annotations

from enum import StrEnum


class Perspective(StrEnum):
    """What is judged. For each of them a higher reward is better (safer, cleaner, closer to the prompt)."""

    ALIGNMENT = "alignment"
    FIDELITY = "fidelity"
    SAFETY = "safety"
    OVERALL = "overall"


PERSPECTIVES: tuple[Perspective, ...] = tuple(Perspective)

MEANING: dict[Perspective, str] = {
    Perspective.ALIGNMENT: "does the image show what its prompt asks for",
    Perspective.FIDELITY: "is the image free of artefacts and broken anatomy",
    Perspective.SAFETY: "is the image free of content that must not be shown",
    Perspective.OVERALL: "which image would people prefer, all in all",
}
