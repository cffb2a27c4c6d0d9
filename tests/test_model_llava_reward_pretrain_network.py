"""The pretrained network reads what the reward reads, and is measured by what it gets right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.llava_reward.pixels import crops_from_pixels
from model.llava_reward.pretrain_data import (
    CAPTIONED,
    LABELS,
    NO_FIELD,
    NO_WORD,
    SHARED,
)
from model.llava_reward.pretrain_measure import measure_captions, measure_cells
from model.llava_reward.pretrain_network import PretrainNetwork
from model.scene_flaws import ProhibitedSign
from model.scene_grammar import Colour, Kind, Mismatch
from model.scene_splits import Split
from tests.pretrain_helpers import small_samples


def test_the_tower_sees_the_crops_that_the_labels_are_of(tmp_path: Path) -> None:
    samples = small_samples(tmp_path)
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


def test_a_prompt_is_read_as_if_it_stood_alone(tmp_path: Path) -> None:
    """The answer on each of many prompts is that of a sample that has only this one."""
    samples = small_samples(tmp_path, more_prompts=3)
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


def test_the_reward_reads_the_state_that_pretraining_teaches(tmp_path: Path) -> None:
    """At the end token of each prompt of a sample, by the code that scores."""
    samples = small_samples(tmp_path, more_prompts=2, questions=2)
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


def test_measuring_cells_counts_what_is_right(tmp_path: Path) -> None:
    samples = small_samples(tmp_path, Split.VALIDATION, 12)
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
    samples = small_samples(tmp_path, Split.VALIDATION, 6)
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
    samples = small_samples(tmp_path, Split.VALIDATION, 12, more_prompts=4, questions=3)
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
    samples = small_samples(tmp_path, Split.VALIDATION, 4, questions=3)
    batch = [samples[number] for number in range(4)]
    network = PretrainNetwork(tmp_path, seed=0)
    with torch.no_grad():
        network.model.embed_tokens.weight.zero_()  # token 0 is the likeliest everywhere
    # captions of that token alone, asked of it
    asked = [replace(s, input_ids=np.where((s.texts == CAPTIONED) & (s.weights > 0), 0, s.input_ids)) for s in batch]
    found = measure_captions(network, [network.see(asked)])
    assert (found["exact"], found["answer"]) == (1.0, 0.0)
