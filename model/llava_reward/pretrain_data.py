"""Scenes as samples of next-token pretraining: drawn as they are needed, each a function of its number alone.

A sample is what the reward sees, then the caption: text before the image, image slots, prompt, end token, caption,
end token. The caption is written behind the end token so that the end token's state, which rewards read, already
knows what is to be said of image and prompt.

Letters: n: tokens, q: cells of the image (the tower's merged tokens, without separators), v: labels of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from torch.utils.data import Dataset

from model.llava_reward.pretrain_config import CaptionStage, Scenes
from model.llava_reward.processor import IMAGE_TOKEN, HdLayout, hd_layout, hd_transform
from model.llava_reward.prompt_tokens import PromptTokenizer
from model.llava_reward.small_phi3v import NetworkSizes
from model.scene_captions import Caption, Field, caption_of
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import HELD_OUT_PAIRS, Background, Colour, Kind, SceneSpec, Style, possible_mismatches
from model.scene_splits import Split, belongs, candidate_seeds
from model.scenes import Scene, SceneTruth, asked_spec, draw, prompt_of, shown_spec

FIELDS = tuple(Field)
NO_FIELD = -1
NO_WORD = -1
_MATCH = FIELDS.index(Field.MATCH)

_SIGNS = (*ProhibitedSign, *HarmlessSign)
_SURFACES = (Artefact.NOISE, Artefact.BANDING, Artefact.BLOCKING, Artefact.BLUR)
_THINGS = (Artefact.BROKEN_OBJECT, Artefact.WRONG_ANATOMY)
# What a cell can show. Kinds come twice: some of a thing is here; the middle of a thing is here.
_LABELS: tuple[object, ...] = (*Kind, *(f"middle of {k}" for k in Kind), *Colour, *_SIGNS, *_THINGS, *_SURFACES)
_WHOLE: tuple[object, ...] = (*Background, *Style)
LABELS = (*_LABELS, *_WHOLE)
_PRESENT = 0.3  # of the smaller of cell and thing


def _never_together() -> np.ndarray:
    pairs = np.zeros((len(LABELS), len(LABELS)), dtype=np.uint8)
    for kind, colour in HELD_OUT_PAIRS:
        for name in (kind, f"middle of {kind}"):
            places = LABELS.index(name), LABELS.index(colour)
            pairs[places] = pairs[places[::-1]] = 1
    return pairs


# (v, v): 1 for a kind and a colour that training keeps apart. Where one is seen, whoever asked for the other would
# always hear no, and would learn that such a thing cannot be, instead of to look.
NEVER_TOGETHER = _never_together()


@dataclass(frozen=True)
class Sample:
    """One scene.

    - pixels: ``(H, W, 3)`` uint8; input_ids: ``(n,)`` int64
    - weights: ``(n,)`` float32, of predicting this token from those before; 0 where nothing is asked
    - fields: ``(n,)`` int8, the place in ``FIELDS`` of what a caption token tells, or ``NO_FIELD``
    - wrong: ``(n,)`` int8, of each token of a prompt whether the prompt up to it contradicts the image (1, else 0);
      ``NO_WORD`` elsewhere
    - cells: ``(q, v)`` uint8, 1 where ``LABELS`` are seen, in the order of the tower's merged tokens
    - crop_order: ``(crops,)`` int64, their numbers shuffled: who looks at some of the crops takes the first of these
    """

    pixels: np.ndarray
    input_ids: np.ndarray
    weights: np.ndarray
    fields: np.ndarray
    wrong: np.ndarray
    cells: np.ndarray
    crop_order: np.ndarray


class SceneSamples(Dataset[Sample]):
    """Sample ``number`` of a split, always the same."""

    def __init__(
        self, split: Split, scenes: Scenes, sizes: NetworkSizes, tokenizer: Path, stage: CaptionStage, length: int
    ) -> None:
        self._split, self._scenes, self._sizes = split, scenes, sizes
        self._tokenizer = PromptTokenizer(tokenizer)
        self._stage, self._length = stage, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Sample:
        scene, has_prompt = draw_scene(self._split, number, self._scenes)
        layout = hd_layout(*scene.image.size, num_crops=self._sizes.num_crops, crop_size=self._sizes.crop)
        picture = hd_transform(scene.image, num_crops=self._sizes.num_crops, crop_size=self._sizes.crop)
        cells = cell_labels(scene, layout, 2 * self._sizes.patch, self._sizes.crop)
        text = self._text(scene, has_prompt, _image_tokens(layout, self._sizes))
        crops = layout.padded[0] * layout.padded[1] // self._sizes.crop**2
        crop_order = np.array(Random(f"crops:{number}").sample(range(crops), crops))  # noqa: S311  not secret
        return Sample(np.array(picture), *text, cells, crop_order)

    def _text(
        self, scene: Scene, has_prompt: bool, image_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``input_ids``, ``weights``, ``fields`` and ``wrong`` of a sample."""
        before = [*self._tokenizer.before_image, *[IMAGE_TOKEN] * image_tokens]
        prompt = self._tokenizer.after_image(scene.prompt if has_prompt else "")
        # A prompt that the image contradicts is no caption of it.
        is_true = has_prompt and scene.truth.mismatch is None
        caption, fields = caption_tokens(caption_of(scene, has_prompt=has_prompt), self._tokenizer)
        weights = [0.0] * len(before) + [self._stage.prompt_weight if is_true else 0.0] * len(prompt)
        after = len(caption) + (0 if has_prompt else len(prompt))
        weights += [self._stage.match_weight if field == _MATCH else 1.0 for field in fields]
        return (
            np.array([*before, *prompt, *caption], dtype=np.int64),
            np.array(weights, dtype=np.float32),
            np.array([NO_FIELD] * (len(before) + len(prompt)) + fields, dtype=np.int8),
            np.array([NO_WORD] * len(before) + self._wrong(scene, prompt) * has_prompt + [NO_WORD] * after, np.int8),
        )

    def _wrong(self, scene: Scene, prompt: list[int]) -> list[int]:
        """From the first word on in which it is not the prompt that describes what is shown, in the same wording."""
        true = self._tokenizer.after_image(prompt_of(scene.seed, scene.shown))
        same = next((n for n, (a, b) in enumerate(zip(prompt, true, strict=False)) if a != b), len(prompt))
        return [0] * same + [1] * (len(prompt) - same)


def draw_scene(split: Split, number: int, scenes: Scenes) -> tuple[Scene, bool]:
    """The scene of a sample, and whether its prompt goes with it."""
    for seed in candidate_seeds(split, number):
        random = Random(f"pretrain:{seed}")  # noqa: S311  reproducible, not secret
        asked = asked_spec(seed)
        has_prompt = random.random() < scenes.prompt_share
        truth, shown = _truth(seed, asked, scenes, random, has_prompt)
        if belongs(split, asked, shown):
            return draw(seed, size=random.choice(scenes.sizes), truth=truth), has_prompt
    raise AssertionError(f"no candidate fits {split} {number}")


def _truth(
    seed: int, asked: SceneSpec, scenes: Scenes, random: Random, has_prompt: bool
) -> tuple[SceneTruth, SceneSpec]:
    is_wrong = has_prompt and random.random() < scenes.mismatch_share
    mismatch = random.choice(possible_mismatches(asked)) if is_wrong else None
    shown = shown_spec(seed, mismatch)
    artefacts = list(Artefact)
    if all(group.kind is not Kind.PERSON for group in shown.groups):
        artefacts.remove(Artefact.WRONG_ANATOMY)
    else:  # persons are rare, and their flaws the smallest of all
        artefacts += [Artefact.WRONG_ANATOMY] * 3
    artefact = random.choice(artefacts) if random.random() < scenes.artefact_share else None
    sign = random.choice(list(ProhibitedSign)) if random.random() < scenes.sign_share else None
    return SceneTruth(mismatch, artefact, sign), shown


def caption_tokens(caption: Caption, tokenizer: PromptTokenizer) -> tuple[list[int], list[int]]:
    """Ids of a caption and its end token, and for each the place in ``FIELDS`` of what it tells."""
    ids: list[int] = []
    fields: list[int] = []
    comma = tokenizer.inner_ids("a,")[-1]
    for position, part in enumerate(caption.words()):
        if position:
            ids.append(comma)
            fields.append(NO_FIELD)
        for field, word in part:
            word_ids = tokenizer.inner_ids(word)
            ids += word_ids
            fields += [FIELDS.index(field) if field else NO_FIELD] * len(word_ids)
    return [*ids, tokenizer.end_id], [*fields, NO_FIELD]


def _image_tokens(layout: HdLayout, sizes: NetworkSizes) -> int:
    side = sizes.crop // sizes.patch // 2
    rows, columns = layout.padded[1] // sizes.crop, layout.padded[0] // sizes.crop
    return (rows * columns + 1) * side * side + 1 + (rows + 1) * side


def cell_labels(scene: Scene, layout: HdLayout, cell: int, crop: int) -> np.ndarray:
    """What each cell shows, first those of the crops laid out as one picture, then those of the global view.

    - cell: side of a merged token in pixels of a crop; crop: side of a crop
    - returns: ``(q, v)`` uint8
    """
    width, height = layout.padded
    fine = _grid_labels(scene, layout, width // cell, height // cell)
    coarse = _grid_labels(scene, layout, crop // cell, crop // cell)
    return np.concatenate((fine, coarse))


def cells_by_crop(sample: Sample, crop: int, side: int) -> np.ndarray:
    """The cells of a sample in the order of its crops, those of the global view first: ``(1 + crops, side*side, v)``.

    - crop: side of a crop in pixels; side: cells per side of a crop
    """
    rows, columns = sample.pixels.shape[0] // crop, sample.pixels.shape[1] // crop
    fine = sample.cells[: -side * side].reshape(rows, side, columns, side, -1).transpose(0, 2, 1, 3, 4)
    return np.concatenate((sample.cells[None, -side * side :], fine.reshape(rows * columns, side * side, -1)))


def _grid_labels(scene: Scene, layout: HdLayout, columns: int, rows: int) -> np.ndarray:
    """``(rows*columns, v)`` uint8 for cells that divide the padded picture evenly."""
    labels = np.zeros((rows, columns, len(LABELS)), dtype=np.uint8)
    scale = layout.resized[0] / scene.image.width
    left, top = ((layout.padded[axis] - layout.resized[axis]) // 2 for axis in (0, 1))
    cell = (layout.padded[0] / columns, layout.padded[1] / rows)

    def mark(x: float, y: float, side: float, names: Sequence[object], middle: object | None = None) -> None:
        x, y, side = x * scale + left, y * scale + top, side * scale
        across, down = _overlaps(x, side, cell[0], columns), _overlaps(y, side, cell[1], rows)
        seen = np.outer(down, across) > _PRESENT * min(side, cell[0]) * min(side, cell[1])
        for name in names:
            labels[seen, LABELS.index(name)] = 1
        if middle is not None:
            row, column = int((y + side / 2) / cell[1]), int((x + side / 2) / cell[0])
            labels[row, column, LABELS.index(middle)] = 1

    for thing in scene.things:
        flaw = [scene.truth.artefact] if thing.is_flawed else []
        kind = thing.group.kind
        mark(thing.left, thing.top, thing.side, [kind, thing.group.colour, *flaw], f"middle of {kind}")
    if scene.sign:
        mark(scene.sign.left, scene.sign.top, scene.sign.side, [scene.sign.sign])
    whole: list[object] = [scene.shown.background, scene.shown.style]
    if scene.truth.artefact in _SURFACES:
        whole.append(scene.truth.artefact)
    for name in whole:
        labels[..., LABELS.index(name)] = 1
    return labels.reshape(rows * columns, -1)


def _overlaps(start: float, length: float, cell: float, number: int) -> np.ndarray:
    """Length that a stretch has in common with each of ``number`` cells: ``(number,)``."""
    edges = np.arange(number + 1) * cell
    common: np.ndarray = np.clip(np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start), 0, None)
    return common
