"""Pictures of llava on the CPU: the whole picture as one tile, and the best of some larger sizes cut into tiles.

Letters: c: tile side in pixels (336 for the real model), p: patches per tile side.
Source: transformers, models/llava_next/image_processing_llava_next.py and processing_llava_next.py ("anyres").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from model.llava_reward.bundle import Bundle
from model.llava_reward.model_config import LlavaConfig, read_llava_config
from model.llava_reward.prompt_tokens import LLAVA_TEXT


def best_pinpoint(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size, (height, width), that keeps most of the picture's pixels, and of those the one that wastes least."""
    best, most_kept, least_wasted = pinpoints[0], 0, math.inf
    for tall, wide in pinpoints:
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = tall * wide - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (tall, wide), kept, wasted
    return best


def fitted_size(width: int, height: int, pinpoint: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the picture inside a pinpoint, ratio kept, rounded up."""
    tall, wide = pinpoint
    across, down = wide / width, tall / height
    if across < down:
        return wide, min(math.ceil(height * across), tall)
    return min(math.ceil(width * down), wide), tall


def num_image_tokens(width: int, height: int, config: LlavaConfig, pinpoint: tuple[int, int]) -> int:
    """Patches of the whole-picture tile, of the tiles where they show the picture, and one row end a row."""
    side = config.clip.patches_per_side
    rows, columns = (side * (extent // config.clip.image_size) for extent in pinpoint)
    # The reference cuts padding off by this rounding, in patches and not in pixels.
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return side * side + rows * columns + rows


class LlavaInputs:
    """llava: anyres tiles."""

    text = LLAVA_TEXT

    def __init__(self, bundle: Bundle) -> None:
        self._config = config = read_llava_config(bundle.backbone / "config.json")
        self.max_positions = config.max_positions
        self.max_image_tokens = max(num_image_tokens(w, h, config, (h, w)) for h, w in config.pinpoints)
        self.facts: dict[str, object] = {
            "family": bundle.family,
            "tile": config.clip.image_size,
            "patch_size": config.clip.patch_size,
            "pinpoints": config.pinpoints,
        }

    def picture(self, image: Image.Image) -> tuple[dict[str, np.ndarray], int]:
        """``pixels``: ``(1 + tiles, c, c, 3)`` uint8, the whole picture first; ``image_size``: height and width.

        However narrow, no picture is refused: the whole-picture tile stretches it to a square.
        """
        config, (width, height) = self._config, image.size
        side = config.clip.image_size
        pinpoint = best_pinpoint(width, height, config.pinpoints)
        whole = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
        tiles = _tiles(_on_canvas(image, pinpoint), side)
        size = np.array([height, width], dtype=np.int32)
        tokens = num_image_tokens(width, height, config, pinpoint)
        return {"pixels": np.concatenate((whole[None], tiles)), "image_size": size}, tokens


def _on_canvas(image: Image.Image, pinpoint: tuple[int, int]) -> np.ndarray:
    """The picture resized into a pinpoint and centred on black: ``(height, width, 3)`` uint8."""
    tall, wide = pinpoint
    width, height = fitted_size(image.width, image.height, pinpoint)
    canvas = np.zeros((tall, wide, 3), dtype=np.uint8)
    top, left = (tall - height) // 2, (wide - width) // 2
    canvas[top : top + height, left : left + width] = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return canvas


def _tiles(canvas: np.ndarray, side: int) -> np.ndarray:
    """``(rows*c, columns*c, 3)`` to ``(rows*columns, c, c, 3)``, row by row."""
    rows, columns = canvas.shape[0] // side, canvas.shape[1] // side
    return canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
