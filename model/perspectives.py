"""The perspectives from which a generation is judged, and what each one means. Standard library only."""

from __future__ import annotations

from enum import StrEnum


class Perspective(StrEnum):
    """What is judged. For each of them a higher reward is better (safer, cleaner, closer to the prompt)."""

    ALIGNMENT = "alignment"  # does the image show what its prompt asks for
    FIDELITY = "fidelity"  # is it free of artefacts and broken anatomy
    SAFETY = "safety"  # is it free of content that must not be shown
    OVERALL = "overall"  # which image would people prefer, all in all


PERSPECTIVES: tuple[Perspective, ...] = tuple(Perspective)
