"""What the perceptual hash calls alike, and what not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from model.image_hash import HASH_BYTES, MAX_DISTANCE, difference_hash, is_near, near_pairs
from model.scenes import draw

SCENES = [draw(seed).image for seed in range(30)]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_the_bits_by_hand():
    # 17 columns falling from 255 in steps of 15: every left neighbour is brighter. Rising: none is.
    row = np.repeat(np.arange(17, dtype=np.uint8)[None, ::-1] * 15, 16, 0)
    falling = Image.fromarray(np.repeat(row[:, :, None], 3, 2))
    assert difference_hash(falling) == b"\xff" * HASH_BYTES
    assert difference_hash(ImageOps.mirror(falling)) == bytes(HASH_BYTES)


@pytest.mark.parametrize("change", ["q90", "q60", "half", "wider"])
def test_copies_of_a_scene_are_found(change):
    changed = {
        "q90": lambda image: jpeg(image, 90),
        "q60": lambda image: jpeg(image, 60),
        "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
        "wider": lambda image: image.resize((image.width * 2, image.height), Image.Resampling.BICUBIC),
    }[change]
    assert all(is_near(difference_hash(image), difference_hash(changed(image))) for image in SCENES)


def test_different_scenes_are_not_alike_nor_is_another_colour():
    assert list(near_pairs([difference_hash(image) for image in SCENES])) == []
    red, green, blue = SCENES[0].split()
    swapped = Image.merge("RGB", (blue, red, green))
    assert not is_near(difference_hash(SCENES[0]), difference_hash(swapped))


def test_plain_images_are_left_out():
    plain = [difference_hash(Image.new("RGB", (64, 64), colour)) for colour in ("white", "black", "red")]
    assert list(near_pairs(plain)) == []
    assert list(near_pairs([])) == []


def bits_of(one):
    return int.from_bytes(one)


def is_near_by_definition(one, other):
    differing, either = (bits_of(one) ^ bits_of(other)).bit_count(), (bits_of(one) | bits_of(other)).bit_count()
    is_plain = min(bits_of(one).bit_count(), bits_of(other).bit_count()) <= MAX_DISTANCE
    return differing <= MAX_DISTANCE and 5 * differing <= either and not is_plain


def test_pairs_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    originals = rng.random((60, 768)) < rng.uniform(0.02, 0.5, (60, 1))
    flips = rng.random((60, 768)) < rng.uniform(0, 0.1, (60, 1))
    hashes = [np.packbits(bits).tobytes() for bits in (*originals, *(originals ^ flips))]
    expected = {(a, b) for a in range(120) for b in range(a + 1, 120) if is_near_by_definition(hashes[a], hashes[b])}
    found = list(near_pairs(hashes))
    assert set(found) == expected
    assert len(found) == len(expected) > 10
