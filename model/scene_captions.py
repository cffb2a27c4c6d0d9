"""Says in words all that a scene shows, in one fixed order: what a backbone learns to write, and can be checked.

    blur, zorv, two red balls, a blue box, row, night, flat
    right, none, arrow, a person in green, alone, meadow, shaded

Artefact, sign, groups in reading order, how they lie, background, style. The first word of all, where a prompt was
given, is whether the image is right for it, or wrong and in what.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import (
    MAX_COUNT,
    Background,
    Colour,
    Group,
    Kind,
    Mismatch,
    Relation,
    Style,
    noun_phrase,
    number_word,
)
from model.scenes import Scene

T = TypeVar("T")
Sign = ProhibitedSign | HarmlessSign

_NONE = "none"


class Field(StrEnum):
    """What a word of a caption tells."""

    MATCH = "match"
    ARTEFACT = "artefact"
    SIGN = "sign"
    COUNT = "count"
    COLOUR = "colour"
    KIND = "kind"
    RELATION = "relation"
    BACKGROUND = "background"
    STYLE = "style"


class Arrangement(StrEnum):
    """How the groups lie, in the order in which they are named."""

    ALONE = "alone"
    ROW = "row"  # from left to right
    COLUMN = "column"  # from top to bottom


_ENDS = {Arrangement.ROW: ("left", "right"), Arrangement.COLUMN: ("above", "below")}


@dataclass(frozen=True)
class Caption:
    """All that is shown, groups in reading order.

    ``mismatch``: in what the image contradicts the prompt; only where ``has_prompt``.
    """

    groups: tuple[Group, ...]
    arrangement: Arrangement
    background: Background
    style: Style
    sign: Sign | None
    artefact: Artefact | None
    has_prompt: bool = False
    mismatch: Mismatch | None = None

    def words(self) -> list[list[tuple[Field | None, str]]]:
        """The parts between commas, each as words with what they tell; None for what holds of every group."""
        parts: list[list[tuple[Field | None, str]]] = [
            [(Field.ARTEFACT, _artefact_words(self.artefact))],
            [(Field.SIGN, self.sign.value if self.sign else _NONE)],
            *(_group_words(group) for group in self.groups),
            [(Field.RELATION, self.arrangement.value)],
            [(Field.BACKGROUND, self.background.value)],
            [(Field.STYLE, self.style.value)],
        ]
        return [[(Field.MATCH, _match_words(self.mismatch))], *parts] if self.has_prompt else parts

    def text(self) -> str:
        """One line, as ``parse_caption`` reads it."""
        return ", ".join(" ".join(word for _, word in part) for part in self.words())


def caption_of(scene: Scene, *, has_prompt: bool) -> Caption:
    """What ``scene`` shows. ``has_prompt``: say as well whether it is right for its prompt."""
    shown = scene.shown
    groups = shown.groups
    if shown.relation in (Relation.RIGHT_OF, Relation.BELOW):
        groups = (groups[1], groups[0], *groups[2:])
    return Caption(
        groups,
        _arrangement(len(groups), shown.relation),
        shown.background,
        shown.style,
        scene.sign.sign if scene.sign else None,
        scene.truth.artefact,
        has_prompt,
        scene.truth.mismatch if has_prompt else None,
    )


def answer(caption: Caption, kind: Kind) -> tuple[str, ...]:
    """What there is to say of one kind of thing: ``red two left``; ``none`` where there is no such thing.

    Colour, number, and where its group lies: at an end, between, or alone. A caption names the colour before the thing
    and so is learned by finding colours; this is learned by finding things.
    """
    for place, group in enumerate(caption.groups):
        if group.kind is kind:
            ends = _ENDS.get(caption.arrangement)
            is_end = ends and place in (0, len(caption.groups) - 1)
            where = ends[place > 0] if ends and is_end else caption.arrangement.value
            return group.colour.value, number_word(group.count), where
    return (_NONE,)


def parse_caption(text: str) -> Caption:
    """The caption that ``text`` is; raises ``ValueError`` naming the part that is none."""
    parts = text.split(", ")
    has_prompt = parts[0] in _MATCHES
    mismatch = _MATCHES[parts.pop(0)] if has_prompt else None
    if len(parts) < 6:
        raise ValueError(f"caption {text!r} has {len(parts)} parts, expected six at least")
    artefact, sign, *groups, arrangement, background, style = parts
    return Caption(
        tuple(_known(_GROUPS, group) for group in groups),
        Arrangement(arrangement),
        Background(background),
        Style(style),
        _known(_SIGNS, sign),
        _known(_ARTEFACTS, artefact),
        has_prompt,
        mismatch,
    )


def _arrangement(groups: int, relation: Relation | None) -> Arrangement:
    if groups == 1:
        return Arrangement.ALONE
    return Arrangement.COLUMN if relation in (Relation.ABOVE, Relation.BELOW) else Arrangement.ROW


def _artefact_words(artefact: Artefact | None) -> str:
    return artefact.value.replace("_", " ") if artefact else _NONE


def _match_words(mismatch: Mismatch | None) -> str:
    return f"wrong {mismatch}" if mismatch else "right"


def _group_words(group: Group) -> list[tuple[Field | None, str]]:
    count, *rest = noun_phrase(group).split()
    is_person = group.kind is Kind.PERSON  # of whom one says "a person in red"
    fields = [Field.KIND, None, Field.COLOUR] if is_person else [Field.COLOUR, Field.KIND]
    return [(Field.COUNT, count), *zip(fields, rest, strict=True)]


def _known(values: dict[str, T], text: str) -> T:
    if text not in values:
        raise ValueError(f"{text!r} is no part of a caption")
    return values[text]


_MATCHES: dict[str, Mismatch | None] = {_match_words(mismatch): mismatch for mismatch in (None, *Mismatch)}
_ARTEFACTS: dict[str, Artefact | None] = {_artefact_words(artefact): artefact for artefact in (None, *Artefact)}
_SIGNS: dict[str, Sign | None] = {_NONE: None} | {sign.value: sign for sign in (*ProhibitedSign, *HarmlessSign)}
_GROUPS: dict[str, Group] = {
    noun_phrase(group): group
    for group in (Group(k, c, n) for k in Kind for c in Colour for n in range(1, MAX_COUNT + 1))
}
