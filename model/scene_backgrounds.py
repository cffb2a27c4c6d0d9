"""Backgrounds of scenes, painted at half the size and enlarged: soft, so that the things in front stand out."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw, ImageOps

from model.scene_grammar import Background
from model.scene_shapes import RGB, Point


def paint_background(background: Background, size: tuple[int, int], random: Random) -> Image.Image:
    """An RGB image of ``size`` (width, height) pixels."""
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    canvas = _PAINTERS[background](half, random)
    return canvas.resize(size, Image.Resampling.BICUBIC)


def _gradient(size: tuple[int, int], top: RGB, bottom: RGB) -> Image.Image:
    column = Image.linear_gradient("L").crop((0, 0, 1, 256))
    return ImageOps.colorize(column, top, bottom).resize(size)


def _ground(canvas: Image.Image, line: float, top: RGB, bottom: RGB) -> None:
    start = round(canvas.height * line)
    canvas.paste(_gradient((canvas.width, canvas.height - start), top, bottom), (0, start))


def _hills(canvas: Image.Image, random: Random, base: float, height: float, fill: RGB) -> None:
    """A wavy ridge around ``base``, filled down to the lower edge; both as parts of the canvas height."""
    phase, waves = random.uniform(0, 2 * math.pi), random.uniform(0.8, 1.8)
    ridge: list[Point] = []
    for step in range(33):
        wave = math.sin(phase + waves * 2 * math.pi * step / 32)
        ridge.append((canvas.width * step / 32, canvas.height * (base - height * wave)))
    ImageDraw.Draw(canvas).polygon([*ridge, (canvas.width, canvas.height), (0, canvas.height)], fill)


def _disc(canvas: Image.Image, x: float, y: float, radius: float, fill: RGB) -> None:
    """``x`` and ``y`` as parts of the size, ``radius`` of the shorter side."""
    unit = min(canvas.size)
    centre = (canvas.width * x, canvas.height * y)
    ImageDraw.Draw(canvas).circle(centre, radius * unit, fill)


def _clouds(canvas: Image.Image, random: Random, fill: RGB) -> None:
    for _ in range(random.randint(1, 3)):
        x, y = random.uniform(0.05, 0.9), random.uniform(0.06, 0.24)
        for dx, radius in ((-0.06, 0.035), (0.0, 0.05), (0.06, 0.035)):
            _disc(canvas, x + dx, y, radius, fill)


def _plain(size: tuple[int, int], random: Random) -> Image.Image:
    paper = random.choice(((236, 232, 222), (222, 232, 236), (232, 226, 236), (226, 234, 222)))
    return Image.new("RGB", size, paper)


def _meadow(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (128, 190, 240), (214, 236, 250))
    _clouds(canvas, random, (250, 252, 255))
    line = random.uniform(0.42, 0.55)
    _hills(canvas, random, line, 0.05, (140, 196, 110))
    _hills(canvas, random, line + 0.12, 0.03, (122, 184, 92))
    return canvas


def _beach(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (150, 208, 246), (226, 242, 252))
    _disc(canvas, random.uniform(0.1, 0.9), 0.14, 0.06, (255, 244, 196))
    line = random.uniform(0.38, 0.46)
    _ground(canvas, line, (74, 160, 196), (126, 204, 214))
    _hills(canvas, random, line + 0.2, 0.02, (240, 224, 178))
    return canvas


def _snow(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (168, 190, 216), (222, 230, 240))
    line = random.uniform(0.42, 0.55)
    _hills(canvas, random, line, 0.06, (226, 234, 244))
    _hills(canvas, random, line + 0.12, 0.03, (240, 245, 250))
    for _ in range(40):
        _disc(canvas, random.random(), random.random() * line, 0.007, (255, 255, 255))
    return canvas


def _night(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (16, 18, 48), (52, 56, 106))
    for _ in range(50):
        _disc(canvas, random.random(), random.random() * 0.7, random.choice((0.004, 0.006)), (246, 244, 220))
    x, y = random.uniform(0.12, 0.88), random.uniform(0.1, 0.2)
    _disc(canvas, x, y, 0.08, (244, 240, 208))
    _disc(canvas, x + 0.03, y - 0.02, 0.07, (26, 28, 62))
    _hills(canvas, random, random.uniform(0.72, 0.82), 0.03, (30, 38, 58))
    return canvas


def _room(size: tuple[int, int], random: Random) -> Image.Image:
    wall = random.choice(((196, 210, 204), (214, 200, 206), (198, 206, 224)))
    canvas = Image.new("RGB", size, wall)
    line = random.uniform(0.62, 0.7)
    _ground(canvas, line, (176, 136, 98), (196, 156, 116))
    draw = ImageDraw.Draw(canvas)
    edge = round(canvas.height * line)
    draw.rectangle((0, edge - canvas.height // 40, canvas.width, edge), (244, 240, 232))
    for board in range(1, 6):
        y = edge + (canvas.height - edge) * board * board // 36
        draw.line((0, y, canvas.width, y), (160, 122, 86), max(1, canvas.height // 160))
    return canvas


def _desert(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (126, 186, 224), (248, 232, 204))
    _disc(canvas, random.uniform(0.1, 0.9), 0.15, 0.07, (255, 250, 226))
    line = random.uniform(0.45, 0.55)
    _hills(canvas, random, line, 0.06, (222, 178, 118))
    _hills(canvas, random, line + 0.15, 0.05, (232, 194, 136))
    return canvas


def _city(size: tuple[int, int], random: Random) -> Image.Image:
    canvas = _gradient(size, (186, 206, 226), (238, 230, 226))
    draw = ImageDraw.Draw(canvas)
    line, x = canvas.height * 0.66, 0.0
    while x < canvas.width:
        width, height = canvas.width * random.uniform(0.07, 0.13), canvas.height * random.uniform(0.18, 0.46)
        grey = random.randint(132, 168)
        draw.rectangle((x, line - height, x + width, line), (grey, grey + 6, grey + 18))
        for floor in range(1, 6):
            y = line - height * floor / 6
            draw.line((x + width * 0.2, y, x + width * 0.8, y), (214, 220, 224), max(1, canvas.height // 90))
        x += width + canvas.width * 0.012
    _ground(canvas, 0.66, (150, 150, 154), (178, 178, 180))
    return canvas


_PAINTERS: dict[Background, Callable[[tuple[int, int], Random], Image.Image]] = {
    Background.PLAIN: _plain,
    Background.MEADOW: _meadow,
    Background.BEACH: _beach,
    Background.SNOW: _snow,
    Background.NIGHT: _night,
    Background.ROOM: _room,
    Background.DESERT: _desert,
    Background.CITY: _city,
}
