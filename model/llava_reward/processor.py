"""CPU preprocessing of LLaVA-Reward: bytes and prompt to a uint8 picture and token ids.

Needs Pillow, numpy and tokenizers, never torch, so that data workers start fast. Normalising, the global
view and cutting into crops happen on the device, in ``pixels.py``: what travels is the uint8 picture.
The pictures of phi3v are made here, those of the other families in ``qwen_inputs.py`` and ``llava_inputs.py``.

Letters: H, W: height and width in pixels after padding, multiples of the crop side. n: tokens.
Source of the picture's part: the "HD transform" of microsoft/Phi-3.5-vision-instruct, image_processing_phi3_v.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import tokenizers
from PIL import Image

from model.errors import ConfigError, ErrorCode, InputError, Stage
from model.images import decode_image, image_facts
from model.llava_reward.bundle import Bundle, read_bundle
from model.llava_reward.bundle import read_identity as hash_identity
from model.llava_reward.config import ClipConfig, read_clip_config, read_phi3v_config
from model.llava_reward.family_inputs import FamilyInputs
from model.llava_reward.llava_inputs import LlavaInputs
from model.llava_reward.prompt_tokens import PHI3V_TEXT, PromptTokenizer
from model.llava_reward.qwen_inputs import QwenInputs
from model.modes import EXACT
from model.prompts import encode_prompt
from model.schema import Generation, RowError
from model.scorer import Prepared, ScorerIdentity

# Raise it when the arrays made from the same inputs change.
PROCESSOR_VERSION = 1

IMAGE_TOKEN = -1  # stands in the ids where an image feature goes
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class HdLayout:
    """Where a picture lands: resized, then padded with white up to whole crops. All in pixels.

    ``is_transposed``: a portrait picture is mirrored along its main diagonal while it is resized and padded;
    the sizes here are those of the final, upright picture.
    """

    resized: tuple[int, int]
    padded: tuple[int, int]
    is_transposed: bool


def hd_layout(width: int, height: int, *, num_crops: int, crop_size: int) -> HdLayout:
    """Choose the largest size whose crops number at most ``num_crops``.

    - returns: ``(width, height)`` pairs
    - raises: ``InputError`` image_too_narrow if no row of pixels would be left
    """
    is_transposed = width < height
    ratio = max(width, height) / min(width, height)
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    long_side = scale * crop_size
    short_side = int(long_side / ratio)
    if short_side == 0:
        message = (
            f"{width}x{height} pixels: resized to {long_side} on its long side, no pixel is left on the other; crop it"
        )
        raise InputError(ErrorCode.IMAGE_TOO_NARROW, Stage.DECODE, message)
    padded_short = math.ceil(short_side / crop_size) * crop_size
    resized, padded = (long_side, short_side), (long_side, padded_short)
    return HdLayout(resized[::-1], padded[::-1], True) if is_transposed else HdLayout(resized, padded, False)


def hd_transform(image: Image.Image, *, num_crops: int, crop_size: int) -> Image.Image:
    """Resize (PIL bilinear, 8 bits) and pad with white, centred on the short side, to multiples of the crop."""
    layout = hd_layout(image.width, image.height, num_crops=num_crops, crop_size=crop_size)
    resized, padded = layout.resized, layout.padded
    if layout.is_transposed:
        # PIL resizes along x before y and rounds in between, so only transposing first gives the same bytes.
        image, resized, padded = image.transpose(Image.Transpose.TRANSPOSE), resized[::-1], padded[::-1]
    image = image.resize(resized, Image.Resampling.BILINEAR)
    if resized != padded:
        canvas = Image.new("RGB", padded, _WHITE)
        canvas.paste(image, (0, (padded[1] - resized[1]) // 2))
        image = canvas
    return image.transpose(Image.Transpose.TRANSPOSE) if layout.is_transposed else image


def num_image_tokens(width: int, height: int, clip: ClipConfig) -> int:
    """Tokens of a padded picture: its crops, the global view, one row end a row, and one separator between."""
    rows, columns = height // clip.image_size, width // clip.image_size
    side = clip.merged_per_side
    return (rows * columns + 1) * side * side + 1 + (rows + 1) * side


def max_image_tokens(num_crops: int, clip: ClipConfig) -> int:
    """The most tokens that any picture can take: all crops in one column."""
    side = clip.merged_per_side
    return (num_crops + 1) * side * side + 1 + (num_crops + 1) * side


class Phi3VInputs:
    """phi3v: the HD transform, and the text in two parts around the image."""

    text = PHI3V_TEXT

    def __init__(self, bundle: Bundle) -> None:
        self._num_crops = bundle.num_crops
        self._clip = read_clip_config(bundle.backbone / "clip_tower.json")
        self.max_positions = read_phi3v_config(bundle.backbone / "config.json").max_position_embeddings
        self.max_image_tokens = max_image_tokens(bundle.num_crops, self._clip)
        self.facts: dict[str, object] = {
            "num_crops": bundle.num_crops,
            "crop_size": self._clip.image_size,
            "patch_size": self._clip.patch_size,
        }

    def picture(self, image: Image.Image) -> tuple[dict[str, np.ndarray], int]:
        """``pixels``: ``(H, W, 3)`` uint8, resized and padded."""
        padded = hd_transform(image, num_crops=self._num_crops, crop_size=self._clip.image_size)
        return {"pixels": np.array(padded)}, num_image_tokens(padded.width, padded.height, self._clip)


_INPUTS: dict[str, Callable[[Bundle], FamilyInputs]] = {
    "phi3v": Phi3VInputs,
    "qwen": QwenInputs,
    "llava": LlavaInputs,
}


class LlavaRewardPreprocessor:
    """The CPU step. Thread-safe; two with equal ``preprocessing_hash`` make equal arrays."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.max_image_bytes = bundle.max_image_bytes
        self._inputs = _INPUTS[bundle.family](bundle)
        tokenizer_path = bundle.backbone / "tokenizer.json"
        self.tokenizer = PromptTokenizer(tokenizer_path, self._inputs.text)
        self.max_prompt_tokens = self._prompt_limit(bundle.backbone / "config.json")
        self.preprocessing_hash = self._hash(tokenizer_path)

    def _prompt_limit(self, config_path: Path) -> int:
        """The configured limit, or less where the longest image would leave too few positions."""
        positions = self._inputs.max_positions
        around = len(self.tokenizer.before_image) + self._inputs.max_image_tokens
        limit = min(self._bundle.max_prompt_tokens, positions - around)
        if limit < 1:
            raise ConfigError(
                f"{config_path}: max_position_embeddings={positions} leaves no room beside {around} image tokens"
            )
        return limit

    def _hash(self, tokenizer_path: Path) -> str:
        bundle = self._bundle
        facts = {
            "processor": PROCESSOR_VERSION,
            "tokenizer": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
            **self._inputs.facts,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_image_bytes": bundle.max_image_bytes,
            "max_image_pixels": bundle.max_image_pixels,
            "pillow": PIL.__version__,
            "tokenizers": tokenizers.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def preprocess(self, generations: Iterable[Generation]) -> list[Prepared]:
        """Arrays of each generation, in order.

        - what the family makes of the picture: ``pixels``, uint8, and for llava ``image_size``
        - ``input_ids``: ``(n,)`` int32, -1 where an image feature goes, the end token last
        """
        return [self._prepare(generation) for generation in generations]

    def _prepare(self, generation: Generation) -> Prepared:
        facts = None
        try:
            after_image = self._encode(generation.prompt)
            image, facts = decode_image(
                generation.image,
                max_image_bytes=self._bundle.max_image_bytes,
                max_image_pixels=self._bundle.max_image_pixels,
            )
            arrays, image_tokens = self._inputs.picture(image)
        except InputError as error:
            row_error = RowError(error.code, error.stage, error.message)
            facts = facts or image_facts(generation.image)
            return Prepared(generation.generation_id, image=facts, error=row_error)
        slots = [IMAGE_TOKEN] * image_tokens
        ids = np.array([*self.tokenizer.before_image, *slots, *after_image], dtype=np.int32)
        return Prepared(generation.generation_id, {**arrays, "input_ids": ids}, facts)

    def _encode(self, prompt: str) -> list[int]:
        encode_prompt(prompt)
        least = self.tokenizer.least_tokens(prompt)
        if least > self.max_prompt_tokens:  # certain without the cost of encoding it
            raise self._too_long(len(prompt), f"at least {least}")
        ids = self.tokenizer.after_image(prompt)
        if len(ids) > self.max_prompt_tokens:
            raise self._too_long(len(prompt), str(len(ids)))
        return ids

    def _too_long(self, characters: int, tokens: str) -> InputError:
        found = f"{tokens} tokens ({characters} characters)"
        message = f"max_prompt_tokens={self.max_prompt_tokens} exceeded by {found}; shorten it"
        return InputError(ErrorCode.PROMPT_TOO_LONG, Stage.PREPROCESS, message)


def load_preprocessor(folder: Path, *, mode: str = EXACT) -> LlavaRewardPreprocessor:
    """The CPU step of the bundle in ``folder``; raises ``ConfigError`` if a file is missing or malformed."""
    return LlavaRewardPreprocessor(read_bundle(folder, mode=mode))


def read_identity(folder: Path, *, dtype: str, mode: str = EXACT) -> ScorerIdentity:
    """The identity of the scorer in ``folder``, from its files alone."""
    preprocessing_hash = load_preprocessor(folder, mode=mode).preprocessing_hash
    return hash_identity(folder, dtype=dtype, mode=mode, preprocessing_hash=preprocessing_hash)
