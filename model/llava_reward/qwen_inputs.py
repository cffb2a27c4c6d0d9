"""Pictures of qwen on the CPU: resized twice, as the released dataset code and the processor after it do.

Letters: H, W: height and width in pixels, multiples of the side of a token (28 for the real model).
Source: qwen_vl_utils, ``fetch_image`` and ``smart_resize``; transformers, models/qwen2_vl/image_processing_qwen2_vl.py.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from model.errors import ErrorCode, InputError, Stage
from model.llava_reward.bundle import Bundle
from model.llava_reward.model_config import read_qwen_config
from model.llava_reward.prompt_tokens import QWEN_TEXT

# Pixels, least and most. The first pair is of the dataset code, the second what the released code gives the processor.
FETCH_PIXELS = (3136, 12845056)
PROCESSOR_PIXELS = (200704, 1003520)
MAX_RATIO = 200
# The dataset code rounds to this whatever the model's own token side is.
_FETCH_FACTOR = 28


def smart_resize(width: int, height: int, *, factor: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """The size to resize to: sides that are multiples of ``factor``, about the same ratio, an area within ``pixels``.

    - pixels: least and most area
    - returns: width and height; rounding up may exceed the most by little, never rounding to the nearest
    - raises: ``InputError`` image_too_narrow where one side is more than 200 times the other
    """
    if max(width, height) > MAX_RATIO * min(width, height):
        message = f"{width}x{height} pixels: one side is more than {MAX_RATIO} times the other; crop it"
        raise InputError(ErrorCode.IMAGE_TOO_NARROW, Stage.DECODE, message)
    least, most = pixels
    new = [max(factor, round(side / factor) * factor) for side in (width, height)]
    if new[0] * new[1] > most:
        shrink = math.sqrt(width * height / most)
        new = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
    elif new[0] * new[1] < least:
        grow = math.sqrt(least / (width * height))
        new = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    return new[0], new[1]


class QwenInputs:
    """qwen: one picture of 256 to 1280 tokens, whatever its shape."""

    text = QWEN_TEXT

    def __init__(self, bundle: Bundle) -> None:
        config = read_qwen_config(bundle.backbone / "config.json")
        self._token_side = config.patch_size * config.merge_size
        self.max_positions = config.max_positions
        self.max_image_tokens = PROCESSOR_PIXELS[1] // self._token_side**2
        self.facts: dict[str, object] = {
            "family": bundle.family,
            "token_side": self._token_side,
            "fetch_pixels": FETCH_PIXELS,
            "processor_pixels": PROCESSOR_PIXELS,
        }

    def picture(self, image: Image.Image) -> tuple[dict[str, np.ndarray], int]:
        """``pixels``: ``(H, W, 3)`` uint8."""
        for factor, pixels in ((_FETCH_FACTOR, FETCH_PIXELS), (self._token_side, PROCESSOR_PIXELS)):
            size = smart_resize(image.width, image.height, factor=factor, pixels=pixels)
            image = image.resize(size, Image.Resampling.BICUBIC)  # the same bytes where the size is the same
        tokens = (image.width // self._token_side) * (image.height // self._token_side)
        return {"pixels": np.array(image)}, tokens
