"""Pretraining on captions: what it learns from, that it resumes exactly, and that its folder is a backbone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from model.errors import ConfigError, DivergedError
from model.llava_reward.backbones.phi3v import read_backbone
from model.llava_reward.checkpoint import load_network
from model.llava_reward.pixels import crops_from_pixels
from model.llava_reward.pretrain import DEFAULT_CONFIG, Pretraining
from model.llava_reward.pretrain_config import PretrainConfig, read_pretrain_config
from model.llava_reward.pretrain_data import (
    ANSWER,
    CAPTIONED,
    FIELDS,
    LABELS,
    NO_FIELD,
    NO_WORD,
    SHARED,
    Sample,
    SceneSamples,
    _asked,
    cell_labels,
    cells_by_crop,
    draw_scene,
)
from model.llava_reward.pretrain_measure import measure_captions, measure_cells
from model.llava_reward.pretrain_network import PretrainNetwork
from model.llava_reward.pretrain_objectives import learning_rate
from model.llava_reward.processor import IMAGE_TOKEN, hd_layout, num_image_tokens
from model.llava_reward.prompt_tokens import PromptTokenizer
from model.llava_reward.scene_tokenizer import build_scene_tokenizer
from model.llava_reward.small_phi3v import write_configs
from model.perspectives import Perspective
from model.scene_captions import Field, answer, caption_of, parse_caption
from model.scene_flaws import Artefact, ProhibitedSign
from model.scene_grammar import HELD_OUT_PAIRS, Colour, Kind, Mismatch, holds_held_out_pair, names_of
from model.scene_splits import Split
from model.scenes import SceneTruth, asked_spec, draw
from tests.random_adapter import write_adapter

_SMALL: Mapping[str, Any] = yaml.safe_load("""
seed: 3
is_mixed: false
network: {crop: 28, patch: 7, num_crops: 4, tower_width: 16, tower_mlp: 24, tower_layers: 2, tower_heads: 2,
          hidden: 24, mlp: 32, layers: 2, heads: 2}
scenes: {sizes: [[64, 64], [128, 64], [64, 96]], prompt_share: 0.6, mismatch_share: 0.5, artefact_share: 0.5,
         sign_share: 0.4, more_prompts: 2, questions: 4}
tower: {batch: 4, micro_batch: 2, steps: 4, warmup: 2, rate: 2.0e-3, last_rate: 0.1, beta1: 0.9, beta2: 0.98,
        weight_decay: 0.1, clip: 1.0, fine_crops: 1}
captions: {batch: 4, micro_batch: 2, steps: 6, warmup: 2, rate: 2.0e-3, last_rate: 0.1, beta1: 0.9, beta2: 0.98,
           weight_decay: 0.1, clip: 1.0, prompt_weight: 0.5, match_weight: 3.0,
           word_weight: 1.0}
reporting: {log_steps: 1, save_seconds: 1000, validate_steps: 1000, scenes: 6}
""")


def _config(folder: Path, **changes: Any) -> PretrainConfig:
    """The small configuration; a part's changed keys are given as a mapping."""
    values = {**_SMALL, **{n: {**_SMALL[n], **v} if isinstance(v, dict) else v for n, v in changes.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return read_pretrain_config(folder / "config.yaml")


def _samples(folder: Path, split: Split = Split.TRAINING, length: int = 40, **more: int) -> SceneSamples:
    config = _config(folder, scenes={"more_prompts": 0, "questions": 0, **more})
    write_configs(folder, config.network, build_scene_tokenizer(), is_tied=True)
    return SceneSamples(split, config.scenes, config.network, folder / "tokenizer.json", config.captions, length)


def _logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_shipped_configuration_reads() -> None:
    config = read_pretrain_config(DEFAULT_CONFIG)
    assert config.network.crop % (2 * config.network.patch) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tower": {**_SMALL["tower"], "lr": 1.0}}, "tower holds"),
        ({"captions": {**_SMALL["captions"], "rate": "1e-3"}}, "captions.rate='1e-3' is no number"),
        ({"tower": {**_SMALL["tower"], "micro_batch": 3}}, "no multiple of tower.micro_batch"),
        ({"captions": {**_SMALL["captions"], "micro_batch": 0}}, "no multiple of captions.micro_batch"),
        ({"is_mixed": 1}, "is_mixed=1"),
        ({"network": {**_SMALL["network"], "layers": -1}}, "network.layers=-1"),
        ({"scenes": {**_SMALL["scenes"], "sizes": [[64, 32]]}}, r"\[64, 32\]"),
        ({"extra": 1}, "extra"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**_SMALL, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_pretrain_config(tmp_path / "config.yaml")


def test_no_training_or_validation_scene_holds_a_held_out_pair(tmp_path: Path) -> None:
    scenes = _config(tmp_path).scenes
    for split in (Split.TRAINING, Split.VALIDATION):
        for number in range(150):
            scene, _ = draw_scene(split, number, scenes)
            pairs = {(g.kind, g.colour) for spec in (scene.asked, scene.shown) for g in spec.groups}
            assert not pairs & HELD_OUT_PAIRS
    for number in range(50):
        scene, _ = draw_scene(Split.HELD_OUT, number, scenes)
        assert holds_held_out_pair(scene.asked) or holds_held_out_pair(scene.shown)


def test_a_sample_is_what_the_reward_sees_and_then_a_true_caption(tmp_path: Path) -> None:
    samples, config = _samples(tmp_path), _config(tmp_path)
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
    samples, config = _samples(tmp_path, length=200), _config(tmp_path)
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
    few, many = _samples(tmp_path, length=120), _samples(tmp_path, length=120, more_prompts=3)
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
    samples, config = _samples(tmp_path, questions=5), _config(tmp_path)
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


def test_a_prompt_is_read_as_if_it_stood_alone(tmp_path: Path) -> None:
    """The answer on each of many prompts is that of a sample that has only this one."""
    samples = _samples(tmp_path, more_prompts=3)
    network = PretrainNetwork(tmp_path, seed=0)
    many = samples[5]
    with torch.inference_mode():
        together = network(network.see([many, samples[6]]))
        start = 0
        for text in sorted(set(many.texts) - {SHARED}):
            kept = (many.texts == SHARED) | (many.texts == text)
            arrays = {name: getattr(many, name)[kept] for name in ("input_ids", "positions", "weights", "wrong")}
            texts = np.minimum(many.texts[kept], 1)
            alone = network(network.see([replace(many, **arrays, texts=texts)]))
            stop = start + len(alone.wrong)
            torch.testing.assert_close(together.wrong[start:stop], alone.wrong, atol=1e-5, rtol=1e-5)
            assert bool(alone.wrong.std() > 1e-3)  # answers that differ
            start = stop
            if text == 1:
                torch.testing.assert_close(together.losses[: len(alone.losses)], alone.losses, atol=1e-5, rtol=1e-5)


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


def test_the_tower_sees_the_crops_that_the_labels_are_of(tmp_path: Path) -> None:
    samples = _samples(tmp_path)
    network = PretrainNetwork(tmp_path, seed=0)
    batch = [samples[number] for number in range(6)]
    assert {len(sample.crop_order) for sample in batch} == {2, 4}
    crops, labels = network.crops(batch, None)
    with torch.no_grad():
        by_sample = network.cell_logits(crops).split([1 + len(sample.crop_order) for sample in batch])
        for seen, logits in zip(network.see(batch), by_sample, strict=True):  # what the captions are learned from
            ordered = seen.cells[np.append(0, 1 + seen.sample.crop_order)]
            torch.testing.assert_close(network.cells(ordered.flatten(1, 2)), logits)
    assert [len(one) for one in labels.split([1 + len(sample.crop_order) for sample in batch])] == list(
        map(len, by_sample)
    )
    # with one crop of each: the global view, and the first in the sample's order
    some, some_labels = network.crops(batch[:1], 1)
    assert torch.equal(some, crops[:2])
    assert torch.equal(some_labels, labels[:2])
    first = crops_from_pixels(torch.from_numpy(batch[0].pixels)[None], 28)[0, 1 + int(batch[0].crop_order[0])]
    assert torch.equal(some[1], first)


def test_what_the_split_keeps_apart_is_not_asked(tmp_path: Path) -> None:
    """Of a cell in the one colour in which no ball is ever drawn nobody learns that it holds no ball."""
    [colour] = [colour for kind, colour in HELD_OUT_PAIRS if kind is Kind.BALL]
    run = Pretraining(tmp_path, _config(tmp_path, tower={"micro_batch": 4, "steps": 16}), workers=0)
    with torch.no_grad():
        run.network.cells.weight.zero_()
        run.network.cells.bias.zero_()
    total = colourless = 0
    for batch in list(run._batches()):
        _, shown = run.network.crops(batch, 1)
        flat = shown.flatten(0, 1)
        has_colour = flat[:, LABELS.index(colour)] == 1
        total, colourless = total + len(flat), colourless + int((~has_colour).sum())
        run.optimizer.zero_grad()
        [losses] = run.objective.losses(batch)
        losses.total.backward()  # type: ignore[no-untyped-call]
        gradient = run.network.cells.bias.grad
        assert gradient is not None
        # at a logit of 0 the gradient is half a cell up or down, for each cell that is asked
        expected = float((0.5 - flat[:, LABELS.index(Kind.BALL)])[~has_colour].sum() / len(flat))
        assert gradient[LABELS.index(Kind.BALL)].item() == pytest.approx(expected, abs=1e-6)
    assert 0 < colourless < total


def test_learning_rate(tmp_path: Path) -> None:
    stage = _config(tmp_path).captions  # 2e-3, two steps of warm-up, six in all, down to a tenth
    assert learning_rate(stage, 0) == pytest.approx(1e-3)
    assert learning_rate(stage, 1) == pytest.approx(2e-3)
    assert learning_rate(stage, 2) == pytest.approx(2e-3)
    assert learning_rate(stage, 4) == pytest.approx(1.1e-3)  # half of the cosine: 0.1 + 0.9 / 2
    assert learning_rate(stage, 6) == pytest.approx(2e-4)


def test_a_step_moves_what_its_stage_teaches(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, _config(tmp_path), workers=0)
    every = {name for name, _ in run.network.named_parameters()}
    tower = {name for name in every if name.startswith(("vision.img_processor", "cells"))}
    for stage, expected in (("tower", tower), ("captions", every - tower)):
        run.begin(stage)
        before = {name: parameter.detach().clone() for name, parameter in run.network.named_parameters()}
        run.train_step(next(run._batches()))
        moved = {name for name, p in run.network.named_parameters() if not torch.equal(p, before[name])}
        # one key shared by all keys changes no softmax, so the bias of keys has no gradient
        assert moved <= expected
        assert {name for name in expected - moved if not name.endswith("k_proj.bias")} == set()


@pytest.mark.parametrize("stage", ["tower", "captions"])
def test_micro_batches_change_nothing(tmp_path: Path, stage: str) -> None:
    losses = []
    for micro_batch in (1, 4):
        out = tmp_path / str(micro_batch)
        run = Pretraining(out, _config(out, **{stage: {"micro_batch": micro_batch}}), workers=0)
        run.begin(stage)
        losses.append([list(run.train_step(batch).values()) for batch in list(run._batches())[:3]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def _recorded(run: Pretraining, stop_after: int | None = None) -> list[dict[str, float]]:
    """Losses of ``run.run()``, told to stop after so many steps."""
    found: list[dict[str, float]] = []
    step = run.train_step

    def recorded(batch: Sequence[Sample]) -> dict[str, float]:
        found.append(step(batch))
        if len(found) == stop_after:
            run.stop()
        return found[-1]

    run.train_step = recorded  # type: ignore[method-assign]
    run.run()
    return found


@pytest.mark.parametrize("cut", [2, 4, 7])  # in the tower's four steps, at their end, in the captions
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, cut: int) -> None:
    whole = Pretraining(tmp_path / "whole", _config(tmp_path / "whole"), workers=0)
    expected = _recorded(whole)
    assert [set(losses) for losses in expected] == [{"cells"}] * 4 + [{"loss", "words"}] * 6

    first = Pretraining(tmp_path / "cut", _config(tmp_path / "cut"), workers=0)
    found = list(_recorded(first, stop_after=cut))
    if cut != 4:
        first.train_step(next(first._batches()))  # lost by a kill
    second = Pretraining(tmp_path / "cut", _config(tmp_path / "cut"), workers=0)
    assert (second.stage, second.step, second.seen) == (("tower", cut, 4 * cut) if cut <= 4 else ("captions", 3, 28))
    found += _recorded(second)
    assert found == expected
    ours, theirs = second.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_network_does_not_resume(tmp_path: Path) -> None:
    Pretraining(tmp_path, _config(tmp_path), workers=0).save()
    with pytest.raises(ConfigError, match="scenes"):
        Pretraining(tmp_path, _config(tmp_path, scenes={"sign_share": 0.5}), workers=0)
    # other stages do, and the decay is the new one
    run = Pretraining(tmp_path, _config(tmp_path, tower={"steps": 9, "weight_decay": 0.3}), workers=0)
    assert run.step == 0
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.3}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, _config(tmp_path, tower={"steps": 0}), workers=0)
    with torch.no_grad():
        run.network.model.norm.weight[0] = math.nan
    with pytest.raises(DivergedError, match=r"captions, step 0: losses \{'loss': nan.* lower captions.rate"):
        run.run()
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.timeout(120)
def test_terminated_it_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    _config(tmp_path, tower={"steps": 5000})
    command = [sys.executable, "-m", "model.llava_reward.pretrain", str(tmp_path), "--config"]
    command.append(str(tmp_path / "config.yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment) as process:
        while not (tmp_path / "log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    step = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    assert 1 <= step < 5000
    Pretraining(tmp_path, _config(tmp_path, tower={"steps": step + 2}, captions={"steps": 2}), workers=0).run()
    steps = [(entry["stage"], entry["step"]) for entry in _logged(tmp_path) if "split" not in entry]
    assert steps == [("tower", n) for n in range(1, step + 3)] + [("captions", 1), ("captions", 2)]
    measured = {(entry["stage"], entry["split"]) for entry in _logged(tmp_path) if "split" in entry}
    assert measured == {(stage, split) for stage in ("tower", "captions") for split in ("validation", "held_out")}


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("stage", ["tower", "captions"])
def test_it_learns(tmp_path: Path, is_mixed: bool, stage: str) -> None:
    config = _config(tmp_path, is_mixed=is_mixed, **{stage: {"steps": 40, "rate": 1.0e-2}})
    run = Pretraining(tmp_path, config, workers=0)
    run.begin(stage)
    losses = [run.train_step(batch) for batch in run._batches()]
    main = "cells" if stage == "tower" else "loss"
    assert losses[-1][main] < 0.6 * losses[0][main]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_it_learns_which_words_are_wrong(tmp_path: Path, is_mixed: bool) -> None:
    """Of one batch: from 160 others a network this small learns nothing of prompts."""
    config = _config(tmp_path, is_mixed=is_mixed, captions={"rate": 1.0e-2, "steps": 40})
    run = Pretraining(tmp_path, config, workers=0)
    run.begin("captions")
    batch = next(run._batches())
    losses = [run.train_step(batch) for _ in range(40)]
    assert losses[-1]["words"] < 0.6 * losses[0]["words"]


def test_measuring_cells_counts_what_is_right(tmp_path: Path) -> None:
    samples = _samples(tmp_path, Split.VALIDATION, 12)
    batch = [samples[number] for number in range(12)]
    network = PretrainNetwork(tmp_path, seed=0)
    shown = network.crops(batch, None)[1].flatten(0, 1)
    # One answer for every cell: the first kind, the first colour, and all cells equally likely to hold a sign.
    with torch.no_grad():
        network.cells.weight.zero_()
        network.cells.bias.zero_()
    found = measure_cells(network, [batch[:5], batch[5:]])
    assert found["cells"] == pytest.approx(len(LABELS) * math.log(2), rel=1e-5)
    middles = shown[:, [LABELS.index(f"middle of {kind}") for kind in Kind]]
    colours = shown[:, [LABELS.index(colour) for colour in Colour]]
    is_middle = middles.sum(1) == 1
    has_colour = is_middle & (colours.sum(1) == 1)
    assert found["kind"] == pytest.approx(float(middles[is_middle][:, 0].mean()))
    assert found["colour"] == pytest.approx(float(colours[has_colour][:, 0].mean()))
    assert found["sign"] == 0.0  # equal is not higher
    # Without a sign there is nothing to find.
    signs = shown[:, [LABELS.index(sign) for sign in ProhibitedSign]]
    assert signs.any()
    bare = [replace(sample, cells=np.zeros_like(sample.cells)) for sample in batch]
    assert set(measure_cells(network, [bare])) == {"cells"}


def test_measuring_counts_what_is_right(tmp_path: Path) -> None:
    samples = _samples(tmp_path, Split.VALIDATION, 6)
    batch = [samples[number] for number in range(6)]
    network = PretrainNetwork(tmp_path, seed=0)
    # With its embeddings zero the network finds all tokens equally likely, and the first of them is never right.
    with torch.no_grad():
        network.model.embed_tokens.weight.zero_()
        network.words.weight.zero_()
        network.words.bias.fill_(1.0)  # every prompt is found wrong
    found = measure_captions(network, [network.see(batch[:4]), network.see(batch[4:])])
    prompts = [sample.wrong[sample.wrong != NO_WORD][-1] for sample in batch if (sample.wrong != NO_WORD).any()]
    assert found["prompt"] == pytest.approx(np.mean(prompts))
    assert found["loss"] == pytest.approx(math.log(832), rel=1e-5)
    assert {found[name] for name in ("exact", "colour", "kind", "match")} == {0.0}
    # Asked for that very token it is always right.
    zeros = [replace(s, input_ids=np.where(s.fields == NO_FIELD, s.input_ids, 0)) for s in batch]
    found = measure_captions(network, [network.see(zeros)])
    assert (found["colour"], found["exact"]) == (1.0, 0.0)  # not the commas


def test_measuring_tells_prompts_and_answers_apart(tmp_path: Path) -> None:
    samples = _samples(tmp_path, Split.VALIDATION, 12, more_prompts=4, questions=3)
    batch = [samples[number] for number in range(12)]
    network = PretrainNetwork(tmp_path, seed=0)
    with torch.no_grad():
        network.words.weight.zero_()
        network.words.bias.fill_(1.0)  # every prompt is found wrong
    found = measure_captions(network, [network.see(batch[:5]), network.see(batch[5:])])
    faults = [fault for sample in batch for fault in sample.faults]
    assert set(faults) == {None, *Mismatch}
    assert found["prompt"] == pytest.approx(np.mean([fault is not None for fault in faults]))
    assert found["is right"] == 0.0
    assert {found[f"not {mismatch}"] for mismatch in Mismatch} == {1.0}
    # Found wrong are now the prompts of some samples alone, each with faults of its own.
    seen = network.see(batch)
    said = network(seen)
    chosen = torch.cat([torch.full((len(sample.faults),), n % 2 == 0) for n, sample in enumerate(batch)])
    said.wrong[said.ends] = torch.where(chosen, 1.0, -1.0)
    network.forward = lambda _: said  # type: ignore[method-assign]
    found = measure_captions(network, [seen])
    right = [(n % 2 == 0) == (fault is not None) for n, sample in enumerate(batch) for fault in sample.faults]
    assert found["prompt"] == pytest.approx(np.mean(right))
    for fault in (None, *Mismatch):
        name = "is right" if fault is None else f"not {fault}"
        assert found[name] == pytest.approx(np.mean([r for r, f in zip(right, faults, strict=True) if f is fault]))


def test_a_wrong_answer_makes_no_caption_inexact(tmp_path: Path) -> None:
    samples = _samples(tmp_path, Split.VALIDATION, 4, questions=3)
    batch = [samples[number] for number in range(4)]
    network = PretrainNetwork(tmp_path, seed=0)
    with torch.no_grad():
        network.model.embed_tokens.weight.zero_()  # token 0 is the likeliest everywhere
    # captions of that token alone, asked of it
    asked = [replace(s, input_ids=np.where((s.texts == CAPTIONED) & (s.weights > 0), 0, s.input_ids)) for s in batch]
    found = measure_captions(network, [network.see(asked)])
    assert (found["exact"], found["answer"]) == (1.0, 0.0)


def test_the_reward_reads_the_state_that_pretraining_teaches(tmp_path: Path) -> None:
    """At the end token of each prompt of a sample, by the code that scores."""
    samples = _samples(tmp_path, more_prompts=2, questions=2)
    network, device = PretrainNetwork(tmp_path, seed=0), torch.device("cpu")
    backbone, compared = network.backbone, 0
    for sample in (samples[0], samples[1], samples[2]):
        with torch.inference_mode():
            said = network(network.see([sample]))
            words = [number for number, wrong in zip(sample.texts, sample.wrong, strict=True) if wrong != NO_WORD]
            for end in said.ends.nonzero().flatten().tolist():
                kept = (sample.texts == SHARED) | ((sample.texts == words[end]) & (sample.wrong != NO_WORD))
                arrays = {"pixels": sample.pixels, "input_ids": sample.input_ids[kept].astype(np.int32)}
                shared = backbone.share(network.vision, [backbone.sample(arrays, device)])
                state = backbone.end_state(network.model, shared, backbone.project(network.model, shared))
                torch.testing.assert_close(network.words(state.hidden)[0, 0], said.wrong[end], atol=1e-5, rtol=1e-5)
                compared += 1
    assert compared >= 6


def test_a_run_begins_with_the_weights_of_another_backbone(tmp_path: Path) -> None:
    first = Pretraining(tmp_path / "first", _config(tmp_path / "first"), workers=0)
    with torch.no_grad():
        first.network.model.norm.weight.fill_(0.5)
        first.network.vision.sub_GN.fill_(0.25)
    first.save()
    start = tmp_path / "first" / "backbone"
    config = _config(tmp_path / "second", seed=4)
    second = Pretraining(tmp_path / "second", config, workers=0, start=start)
    ours = second.network.state_dict()
    for name, tensor in first.network.state_dict().items():
        is_kept = torch.equal(ours[name], tensor.bfloat16().float())
        assert is_kept != name.startswith(("cells.weight", "words.weight"))
    second.train_step(next(second._batches()))
    second.save()  # from then on it goes on from its own state
    again = Pretraining(tmp_path / "second", config, workers=0, start=start)
    assert again.step == 1
    other = _config(tmp_path / "third", network={"hidden": 32})
    with pytest.raises(ConfigError, match="other sizes"):
        Pretraining(tmp_path / "third", other, workers=0, start=start)


def test_the_written_folder_is_a_backbone(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, _config(tmp_path), workers=0)
    [sample, *_] = next(run._batches())
    run.save()
    built = read_backbone(tmp_path / "backbone")
    write_adapter(tmp_path / "alignment", built, torch.Generator().manual_seed(0))
    adapters = {Perspective.ALIGNMENT: tmp_path / "alignment"}
    network = load_network(tmp_path / "backbone", adapters, device=torch.device("cpu"), dtype=torch.float32)
    kept = network.vision.state_dict()
    for name, trained in run.network.vision.state_dict().items():
        assert torch.equal(kept[name], trained.bfloat16().float())
    arrays = {"pixels": sample.pixels, "input_ids": sample.input_ids}
    rewards = network([built.sample(arrays, torch.device("cpu"))], [Perspective.ALIGNMENT])
    assert rewards[Perspective.ALIGNMENT].isfinite().all()
