"""What a drawn scene can hold, how a prompt says it, and which single change makes the prompt wrong.

Words only: drawing is ``model/scenes.py``. Everything is chosen with a ``random.Random`` that the caller
seeds, so a scene is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random


class Kind(StrEnum):
    """Things that can be drawn."""

    BALL = "ball"
    BOX = "box"
    STAR = "star"
    HEART = "heart"
    TRIANGLE = "triangle"
    CUP = "cup"
    HOUSE = "house"
    TREE = "tree"
    CAR = "car"
    PERSON = "person"
    FISH = "fish"
    FLOWER = "flower"
    BOAT = "boat"
    MUSHROOM = "mushroom"


class Colour(StrEnum):
    """Colours that are told apart at a glance."""

    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"
    BROWN = "brown"
    BLACK = "black"
    WHITE = "white"


class Background(StrEnum):
    """Where the things are."""

    PLAIN = "plain"
    MEADOW = "meadow"
    BEACH = "beach"
    SNOW = "snow"
    NIGHT = "night"
    ROOM = "room"
    DESERT = "desert"
    CITY = "city"


class Style(StrEnum):
    """How surfaces are drawn."""

    FLAT = "flat"
    OUTLINED = "outlined"
    SHADED = "shaded"


class Relation(StrEnum):
    """How the first group lies to the second."""

    LEFT_OF = "to the left of"
    RIGHT_OF = "to the right of"
    ABOVE = "above"
    BELOW = "below"


class Mismatch(StrEnum):
    """The one attribute in which an image contradicts its prompt."""

    COLOUR = "colour"
    KIND = "kind"
    COUNT = "count"
    RELATION = "relation"
    BACKGROUND = "background"


@dataclass(frozen=True)
class Group:
    """``count`` equal things."""

    kind: Kind
    colour: Colour
    count: int


@dataclass(frozen=True)
class SceneSpec:
    """All that a prompt may say of an image. ``relation`` holds between the first two groups."""

    groups: tuple[Group, ...]
    relation: Relation | None
    background: Background
    style: Style
    says_background: bool
    says_style: bool


MAX_COUNT = 4

OPPOSITE = {
    Relation.LEFT_OF: Relation.RIGHT_OF,
    Relation.RIGHT_OF: Relation.LEFT_OF,
    Relation.ABOVE: Relation.BELOW,
    Relation.BELOW: Relation.ABOVE,
}

# Colours in which a thing would vanish into its background.
_CLASHES = {
    Background.PLAIN: {Colour.WHITE},
    Background.MEADOW: {Colour.GREEN},
    Background.BEACH: {Colour.YELLOW, Colour.BLUE},
    Background.SNOW: {Colour.WHITE},
    Background.NIGHT: {Colour.BLACK, Colour.PURPLE, Colour.BROWN},
    Background.ROOM: {Colour.BROWN, Colour.WHITE},
    Background.DESERT: {Colour.ORANGE, Colour.YELLOW},
    Background.CITY: {Colour.PURPLE},
}

_WHERE = {
    Background.PLAIN: ("on a plain background", "against a blank wall of paper"),
    Background.MEADOW: ("in a meadow", "on green grass under a blue sky"),
    Background.BEACH: ("on a beach", "on the sand by the sea"),
    Background.SNOW: ("in the snow", "on a snowy field"),
    Background.NIGHT: ("at night", "under a starry night sky"),
    Background.ROOM: ("in a room", "on the wooden floor of a room"),
    Background.DESERT: ("in a desert", "among the dunes of a desert"),
    Background.CITY: ("in front of a city", "before the skyline of a city"),
}
_STYLE_WORDS = {
    Style.FLAT: ("flat illustration", "flat vector graphic"),
    Style.OUTLINED: ("line drawing with bold outlines", "cartoon with dark outlines"),
    Style.SHADED: ("softly shaded rendering", "3D-looking illustration with soft shading"),
}
_NUMBERS = ("no", "one", "two", "three", "four")
_PLURALS = {Kind.PERSON: "people", Kind.FISH: "fish", Kind.BOX: "boxes"}
# Said of many prompts, and true of every scene: nothing that an artefact or a layout could contradict.
_PRAISE = (
    "simple shapes",
    "pleasant colours",
    "poster design",
    "made for children",
    "picture book",
    "stock illustration",
    "no text",
)
_CLOSING = (
    "There is nothing else that matters in the picture, so keep all the rest simple.",
    "The picture should feel calm and friendly, as in a children's book.",
    "Leave some empty space between the objects.",
    "Make it suitable for a poster that hangs in a classroom.",
)


def sample_spec(random: Random) -> SceneSpec:
    """One scene: one to three groups of one to four equal things each."""
    background = random.choice(list(Background))
    size = random.choices((1, 2, 3), weights=(3, 5, 2))[0]
    kinds = random.sample(list(Kind), size)
    colours = random.sample(_colours_on(background), size)
    counts = random.choices(range(1, MAX_COUNT + 1), weights=(5, 3, 2, 1), k=size)
    relation = random.choice(list(Relation)) if size > 1 and random.random() < 0.8 else None
    groups = tuple(Group(*group) for group in zip(kinds, colours, counts, strict=True))
    says_background, says_style = random.random() < 0.6, random.random() < 0.4
    return SceneSpec(groups, relation, background, random.choice(list(Style)), says_background, says_style)


# One colour of each kind, spread over all colours: shown to no training, so that what was learnt of a kind and of a
# colour can be measured on pairs of them that were never seen.
HELD_OUT_PAIRS = frozenset((kind, list(Colour)[(3 * position + 1) % len(Colour)]) for position, kind in enumerate(Kind))


def holds_held_out_pair(spec: SceneSpec) -> bool:
    """Whether any group has a kind in a colour that training never shows."""
    return any((group.kind, group.colour) in HELD_OUT_PAIRS for group in spec.groups)


def possible_mismatches(spec: SceneSpec) -> tuple[Mismatch, ...]:
    """The attributes that a prompt of ``spec`` states, and that an image can therefore contradict."""
    possible = [Mismatch.COLOUR, Mismatch.KIND, Mismatch.COUNT]
    if spec.relation is not None:
        possible.append(Mismatch.RELATION)
    if spec.says_background:
        possible.append(Mismatch.BACKGROUND)
    return tuple(possible)


def contradict(spec: SceneSpec, mismatch: Mismatch, random: Random) -> SceneSpec:
    """``spec`` with one attribute changed, so that a prompt of ``spec`` no longer describes it.

    Raises: ``ValueError`` when a prompt of ``spec`` does not state that attribute.
    """
    if mismatch not in possible_mismatches(spec):
        raise ValueError(f"the prompt of this scene says nothing of its {mismatch}")
    if mismatch is Mismatch.RELATION and spec.relation is not None:
        return replace(spec, relation=OPPOSITE[spec.relation])
    if mismatch is Mismatch.BACKGROUND:
        used = {group.colour for group in spec.groups}
        others = [b for b in Background if b is not spec.background and not used & _CLASHES[b]]
        # White, yellow and purple in a meadow clash with every other place, with a city least.
        return replace(spec, background=random.choice(others or [Background.CITY]))
    position = random.randrange(len(spec.groups))
    changed = _changed_group(spec, spec.groups[position], mismatch, random)
    return replace(spec, groups=(*spec.groups[:position], changed, *spec.groups[position + 1 :]))


def _changed_group(spec: SceneSpec, group: Group, mismatch: Mismatch, random: Random) -> Group:
    if mismatch is Mismatch.COUNT:
        return replace(group, count=random.choice([n for n in range(1, MAX_COUNT + 1) if n != group.count]))
    if mismatch is Mismatch.KIND:
        used_kinds = {other.kind for other in spec.groups}
        return replace(group, kind=random.choice([kind for kind in Kind if kind not in used_kinds]))
    used_colours = {other.colour for other in spec.groups}
    free = [colour for colour in _colours_on(spec.background) if colour not in used_colours]
    return replace(group, colour=random.choice(free))


def _colours_on(background: Background) -> list[Colour]:
    return [colour for colour in Colour if colour not in _CLASHES[background]]


def describe(spec: SceneSpec, random: Random) -> str:
    """A prompt in plain English, from a few words to several sentences. All that it states is in ``spec``."""
    subject = _subject(spec)
    if spec.says_background:
        subject = f"{subject} {random.choice(_WHERE[spec.background])}"
    if spec.says_style:
        style = random.choice(_STYLE_WORDS[spec.style])
        subject = f"{_article(style)} {style} of {subject}" if random.random() < 0.6 else f"{subject}, {style}"
    elif random.random() < 0.3:
        subject = f"{random.choice(('a picture of', 'an image of', 'an illustration showing'))} {subject}"
    length = random.choices(("short", "tags", "long"), weights=(5, 3, 2))[0]
    if length == "short":
        return subject if random.random() < 0.5 else _sentence(subject)
    if length == "tags":
        return ", ".join([subject, *random.sample(_PRAISE, random.randint(1, 4))])
    sentences = [_sentence(subject), *(_restated(group) for group in spec.groups)]
    return " ".join([*sentences, *random.sample(_CLOSING, random.randint(1, len(_CLOSING)))])


def _subject(spec: SceneSpec) -> str:
    words = [noun_phrase(group) for group in spec.groups]
    if spec.relation is not None:
        words[:2] = [f"{words[0]} {spec.relation} {words[1]}"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def noun_phrase(group: Group) -> str:
    """The group as prompts name it: ``a red ball``, ``two people in blue``."""
    noun = _noun(group)
    phrase = f"{noun} in {group.colour}" if group.kind is Kind.PERSON else f"{group.colour} {noun}"
    return f"{_article(phrase) if group.count == 1 else _NUMBERS[group.count]} {phrase}"


def number_word(count: int) -> str:
    """``two``; up to ``MAX_COUNT``."""
    return _NUMBERS[count]


def names_of(kind: Kind) -> tuple[str, str]:
    """Of one, and of several: ``ball``, ``balls``."""
    return kind.value, _PLURALS.get(kind, f"{kind}s")


def place_phrase(background: Background) -> str:
    """The background as prompts name it: ``on a beach``."""
    return _WHERE[background][0]


def _restated(group: Group) -> str:
    if group.count == 1:
        colour = f"wears {group.colour}" if group.kind is Kind.PERSON else f"is {group.colour}"
        return f"There is exactly one {group.kind}, and it {colour}."
    colour = f"wear {group.colour}" if group.kind is Kind.PERSON else f"are {group.colour}"
    return f"There are exactly {_NUMBERS[group.count]} {_noun(group)}, and all of them {colour}."


def _noun(group: Group) -> str:
    return names_of(group.kind)[group.count > 1]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
