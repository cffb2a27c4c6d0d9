"""Scenes as samples of next-token pretraining: drawn as they are needed, each a function of its number alone.

A sample is what the reward sees, then the caption: text before the image, image slots, prompt, end token, caption,
end token. The caption is written behind the end token so that the end token's state, which rewards read, already
knows what is to be said of image and prompt. More texts follow, each read as if it came right after the image, which
costs far more than they do: what there is to say of this and that kind of thing, and other prompts, since only many
teach which of their words contradict an image.

Letters: n: tokens, q: cells of the image (the tower's merged tokens, without separators), v: labels of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from torch.utils.data import Dataset

from model.llava_reward.pretrain_config import CaptionStage, Scenes
from model.llava_reward.processor import IMAGE_TOKEN, HdLayout, hd_layout, hd_transform
from model.llava_reward.prompt_tokens import PromptTokenizer
from model.llava_reward.small_phi3v import NetworkSizes
from model.scene_captions import Caption, Field, answer, caption_of
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import (
    HELD_OUT_PAIRS,
    Background,
    Colour,
    Kind,
    Mismatch,
    SceneSpec,
    Style,
    contradict,
    describe,
    holds_held_out_pair,
    names_of,
    possible_mismatches,
)
from model.scene_splits import Split, belongs, candidate_seeds
from model.scenes import Scene, SceneTruth, asked_spec, draw, possible_artefacts, prompt_of, shown_spec

ANSWER = "answer"
FIELDS = (*Field, ANSWER)
NO_FIELD = -1
NO_WORD = -1
_MATCH = FIELDS.index(Field.MATCH)
SHARED, CAPTIONED = 0, 1  # numbers of texts: of none; of prompt and caption
# How often more prompts are wrong in this, against the others: the hardest to see most often.
_WRONG_IN = {Mismatch.COLOUR: 1, Mismatch.KIND: 2, Mismatch.COUNT: 2, Mismatch.RELATION: 3, Mismatch.BACKGROUND: 1}

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
    - texts: ``(n,)`` int64, the number of the text that a token belongs to, from 1: prompt and caption, questions with
      their answers, other prompts; ``SHARED`` for what stands before all of them, which each text sees beside itself
    - positions: ``(n,)`` int64, where each token stands if its text comes right after what is shared
    - weights: ``(n,)`` float32, of predicting this token from the one before and what that sees; 0 where nothing is
      asked, as of the first token of each text but ``CAPTIONED``, before which stands another text
    - fields: ``(n,)`` int8, the place in ``FIELDS`` of what a token of caption or answer tells, or ``NO_FIELD``
    - wrong: ``(n,)`` int8, of each token of a prompt whether the prompt up to it contradicts the image (1, else 0);
      ``NO_WORD`` elsewhere
    - faults: of each prompt, in their order, in what the image contradicts it; None: in nothing
    - cells: ``(q, v)`` uint8, 1 where ``LABELS`` are seen, in the order of the tower's merged tokens
    - crop_order: ``(crops,)`` int64, their numbers shuffled: who looks at some of the crops takes the first of these
    """

    pixels: np.ndarray
    input_ids: np.ndarray
    texts: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    fields: np.ndarray
    wrong: np.ndarray
    faults: tuple[Mismatch | None, ...]
    cells: np.ndarray
    crop_order: np.ndarray


@dataclass(frozen=True)
class _Text:
    """Of one text, its ids and of each what ``Sample`` says; faults: of its prompt, if it has one."""

    ids: list[int]
    weights: list[float]
    fields: list[int]
    wrong: list[int]
    faults: tuple[Mismatch | None, ...]


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
        before = [*self._tokenizer.before_image, *[IMAGE_TOKEN] * _image_tokens(layout, self._sizes)]
        texts = [self._captioned(scene, has_prompt), *self._answers(scene), *self._more_prompts(scene)]
        crops = layout.padded[0] * layout.padded[1] // self._sizes.crop**2
        crop_order = np.array(Random(f"crops:{number}").sample(range(crops), crops))  # noqa: S311  not secret
        return _sample(np.array(picture), before, texts, cells, crop_order)

    def _captioned(self, scene: Scene, has_prompt: bool) -> _Text:
        """The scene's prompt, or none, and its caption."""
        prompt = self._tokenizer.after_image(scene.prompt if has_prompt else "")
        # A prompt that the image contradicts is no caption of it.
        is_true = has_prompt and scene.truth.mismatch is None
        caption, fields = caption_tokens(caption_of(scene, has_prompt=has_prompt), self._tokenizer)
        weights = [self._stage.prompt_weight if is_true else 0.0] * len(prompt)
        weights += [self._stage.match_weight if field == _MATCH else 1.0 for field in fields]
        true = self._tokenizer.after_image(prompt_of(scene.seed, scene.shown))
        wrong = _wrong(prompt, true) if has_prompt else [NO_WORD] * len(prompt)
        return _Text(
            [*prompt, *caption],
            weights,
            [NO_FIELD] * len(prompt) + fields,
            wrong + [NO_WORD] * len(caption),
            (scene.truth.mismatch,) if has_prompt else (),
        )

    def _answers(self, scene: Scene) -> Iterator[_Text]:
        """Kinds of things in any order, each followed by what there is to say of it. Nobody can foretell which."""
        if not self._scenes.questions:
            return
        random = Random(f"questions:{scene.seed}")  # noqa: S311  reproducible, not secret
        caption, shown = caption_of(scene, has_prompt=False), [group.kind for group in scene.shown.groups]
        others = [kind for kind in Kind if kind not in shown]
        kinds = shown + random.sample(others, min(len(others), max(0, self._scenes.questions - len(shown))))
        random.shuffle(kinds)
        ids = self._tokenizer.after_image("")
        weights = [0.0] * len(ids)
        for kind in kinds:
            question = self._tokenizer.inner_ids(random.choice(names_of(kind)))
            said = [one for word in answer(caption, kind) for one in self._tokenizer.inner_ids(word)]
            ids += question + said
            weights += [0.0] * len(question) + [1.0] * len(said)
        fields = [FIELDS.index(ANSWER) if weight else NO_FIELD for weight in weights]
        yield _Text(ids, weights, fields, [NO_WORD] * len(ids), ())

    def _more_prompts(self, scene: Scene) -> Iterator[_Text]:
        random = Random(f"more prompts:{scene.seed}")  # noqa: S311  reproducible, not secret
        for _ in range(self._scenes.more_prompts):
            asked, right, fault = _asked(scene.shown, random, may_hold_any=self._split is Split.HELD_OUT)
            # The shorter of two: long ones say the same again, and every token takes time.
            wording = min((random.getrandbits(64), random.getrandbits(64)), key=lambda w: len(_worded(right, w)))
            prompt, true = (self._tokenizer.after_image(_worded(spec, wording)) for spec in (asked, right))
            nothing = len(prompt)
            yield _Text(prompt, [0.0] * nothing, [NO_FIELD] * nothing, _wrong(prompt, true), (fault,))


def _asked(shown: SceneSpec, random: Random, *, may_hold_any: bool) -> tuple[SceneSpec, SceneSpec, Mismatch | None]:
    """What a prompt may ask of an image that shows ``shown``, right or wrong; what a right one would ask, saying as
    much; and in what it is wrong. ``may_hold_any``: held-out pairs too."""
    while True:
        right = replace(shown, says_background=random.random() < 0.6, says_style=random.random() < 0.4)
        if random.random() < 0.5:
            return right, right, None
        faults = possible_mismatches(right)
        [fault] = random.choices(faults, [_WRONG_IN[one] for one in faults])
        asked = contradict(right, fault, random)
        if may_hold_any or not holds_held_out_pair(asked):
            return asked, right, fault


def _worded(spec: SceneSpec, wording: int) -> str:
    return describe(spec, Random(wording))  # noqa: S311  reproducible, not secret


def _wrong(prompt: list[int], true: list[int]) -> list[int]:
    """1 from the first token on in which it is not the ``true`` one, which says what is shown in the same wording."""
    same = next((n for n, (a, b) in enumerate(zip(prompt, true, strict=False)) if a != b), len(prompt))
    return [0] * same + [1] * (len(prompt) - same)


def _sample(
    pixels: np.ndarray, before: list[int], texts: Sequence[_Text], cells: np.ndarray, crop_order: np.ndarray
) -> Sample:
    shared, lengths = len(before), [len(text.ids) for text in texts]
    assert not any(text.weights[0] for text in texts[1:]), "nothing that such a token sees foretells it"

    def joined(of_shared: Sequence[float], of_texts: Iterable[Sequence[float]], dtype: type) -> np.ndarray:
        return np.array([*of_shared, *(value for values in of_texts for value in values)], dtype=dtype)

    return Sample(
        pixels,
        joined(before, (text.ids for text in texts), np.int64),
        joined([SHARED] * shared, ([number] * n for number, n in enumerate(lengths, 1)), np.int64),
        joined(range(shared), (range(shared, shared + n) for n in lengths), np.int64),
        joined([0.0] * shared, (text.weights for text in texts), np.float32),
        joined([NO_FIELD] * shared, (text.fields for text in texts), np.int8),
        joined([NO_WORD] * shared, (text.wrong for text in texts), np.int8),
        tuple(fault for text in texts for fault in text.faults),
        cells,
        crop_order,
    )


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
    artefacts = possible_artefacts(shown, is_teaching=True)
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
