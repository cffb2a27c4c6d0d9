"""Draws images with a prompt and known truth: for the demonstration, for tests, and to teach the demo checkpoint.

One seed gives one scene, on every machine. Prompt and layout do not depend on the truth that is asked for, so
the same seed drawn with two truths is a preference pair that differs in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from model.perspectives import Perspective
from model.scene_backgrounds import paint_background
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign, break_apart, damage, paint_sign
from model.scene_grammar import (
    Group,
    Kind,
    Mismatch,
    Relation,
    SceneSpec,
    contradict,
    describe,
    possible_mismatches,
    sample_spec,
)
from model.scene_shapes import WRONG_ANATOMIES, paint

# Width x height in pixels. Two of them are not square, as generators' outputs often are not.
SIZES = ((512, 512), (768, 512), (512, 768), (384, 384))

# Shares of flawed scenes when no truth is asked for.
_MISMATCH_SHARE = 0.25
_ARTEFACT_SHARE = 0.25
_SIGN_SHARE = 0.08
_HARMLESS_SIGN_SHARE = 0.25


@dataclass(frozen=True)
class SceneTruth:
    """What is wrong with a scene; nothing by default."""

    mismatch: Mismatch | None = None
    artefact: Artefact | None = None
    sign: ProhibitedSign | None = None

    @property
    def is_match(self) -> bool:
        """Alignment: the image shows what its prompt asks for."""
        return self.mismatch is None

    @property
    def is_clean(self) -> bool:
        """Fidelity: no artefact, no wrong anatomy."""
        return self.artefact is None

    @property
    def is_harmless(self) -> bool:
        """Safety: no prohibited sign."""
        return self.sign is None

    @property
    def overall(self) -> int:
        """Overall order, 0 (worst) to 7: a prohibited sign is worst, then a wrong subject, then an artefact."""
        return 4 * self.is_harmless + 2 * self.is_match + self.is_clean

    def grade(self, perspective: Perspective) -> int:
        """0 flawed, 1 flawless; for ``OVERALL`` the overall order."""
        return {
            Perspective.ALIGNMENT: int(self.is_match),
            Perspective.FIDELITY: int(self.is_clean),
            Perspective.SAFETY: int(self.is_harmless),
            Perspective.OVERALL: self.overall,
        }[perspective]


@dataclass(frozen=True)
class Placed:
    """One thing in the image: left, top and side of its square in pixels. ``is_flawed``: broken, or wrong anatomy."""

    group: Group
    left: int
    top: int
    side: int
    is_flawed: bool


@dataclass(frozen=True)
class PlacedSign:
    """The sign in the image, prohibited or harmless: left, top and side of its square in pixels."""

    sign: ProhibitedSign | HarmlessSign
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """The RGB image of a seed, its prompt, and what is true of it: ``asked`` by the prompt, ``shown`` in the image.

    ``things`` and ``sign`` say where everything is; ``sign`` names a harmless one too, of which the truth is silent.
    """

    seed: int
    image: Image.Image
    prompt: str
    truth: SceneTruth
    asked: SceneSpec
    shown: SceneSpec
    things: tuple[Placed, ...]
    sign: PlacedSign | None


def draw(seed: int, *, size: tuple[int, int] = (512, 512), truth: SceneTruth | None = None) -> Scene:
    """The scene of ``seed``, ``size`` (width, height) pixels large, each at least 64.

    ``truth``: what shall be wrong with it; chosen by the seed when None.
    Raises ``ValueError`` for a truth that this scene cannot have (see ``possible_truths``).
    """
    if min(size) < 64:
        raise ValueError(f"size {size} is below 64 pixels; nothing would be recognisable")
    asked = asked_spec(seed)
    if truth is None:
        truth = truth_of(seed)
    shown = shown_spec(seed, truth.mismatch)
    if truth.artefact is Artefact.WRONG_ANATOMY and not _has_person(shown):
        raise ValueError(f"scene {seed} shows no person whose anatomy could be wrong")
    image, things, sign = _render(shown, truth, size, seed)
    return Scene(seed, image, prompt_of(seed, asked), truth, asked, shown, things, sign)


def prompt_of(seed: int, spec: SceneSpec) -> str:
    """A prompt that asks for ``spec``, in the wording of ``seed``."""
    return describe(spec, _random("prompt", seed))


def asked_spec(seed: int) -> SceneSpec:
    """What the prompt of ``seed`` asks for; nothing is drawn."""
    return sample_spec(_random("spec", seed))


def shown_spec(seed: int, mismatch: Mismatch | None) -> SceneSpec:
    """What the image of ``seed`` shows with that mismatch; nothing is drawn."""
    return _shown(asked_spec(seed), mismatch, seed)


def truth_of(seed: int) -> SceneTruth:
    """What is wrong with the scene of ``seed`` where no truth is asked for; nothing is drawn."""
    asked, random = asked_spec(seed), _random("truth", seed)
    mismatch = random.choice(possible_mismatches(asked)) if random.random() < _MISMATCH_SHARE else None
    artefacts = possible_artefacts(_shown(asked, mismatch, seed))
    artefact = random.choice(artefacts) if random.random() < _ARTEFACT_SHARE else None
    sign = random.choice(list(ProhibitedSign)) if random.random() < _SIGN_SHARE else None
    return SceneTruth(mismatch, artefact, sign)


def possible_artefacts(*shown: SceneSpec, is_teaching: bool = False) -> list[Artefact]:
    """The artefacts that images of all of ``shown`` can have.

    ``is_teaching``: wrong anatomy four times, since persons are rare and their flaws the smallest of all.
    """
    artefacts = list(Artefact)
    if not all(map(_has_person, shown)):
        artefacts.remove(Artefact.WRONG_ANATOMY)
    elif is_teaching:
        artefacts += [Artefact.WRONG_ANATOMY] * 3
    return artefacts


def possible_truths(seed: int) -> Iterator[SceneTruth]:
    """Every truth that the scene of ``seed`` can have, the right one first."""
    asked = sample_spec(_random("spec", seed))
    for mismatch in (None, *possible_mismatches(asked)):
        for artefact in (None, *possible_artefacts(_shown(asked, mismatch, seed))):
            yield from (SceneTruth(mismatch, artefact, sign) for sign in (None, *ProhibitedSign))


def _random(purpose: str, seed: int) -> Random:
    # One stream for each purpose: asking for a flaw must not move anything else. Text seeds are hashed with
    # SHA-512 by ``random``, the same in every process.
    return Random(f"{purpose}:{seed}")  # noqa: S311


def _shown(asked: SceneSpec, mismatch: Mismatch | None, seed: int) -> SceneSpec:
    return asked if mismatch is None else contradict(asked, mismatch, _random("mismatch", seed))


def _has_person(spec: SceneSpec) -> bool:
    return any(group.kind is Kind.PERSON for group in spec.groups)


def _render(
    shown: SceneSpec, truth: SceneTruth, size: tuple[int, int], seed: int
) -> tuple[Image.Image, tuple[Placed, ...], PlacedSign | None]:
    image = paint_background(shown.background, size, _random("background", seed))
    layout, flaw = _random("layout", seed), _random("flaw", seed)
    broken = _broken_group(shown, truth.artefact, flaw)
    things: list[Placed] = []
    for group, cell in zip(shown.groups, _cells(shown, size), strict=True):
        spots, side = _spots(group.count, cell, min(size), layout)
        tile = paint(group, side, shown.style)
        for number, spot in enumerate(spots):
            is_broken = group is broken and number == 0
            placed = _broken_tile(group, side, shown, truth.artefact, flaw) if is_broken else tile
            image.paste(placed, spot, placed)
            things.append(Placed(group, *spot, side, is_broken))
    sign = _add_sign(image, shown, truth.sign, things, _random("sign", seed))
    damaged = image if truth.artefact is None else damage(image, truth.artefact, flaw)
    return damaged, tuple(things), sign


def _broken_group(shown: SceneSpec, artefact: Artefact | None, random: Random) -> Group | None:
    """The group of which one thing is broken or, for wrong anatomy, the persons."""
    if artefact is Artefact.BROKEN_OBJECT:
        return random.choice(shown.groups)
    if artefact is Artefact.WRONG_ANATOMY:
        return next(group for group in shown.groups if group.kind is Kind.PERSON)
    return None


def _broken_tile(group: Group, side: int, shown: SceneSpec, artefact: Artefact | None, random: Random) -> Image.Image:
    if artefact is Artefact.WRONG_ANATOMY:
        return paint(group, side, shown.style, random.choice(WRONG_ANATOMIES))
    return break_apart(paint(group, side, shown.style), random)


Cell = tuple[float, float, float, float]  # left, top, width, height in pixels


def _cells(shown: SceneSpec, size: tuple[int, int]) -> list[Cell]:
    """One cell for each group, so that the relation of the first two holds for all of their things."""
    number = len(shown.groups)
    width, height = size
    order = list(range(number))
    if shown.relation in (Relation.RIGHT_OF, Relation.BELOW):
        order[:2] = [1, 0]
    if shown.relation in (Relation.ABOVE, Relation.BELOW):
        return [(0.0, height * position / number, float(width), height / number) for position in order]
    return [(width * position / number, height * 0.1, width / number, height * 0.9) for position in order]


def _spots(count: int, cell: Cell, unit: int, random: Random) -> tuple[list[tuple[int, int]], int]:
    """Top left corners of ``count`` squares that do not overlap, and their side in pixels."""
    left, top, width, height = cell
    columns = max(range(1, count + 1), key=lambda n: min(width / n, height / -(-count // n)))
    rows = -(-count // columns)
    side = int(min(0.86 * min(width / columns, height / rows), 0.44 * unit) * random.uniform(0.82, 1.0))
    spots = []
    for number in range(count):
        row, column = divmod(number, columns)
        in_row = min(columns, count - row * columns)
        step = width / in_row
        slack_x, slack_y = step - side, height / rows - side
        x = left + step * column + slack_x * random.uniform(0.3, 0.7)
        y = top + height / rows * row + slack_y * random.uniform(0.3, 0.7)
        spots.append((round(x), round(y)))
    return spots, side


def _add_sign(
    image: Image.Image, shown: SceneSpec, sign: ProhibitedSign | None, things: list[Placed], random: Random
) -> PlacedSign | None:
    """The prohibited sign, or now and then a harmless one, at a place that tells nothing of which it is.

    A sign that hid a thing would make the prompt wrong as well, so of several places the freest is used.
    """
    harmless = random.choice(list(HarmlessSign)) if random.random() < _HARMLESS_SIGN_SHARE else None
    shown_sign = sign or harmless
    if shown_sign is None:
        return None
    side = round(min(image.size) * random.uniform(0.16, 0.22))
    spots = [(random.randrange(image.width - side), random.randrange(image.height - side)) for _ in range(24)]
    taken = [(thing.left, thing.top, thing.side) for thing in things]
    spot = min(spots, key=lambda spot: sum(_overlap((*spot, side), thing) for thing in taken))
    tile = paint_sign(shown_sign, side, shown.style, random)
    image.paste(tile, spot, tile)
    return PlacedSign(shown_sign, *spot, side)


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    """Common area of two squares given by left, top and side, in pixels."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0, width) * max(0, height)
