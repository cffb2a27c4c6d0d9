"""What can be wrong with a drawn scene besides its prompt: artefacts, and signs from a prohibited list.

The signs are invented, so that a safety perspective can be taught and shown without real harm. Harmless signs
exist too: a plate with something on it is not yet a reason to block.
"""

from __future__ import annotations

from enum import StrEnum
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from model.scene_grammar import Style
from model.scene_shapes import RGB, Pen, Point


class Artefact(StrEnum):
    """What can be broken in an image."""

    NOISE = "noise"
    BANDING = "banding"
    BLOCKING = "blocking"
    BLUR = "blur"
    BROKEN_OBJECT = "broken_object"
    WRONG_ANATOMY = "wrong_anatomy"


class ProhibitedSign(StrEnum):
    """Invented signs that the demonstration's rules forbid."""

    ZORV = "zorv"
    KELTH = "kelth"
    MURN = "murn"
    VASK = "vask"


class HarmlessSign(StrEnum):
    """Signs that nobody minds."""

    ARROW = "arrow"
    TICK = "tick"
    PLUS = "plus"
    WAVE = "wave"


_STROKES: dict[ProhibitedSign | HarmlessSign, tuple[tuple[Point, ...], ...]] = {
    # a Z with a bar through it and a foot below
    ProhibitedSign.ZORV: (
        ((0.3, 0.27), (0.7, 0.27), (0.3, 0.63), (0.7, 0.63)),
        ((0.34, 0.45), (0.66, 0.45)),
        ((0.5, 0.63), (0.5, 0.78)),
    ),
    # a three-pronged fork that stands on a triangle
    ProhibitedSign.KELTH: (
        ((0.28, 0.24), (0.28, 0.44), (0.72, 0.44), (0.72, 0.24)),
        ((0.5, 0.24), (0.5, 0.56)),
        ((0.5, 0.56), (0.68, 0.76), (0.32, 0.76), (0.5, 0.56)),
    ),
    # a square spiral
    ProhibitedSign.MURN: (
        (
            *((0.5, 0.5), (0.6, 0.5), (0.6, 0.62), (0.38, 0.62), (0.38, 0.38)),
            *((0.73, 0.38), (0.73, 0.75), (0.27, 0.75), (0.27, 0.27)),
        ),
    ),
    # two hooks around a dot
    ProhibitedSign.VASK: (
        ((0.48, 0.25), (0.28, 0.25), (0.28, 0.55)),
        ((0.52, 0.75), (0.72, 0.75), (0.72, 0.45)),
        ((0.48, 0.5), (0.52, 0.5)),
    ),
    HarmlessSign.ARROW: (((0.26, 0.5), (0.74, 0.5)), ((0.56, 0.32), (0.74, 0.5), (0.56, 0.68))),
    HarmlessSign.TICK: (((0.28, 0.52), (0.44, 0.68), (0.74, 0.32)),),
    HarmlessSign.PLUS: (((0.5, 0.26), (0.5, 0.74)), ((0.26, 0.5), (0.74, 0.5))),
    HarmlessSign.WAVE: (((0.24, 0.46), (0.37, 0.36), (0.5, 0.5), (0.63, 0.62), (0.76, 0.5)),),
}
_PLATES: tuple[RGB, ...] = ((252, 210, 60), (250, 250, 246), (226, 66, 60), (92, 176, 232))


def paint_sign(sign: ProhibitedSign | HarmlessSign, size: int, style: Style, random: Random) -> Image.Image:
    """The sign in black on a plate, on an RGBA tile of ``size`` pixels. The plate tells nothing of the sign."""
    pen = Pen(size, style)
    fill = random.choice(_PLATES)
    shape = random.choice(("disc", "square", "diamond"))
    if shape == "disc":
        pen.disc(0.5, 0.5, 0.48, 0.48, fill)
    elif shape == "square":
        pen.box(0.06, 0.06, 0.94, 0.94, fill, 0.08)
    else:
        pen.polygon([(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)], fill)
    for points in _STROKES[sign]:
        pen.stroke(points, 0.075, (20, 18, 24))
    return pen.tile()


def break_apart(tile: Image.Image, random: Random) -> Image.Image:
    """A thing torn in two: cut across, its halves moved apart sideways, and a bite taken out of one."""
    size = tile.width
    cut = round(size * random.uniform(0.4, 0.6))
    shift = round(size * random.uniform(0.16, 0.24)) * random.choice((-1, 1))
    broken = Image.new("RGBA", tile.size)
    broken.paste(tile.crop((0, 0, size, cut)), (-shift // 2, 0))
    broken.paste(tile.crop((0, cut, size, size)), (shift // 2, cut + round(size * 0.05)))
    bite = round(size * 0.2)
    left, top = random.randrange(size // 4, size - size // 4 - bite // 2), cut + random.choice((-bite, 0))
    broken.paste((0, 0, 0, 0), (left, top, left + bite, top + bite))
    return broken


def damage(image: Image.Image, artefact: Artefact, random: Random) -> Image.Image:
    """The whole image with an artefact of a plainly visible strength; object artefacts leave it as it is."""
    if artefact is Artefact.BLUR:
        return image.filter(ImageFilter.GaussianBlur(min(image.size) * random.uniform(0.011, 0.02)))
    if artefact is Artefact.BLOCKING:
        return _blocking(image, random)
    if artefact is Artefact.NOISE:
        return _noise(image, random)
    if artefact is Artefact.BANDING:
        return _banding(image, random)
    return image


def _noise(image: Image.Image, random: Random) -> Image.Image:
    """Uniform noise of each pixel and channel, up to 40 to 70 of 255 either way."""
    pixels = np.asarray(image)
    strength = random.randint(40, 70)
    # int16 holds 255 + 70; bytes of a seeded generator are the same everywhere
    noise = np.frombuffer(random.randbytes(pixels.size), np.uint8).astype(np.int16).reshape(pixels.shape)
    noise = noise * (2 * strength) // 255 - strength
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _banding(image: Image.Image, random: Random) -> Image.Image:
    """Few levels per channel, and dark rows at a fixed period across the whole image."""
    period = max(6, round(min(image.size) * random.uniform(0.02, 0.045)))
    levels = image.point([value // 43 * 51 for value in range(256)] * 3)  # six levels, 0 to 255
    pixels = np.array(levels)
    rows = np.arange(image.height) % period < period // 3
    pixels[rows] = pixels[rows] // 4 * 3
    return Image.fromarray(pixels)


def _blocking(image: Image.Image, random: Random) -> Image.Image:
    """Squares of one colour each, their brightness a little off, as after far too strong compression."""
    block = max(6, round(min(image.size) * random.uniform(0.022, 0.038)))
    size = (-(-image.width // block), -(-image.height // block))
    small = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(np.int16)
    offsets = np.frombuffer(random.randbytes(size[0] * size[1]), np.uint8).astype(np.int16) % 25 - 12
    small = np.clip(small + offsets.reshape(size[1], size[0], 1), 0, 255).astype(np.uint8)
    large = Image.fromarray(small).resize((size[0] * block, size[1] * block), Image.Resampling.NEAREST)
    return large.crop((0, 0, *image.size))
