"""How each thing and sign of a scene is painted, in a unit square with the origin at the top left.

Painted on tiles at ``OVERSAMPLING`` times their final size and reduced, which smooths the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from model.scene_grammar import Colour, Group, Kind, Style

OVERSAMPLING = 2

RGB = tuple[int, int, int]
Point = tuple[float, float]

PALETTE: dict[Colour, RGB] = {
    Colour.RED: (214, 48, 49),
    Colour.ORANGE: (243, 140, 40),
    Colour.YELLOW: (250, 212, 56),
    Colour.GREEN: (46, 158, 78),
    Colour.BLUE: (43, 108, 214),
    Colour.PURPLE: (128, 62, 178),
    Colour.PINK: (246, 146, 190),
    Colour.BROWN: (128, 82, 46),
    Colour.BLACK: (38, 38, 44),
    Colour.WHITE: (246, 246, 242),
}
_INK: RGB = (34, 30, 40)
_WOOD: RGB = (122, 84, 52)
_SKIN: RGB = (236, 188, 150)
_HAIR: RGB = (84, 58, 40)
_GLASS: RGB = (178, 216, 236)


def tone(colour: RGB, factor: float) -> RGB:
    """Lighter (``factor`` above 1) or darker (below 1)."""
    red, green, blue = (min(255, max(0, round(value * factor))) for value in colour)
    return red, green, blue


class Pen:
    """Paints on a square tile in unit coordinates; draws outlines where the style has them."""

    def __init__(self, size: int, style: Style) -> None:
        self._size = size * OVERSAMPLING
        self._style = style
        self._tile = Image.new("RGBA", (self._size, self._size))
        self._draw = ImageDraw.Draw(self._tile)
        self._outline = _INK if style is Style.OUTLINED else None
        self._width = max(2, round(self._size * 0.018))

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self._size, y * self._size) for x, y in points]

    def polygon(self, points: Sequence[Point], fill: RGB) -> None:
        """A filled polygon."""
        self._draw.polygon(self._scaled(points), fill, self._outline, self._width)

    def box(self, left: float, top: float, right: float, bottom: float, fill: RGB, radius: float = 0.0) -> None:
        """A filled rectangle, its corners rounded by ``radius``."""
        corners = self._scaled([(left, top), (right, bottom)])
        self._draw.rounded_rectangle(corners, radius * self._size, fill, self._outline, self._width)

    def disc(self, x: float, y: float, radius_x: float, radius_y: float, fill: RGB) -> None:
        """A filled ellipse around (x, y)."""
        corners = self._scaled([(x - radius_x, y - radius_y), (x + radius_x, y + radius_y)])
        self._draw.ellipse(corners, fill, self._outline, self._width)

    def stroke(self, points: Sequence[Point], width: float, fill: RGB) -> None:
        """A line with round joints and ends."""
        scaled = self._scaled(points)
        if self._outline is not None:
            self._line(scaled, round(width * self._size) + 2 * self._width, self._outline)
        self._line(scaled, round(width * self._size), fill)

    def _line(self, points: list[Point], width: int, fill: RGB) -> None:
        self._draw.line(points, fill, width, joint="curve")
        for x, y in (points[0], points[-1]):
            self._draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill)

    def arc(self, x: float, y: float, radius: float, start: float, end: float, width: float, fill: RGB) -> None:
        """Part of a circle's line, clockwise from ``start`` to ``end`` degrees, 0 at three o'clock."""
        corners = self._scaled([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.arc(corners, start, end, fill, round(width * self._size))

    def tile(self) -> Image.Image:
        """The finished RGBA tile at its final size."""
        if self._style is Style.SHADED:
            self._shade()
        return self._tile.reduce(OVERSAMPLING)

    def _shade(self) -> None:
        """Light from the top left, within what is painted."""
        alpha = self._tile.getchannel("A")
        light = Image.radial_gradient("L").crop((40, 40, 256, 256)).resize(self._tile.size)
        dark = Image.new("RGB", self._tile.size, (16, 10, 40))
        shaded = Image.composite(dark, self._tile.convert("RGB"), light.point(_SHADOW))
        shaded.putalpha(alpha)
        self._tile = shaded


# Strength of the shadow by distance from the light, 0 to 255.
_SHADOW = [min(140, max(0, value - 70)) for value in range(256)]


@dataclass(frozen=True)
class Anatomy:
    """Parts of a figure. The default is a right one."""

    heads: int = 1
    arms: int = 2
    legs: int = 2
    neck: float = 0.0


WRONG_ANATOMIES = (
    Anatomy(heads=2),
    Anatomy(arms=4),
    Anatomy(arms=1),
    Anatomy(legs=3),
    Anatomy(legs=1),
    Anatomy(neck=0.15),
)


def paint(group: Group, size: int, style: Style, anatomy: Anatomy | None = None) -> Image.Image:
    """One thing of ``group`` on an RGBA tile of ``size`` pixels; ``anatomy`` is for persons."""
    pen = Pen(size, style)
    colour = PALETTE[group.colour]
    if group.kind is Kind.PERSON:
        _person(pen, colour, anatomy or Anatomy())
    else:
        _PAINTERS[group.kind](pen, colour)
    return pen.tile()


def _ball(pen: Pen, colour: RGB) -> None:
    pen.disc(0.5, 0.5, 0.44, 0.44, colour)
    seam = tone(colour, 0.7) if colour != PALETTE[Colour.BLACK] else (120, 120, 128)
    pen.arc(-0.12, 0.5, 0.44, -43, 43, 0.035, seam)
    pen.arc(1.12, 0.5, 0.44, 137, 223, 0.035, seam)


def _box(pen: Pen, colour: RGB) -> None:
    pen.polygon([(0.08, 0.3), (0.26, 0.12), (0.94, 0.12), (0.76, 0.3)], tone(colour, 1.18))
    pen.polygon([(0.76, 0.3), (0.94, 0.12), (0.94, 0.74), (0.76, 0.92)], tone(colour, 0.75))
    pen.box(0.08, 0.3, 0.76, 0.92, colour)


def _star(pen: Pen, colour: RGB) -> None:
    turns = [(math.pi * (step / 5 - 0.5), 0.48 if step % 2 == 0 else 0.2) for step in range(10)]
    pen.polygon([(0.5 + math.cos(turn) * r, 0.52 + math.sin(turn) * r) for turn, r in turns], colour)


def _heart(pen: Pen, colour: RGB) -> None:
    turns = [2 * math.pi * step / 48 for step in range(48)]
    curve = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    pen.polygon([(0.5 + x * 0.027, 0.45 - y * 0.028) for x, y in curve], colour)


def _triangle(pen: Pen, colour: RGB) -> None:
    pen.polygon([(0.5, 0.08), (0.95, 0.9), (0.05, 0.9)], colour)


def _cup(pen: Pen, colour: RGB) -> None:
    pen.arc(0.76, 0.5, 0.18, -100, 100, 0.07, tone(colour, 0.8))
    pen.polygon([(0.14, 0.22), (0.78, 0.22), (0.7, 0.9), (0.22, 0.9)], colour)
    pen.disc(0.46, 0.22, 0.32, 0.09, tone(colour, 0.6))


def _house(pen: Pen, colour: RGB) -> None:
    pen.box(0.66, 0.14, 0.77, 0.36, tone(colour, 0.6))
    pen.box(0.14, 0.44, 0.86, 0.94, colour)
    pen.polygon([(0.04, 0.46), (0.5, 0.08), (0.96, 0.46)], tone(colour, 0.62))
    pen.box(0.42, 0.64, 0.6, 0.94, _WOOD)
    for left in (0.21, 0.67):
        pen.box(left, 0.56, left + 0.14, 0.7, _GLASS)


def _tree(pen: Pen, colour: RGB) -> None:
    pen.box(0.43, 0.6, 0.57, 0.95, _WOOD)
    for x, y, radius in ((0.3, 0.46, 0.2), (0.7, 0.46, 0.2), (0.5, 0.28, 0.23), (0.5, 0.48, 0.22)):
        pen.disc(x, y, radius, radius, colour)


def _car(pen: Pen, colour: RGB) -> None:
    pen.polygon([(0.22, 0.5), (0.34, 0.28), (0.68, 0.28), (0.82, 0.5)], tone(colour, 0.85))
    pen.polygon([(0.29, 0.48), (0.37, 0.33), (0.49, 0.33), (0.49, 0.48)], _GLASS)
    pen.polygon([(0.54, 0.48), (0.54, 0.33), (0.66, 0.33), (0.74, 0.48)], _GLASS)
    pen.box(0.04, 0.48, 0.96, 0.72, colour, 0.07)
    for x in (0.25, 0.75):
        pen.disc(x, 0.73, 0.115, 0.115, (44, 44, 50))
        pen.disc(x, 0.73, 0.05, 0.05, (190, 190, 196))


def _fish(pen: Pen, colour: RGB) -> None:
    pen.polygon([(0.66, 0.5), (0.96, 0.26), (0.96, 0.74)], tone(colour, 0.78))
    pen.polygon([(0.34, 0.36), (0.52, 0.12), (0.6, 0.36)], tone(colour, 0.78))
    pen.disc(0.41, 0.5, 0.36, 0.22, colour)
    pen.disc(0.22, 0.45, 0.045, 0.045, (250, 250, 250))
    pen.disc(0.215, 0.45, 0.022, 0.022, (20, 20, 24))


def _flower(pen: Pen, colour: RGB) -> None:
    pen.stroke([(0.5, 0.4), (0.5, 0.92)], 0.05, (58, 132, 62))
    pen.disc(0.63, 0.74, 0.12, 0.05, (58, 132, 62))
    for step in range(6):
        turn = math.pi * step / 3
        pen.disc(0.5 + 0.19 * math.cos(turn), 0.32 + 0.19 * math.sin(turn), 0.12, 0.12, colour)
    pen.disc(0.5, 0.32, 0.1, 0.1, (240, 196, 60) if colour != PALETTE[Colour.YELLOW] else _WOOD)


def _boat(pen: Pen, colour: RGB) -> None:
    pen.box(0.48, 0.08, 0.52, 0.68, _WOOD)
    pen.polygon([(0.54, 0.1), (0.9, 0.58), (0.54, 0.58)], tone(colour, 1.15))
    pen.polygon([(0.46, 0.18), (0.46, 0.58), (0.16, 0.58)], tone(colour, 0.85))
    pen.polygon([(0.04, 0.66), (0.96, 0.66), (0.8, 0.9), (0.2, 0.9)], colour)


def _mushroom(pen: Pen, colour: RGB) -> None:
    pen.box(0.39, 0.46, 0.61, 0.94, (238, 226, 204), 0.08)
    cap = [
        (0.5 - 0.45 * math.cos(math.pi * step / 24), 0.55 - 0.44 * math.sin(math.pi * step / 24)) for step in range(25)
    ]
    pen.polygon(cap, colour)
    spot = (250, 248, 240) if colour != PALETTE[Colour.WHITE] else (200, 190, 180)
    for x, y, radius in ((0.3, 0.42, 0.055), (0.52, 0.26, 0.065), (0.7, 0.44, 0.05)):
        pen.disc(x, y, radius, radius, spot)


def _person(pen: Pen, colour: RGB, anatomy: Anatomy) -> None:
    legs = {1: (0.5,), 2: (0.42, 0.58), 3: (0.36, 0.5, 0.64)}[anatomy.legs]
    for x in legs:
        pen.stroke([(0.5 + (x - 0.5) * 0.7, 0.62), (x, 0.92)], 0.085, (60, 64, 92))
    sides = {1: (-1,), 2: (-1, 1), 4: (-1, 1, -1, 1)}[anatomy.arms]
    for number, side in enumerate(sides):
        hand = (0.5 + side * 0.25, 0.58) if number < 2 else (0.5 + side * 0.31, 0.28)
        pen.stroke([(0.5 + side * 0.12, 0.42), hand], 0.07, tone(colour, 0.85))
        pen.disc(*hand, 0.042, 0.042, _SKIN)
    pen.box(0.37, 0.36 + anatomy.neck / 2, 0.63, 0.67, colour, 0.07)
    if anatomy.neck:
        pen.stroke([(0.5, 0.26), (0.5, 0.4 + anatomy.neck / 2)], 0.06, _SKIN)
    for x in {1: (0.5,), 2: (0.39, 0.61)}[anatomy.heads]:
        pen.disc(x, 0.2 - anatomy.neck / 2, 0.115, 0.125, _HAIR)
        pen.disc(x, 0.225 - anatomy.neck / 2, 0.1, 0.105, _SKIN)
        for eye in (-0.035, 0.035):
            pen.disc(x + eye, 0.215 - anatomy.neck / 2, 0.013, 0.013, _INK)


_PAINTERS: dict[Kind, Callable[[Pen, RGB], None]] = {
    Kind.BALL: _ball,
    Kind.BOX: _box,
    Kind.STAR: _star,
    Kind.HEART: _heart,
    Kind.TRIANGLE: _triangle,
    Kind.CUP: _cup,
    Kind.HOUSE: _house,
    Kind.TREE: _tree,
    Kind.CAR: _car,
    Kind.FISH: _fish,
    Kind.FLOWER: _flower,
    Kind.BOAT: _boat,
    Kind.MUSHROOM: _mushroom,
}
