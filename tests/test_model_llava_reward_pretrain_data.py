"""Scenes as samples: captions and answers are true, prompts are wrong where they say so, splits stay apart."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

from model.llava_reward.backbones.phi3v import read_backbone
from model.llava_reward.pretrain_data import (
    ANSWER,
    FIELDS,
    LABELS,
    NO_FIELD,
    NO_WORD,
    SHARED,
    Sample,
    _asked,
    cell_labels,
    cells_by_crop,
    draw_scene,
)
from model.llava_reward.processor import IMAGE_TOKEN, hd_layout, num_image_tokens
from model.llava_reward.prompt_tokens import PromptTokenizer
from model.scene_captions import Field, answer, caption_of, parse_caption
from model.scene_flaws import Artefact
from model.scene_grammar import HELD_OUT_PAIRS, Colour, Kind, Mismatch, holds_held_out_pair, names_of
from model.scene_splits import Split
from model.scenes import SceneTruth, asked_spec, draw
from tests.pretrain_helpers import small_config, small_samples


def test_no_training_or_validation_scene_holds_a_held_out_pair(tmp_path: Path) -> None:
    scenes = small_config(tmp_path).scenes
    for split in (Split.TRAINING, Split.VALIDATION):
        for number in range(150):
            scene, _ = draw_scene(split, number, scenes)
            pairs = {(g.kind, g.colour) for spec in (scene.asked, scene.shown) for g in spec.groups}
            assert not pairs & HELD_OUT_PAIRS
    for number in range(50):
        scene, _ = draw_scene(Split.HELD_OUT, number, scenes)
        assert holds_held_out_pair(scene.asked) or holds_held_out_pair(scene.shown)


def test_a_sample_is_what_the_reward_sees_and_then_a_true_caption(tmp_path: Path) -> None:
    samples, config = small_samples(tmp_path), small_config(tmp_path)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json")
    clip = read_backbone(tmp_path).clip
    for number in range(20):
        sample, (scene, has_prompt) = samples[number], draw_scene(Split.TRAINING, number, config.scenes)
        ids = sample.input_ids.tolist()
        image_tokens = num_image_tokens(sample.pixels.shape[1], sample.pixels.shape[0], clip)
        prompt = tokenizer.after_image(scene.prompt if has_prompt else "")
        seen = [*tokenizer.before_image, *[IMAGE_TOKEN] * image_tokens, *prompt]
        assert ids[: len(seen)] == seen
        caption = caption_of(scene, has_prompt=has_prompt)
        assert ids[len(seen) :] == [*tokenizer.inner_ids(caption.text()), tokenizer.end_id]
        assert parse_caption(caption.text()) == caption
        # asked of every caption token, of a prompt only if it is true, never of what stands before the image
        match = FIELDS.index(Field.MATCH)
        assert (sample.weights[len(seen) :] == np.where(sample.fields[len(seen) :] == match, 3, 1)).all()
        assert (match in sample.fields) == has_prompt
        is_prompt = np.zeros(len(ids), dtype=bool)
        is_prompt[len(seen) - len(prompt) : len(seen)] = has_prompt
        assert ((sample.wrong != NO_WORD) == is_prompt).all()
        is_true = has_prompt and scene.truth.mismatch is None
        assert (sample.weights[len(seen) - len(prompt) : len(seen)] == (0.5 if is_true else 0)).all()
        assert not sample.weights[: len(seen) - len(prompt)].any()
        assert (sample.fields[: len(seen)] == NO_FIELD).all()
        assert {FIELDS[field] for field in sample.fields if field != NO_FIELD} >= {"artefact", "colour", "style"}


def test_a_prompt_is_wrong_from_the_first_word_that_is(tmp_path: Path) -> None:
    samples, config = small_samples(tmp_path, length=200), small_config(tmp_path)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json")
    ends = []
    for number in range(120):
        scene, has_prompt = draw_scene(Split.TRAINING, number, config.scenes)
        if not has_prompt:
            continue
        wrong = samples[number].wrong
        words = wrong[wrong != NO_WORD].tolist()
        assert words == sorted(words)  # once wrong, it stays so
        ends.append((words[-1] == 1, scene.truth.mismatch))
        if scene.truth.mismatch is Mismatch.COLOUR:
            first = tokenizer.after_image(scene.prompt)[words.index(1)]
            words_of_colour = [*Colour, "a", "an", "A", "An"]  # a red car, an orange one
            assert first in {tokenizer.inner_ids(word)[-1] for word in words_of_colour}
    assert all(is_wrong == (mismatch is not None) for is_wrong, mismatch in ends)
    assert {mismatch for _, mismatch in ends} == {None, *Mismatch}


def test_more_prompts_follow_and_each_says_whether_it_is_right(tmp_path: Path) -> None:
    few, many = small_samples(tmp_path, length=120), small_samples(tmp_path, length=120, more_prompts=3)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json")
    faults = []
    for number in range(120):
        alone, sample = few[number], many[number]
        # the scene's own text is as it was
        own = sample.texts <= 1
        for name in ("input_ids", "texts", "positions", "weights", "fields", "wrong"):
            assert (getattr(sample, name)[own] == getattr(alone, name)).all()
        assert sample.faults[: len(alone.faults)] == alone.faults
        before = int((sample.texts == SHARED).sum())
        for text, fault in zip((2, 3, 4), sample.faults[len(alone.faults) :], strict=True):
            place = sample.texts == text
            assert (sample.positions[place] == before + np.arange(place.sum())).all()
            assert sample.input_ids[place][-1] == tokenizer.end_id
            assert not sample.weights[place].any()  # nothing is asked of it but whether it is right
            wrong = sample.wrong[place].tolist()
            assert wrong == sorted(wrong)
            assert wrong[-1] == (fault is not None)
            faults.append(fault)
    assert {fault: faults.count(fault) > 10 for fault in (None, *Mismatch)} == dict.fromkeys((None, *Mismatch), True)
    assert 0.4 < faults.count(None) / len(faults) < 0.6


def test_questions_have_the_answers_that_the_image_gives(tmp_path: Path) -> None:
    samples, config = small_samples(tmp_path, questions=5), small_config(tmp_path)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json")
    names = {tokenizer.inner_ids(name)[0]: kind for kind in Kind for name in names_of(kind)}
    numbers = set()
    for number in range(40):
        sample, (scene, _) = samples[number], draw_scene(Split.TRAINING, number, config.scenes)
        place = sample.texts == 2
        ids, weights = sample.input_ids[place].tolist(), sample.weights[place].tolist()
        start = len(tokenizer.after_image(""))
        assert ids[:start] == tokenizer.after_image("")
        assert [FIELDS[f] if f != NO_FIELD else "" for f in sample.fields[place]] == [
            ANSWER if w else "" for w in weights
        ]
        asked = [n for n in range(start, len(ids)) if not weights[n]]
        told = {}
        for first, last in zip(asked, [*asked[1:], len(ids)], strict=True):
            told[names[ids[first]]] = ids[first + 1 : last]
        assert len(told) == len(asked) == 5
        assert {group.kind for group in scene.shown.groups} <= set(told)
        caption = caption_of(scene, has_prompt=False)
        for kind, found in told.items():
            assert found == [one for word in answer(caption, kind) for one in tokenizer.inner_ids(word)]
        numbers.add(sample.input_ids[place].tobytes())
    assert len(numbers) == 40


def test_no_prompt_of_training_asks_for_a_held_out_pair() -> None:
    random = Random(0)
    asked = [_asked(asked_spec(seed), random, may_hold_any=False) for seed in range(400)]
    assert not any(holds_held_out_pair(one) for one, _, fault in asked if fault)
    assert all((one == right) == (fault is None) for one, right, fault in asked)
    anything = [_asked(asked_spec(seed), random, may_hold_any=True) for seed in range(400)]
    assert any(holds_held_out_pair(one) and not holds_held_out_pair(right) for one, right, _ in anything)


def test_cells_say_where_things_are() -> None:
    scene = draw(4, size=(128, 64), truth=SceneTruth(artefact=Artefact.BROKEN_OBJECT))
    # 128x64 in crops of 32 pixels, four at most: s=2 gives 64x32 in one row of two crops, with cells of 16 pixels
    layout = hd_layout(128, 64, num_crops=4, crop_size=32)
    assert layout.padded == (64, 32)
    labels = cell_labels(scene, layout, 16, 32)
    assert labels.shape == (4 * 2 + 2 * 2, len(LABELS))
    assert len(set(map(str, LABELS))) == len(LABELS)
    fine, middles = labels[:8].reshape(2, 4, -1), np.zeros((2, 4))
    for thing in scene.things:  # the picture is halved: a cell holds 32 pixels of the scene
        row, column = int((thing.top + thing.side / 2) / 32), int((thing.left + thing.side / 2) / 32)
        assert fine[row, column, LABELS.index(f"middle of {thing.group.kind}")]
        middles[row, column] = 1
    columns = [LABELS.index(f"middle of {kind}") for kind in Kind]
    assert (fine[:, :, columns].max(-1) == middles).all()
    assert labels[:, LABELS.index(scene.shown.background)].all()
    assert labels[:, LABELS.index(Artefact.BROKEN_OBJECT)].any()
    assert not labels[:, LABELS.index(Artefact.NOISE)].any()


def test_cells_by_crop() -> None:
    # One row of two crops of 2x2 cells, then the global view. Laid out as a picture:
    #   0 1 | 2 3
    #   4 5 | 6 7
    cells = np.arange(12, dtype=np.uint8)[:, None]
    none = np.zeros(0)
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    sample = Sample(pixels, none, none, none, none, none, none, (), cells, np.array([1, 0]))
    assert cells_by_crop(sample, 32, 2)[..., 0].tolist() == [[8, 9, 10, 11], [0, 1, 4, 5], [2, 3, 6, 7]]
