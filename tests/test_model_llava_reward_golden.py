"""LLaVA-Reward's networks against values of the authors' released code. Layout: tests/golden/llava_reward/README.md."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.llava_reward.checkpoint import load_network
from model.llava_reward.config import read_head_config
from model.llava_reward.heads import preference_probability
from model.perspectives import Perspective
from tests.golden_cases import DEFAULT_ROOT, golden_root, read_json, require_cases
from tests.llava_reward_cases import (
    ANY,
    BATCH_TOLERANCE,
    FAMILIES,
    SYSTEM,
    TOLERANCE,
    check_rewards,
    expected_of,
    family_folders,
    family_of,
    has_skip_ca,
    read_inputs,
    read_network,
    rewards,
    variants_of,
)

pytestmark = pytest.mark.golden

torch.set_num_threads(2)


@dataclass(frozen=True)
class Case:
    folder: Path
    family: str
    variant: Path
    skip_ca_keys: str | None = None
    is_low_rank: bool = False

    def __str__(self) -> str:
        form = "low_rank" if self.is_low_rank else None
        return "-".join(filter(None, (self.folder.name, self.variant.name, self.skip_ca_keys, form)))

    @property
    def path(self) -> tuple[Path, str, Path, str | None, bool]:
        return self.folder, self.family, self.variant, self.skip_ca_keys, self.is_low_rank


def _cases() -> list[Case]:
    cases = []
    for folder in family_folders():
        family = family_of(folder)
        assert family is not None
        for variant in variants_of(folder):
            two = family == "qwen" and has_skip_ca(variant)
            cases += [
                Case(folder, family, variant, keys, is_low_rank)
                for keys in (("released", "image_tokens") if two else (None,))
                for is_low_rank in (False, True)
            ]
    return cases


CASES = _cases()
HIDDEN = "eos_final_norm_hidden_single"  # not stored for every family
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_the_system_has_cases() -> None:
    require_cases(SYSTEM, CASES)
    used = {case.folder for case in CASES}
    assert [folder.name for folder in family_folders() if folder not in used] == [], "folders without any case"
    if golden_root() == DEFAULT_ROOT:
        assert {case.family for case in CASES} == set(FAMILIES)


@every_case
def test_rewards_equal_the_reference(case: Case) -> None:
    check_rewards(*case.path)


@every_case
def test_any_batch_gives_the_reward_of_the_sample_alone(case: Case) -> None:
    network, inputs = read_network(*case.path), read_inputs(case.folder, case.family)
    alone = torch.cat([rewards(network, [item]) for item in inputs])
    indices = range(len(inputs))
    neighbours = itertools.pairwise((*indices, *reversed(indices)))
    batches = [*neighbours, tuple(indices), tuple(reversed(indices)), (*indices, *indices)]
    for batch in batches:
        got = rewards(network, [inputs[i] for i in batch])
        torch.testing.assert_close(got, alone[list(batch)], atol=BATCH_TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if HIDDEN in expected_of(case.variant)], ids=str)
@torch.inference_mode()
def test_hidden_states_of_the_end_token_equal_the_reference(case: Case) -> None:
    expected = expected_of(case.variant)
    network, inputs = read_network(*case.path), read_inputs(case.folder, case.family)
    if "lengths" in expected:
        assert [len(item.input_ids) for item in inputs] == expected["lengths"]
    branch = network.branch(ANY)
    shared = network.backbone.share(network.vision, inputs)
    tokens = network.backbone.project(branch.model, shared)
    ends = network._ends_together if case.is_low_rank else network._ends_apart
    ((_, end),) = ends(shared, [ANY], [tokens])
    pairs = [(HIDDEN, end.hidden)]
    if case.skip_ca_keys != "image_tokens":  # the head's input was stored for the released keys
        pairs.append(("eos_head_input_single", branch.head_input(end)))
    for name, got in pairs:
        torch.testing.assert_close(got, torch.tensor(expected[name]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("folder", family_folders(), ids=lambda folder: folder.name)
@torch.inference_mode()
def test_adapters_in_one_network_equal_the_reference(folder: Path, is_low_rank: bool) -> None:
    variants = dict(zip(Perspective, variants_of(folder), strict=False))  # as many as there are perspectives
    family = family_of(folder)
    assert family is not None
    network = load_network(
        folder / "backbone",
        {p: variant / "adapter" for p, variant in variants.items()},
        device=torch.device("cpu"),
        dtype=torch.float32,
        family=family,
        is_low_rank=is_low_rank,
    )
    got = network(read_inputs(folder, family), list(variants))
    for perspective, variant in variants.items():
        expected = torch.tensor(expected_of(variant)["reward_single"])
        torch.testing.assert_close(got[perspective], expected, atol=TOLERANCE, rtol=0)


# Stored for the released keys.
@pytest.mark.parametrize("case", [case for case in CASES if case.skip_ca_keys != "image_tokens"], ids=str)
def test_preference_probabilities_equal_the_reference(case: Case) -> None:
    expected = expected_of(case.variant)
    head = read_head_config(case.variant / "adapter" / "reward_config.yaml")
    assert head.tau == expected["tau"]
    values = rewards(read_network(*case.path), read_inputs(case.folder, case.family)).tolist()
    for i, j, probability in expected["pair_prob_single_i_beats_j"]:
        assert preference_probability(values[i], values[j], head.tau) == pytest.approx(probability, abs=TOLERANCE)


# --- each comparison above fails when one number of its case is changed ---


Edit = Callable[[dict[str, Tensor]], None]


def _change(path: Path, edit: Edit) -> None:
    is_plain = path.suffix == ".safetensors"
    tensors = load_file(path) if is_plain else torch.load(path, weights_only=True)
    edit(tensors)
    if is_plain:
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _bump(tensor: Tensor) -> None:
    """Move the largest entry away from zero: small enough to be one wrong number, large enough to be seen."""
    flat = tensor.view(-1)
    index = int(flat.abs().argmax())
    flat[index] += flat[index].sign()


BACKBONE = "backbone/model.safetensors"
LORA, HEAD = "{variant}/adapter/lora/adapter_model.bin", "{variant}/adapter/pytorch_model.bin"
PHI_TOWER = "model.vision_embed_tokens.img_processor.vision_model."
LLAVA_TOWER = "vision_tower.vision_model."
WEIGHTS = {
    "phi3v": (
        (BACKBONE, "model.layers.{last}.self_attn.qkv_proj.weight"),
        (BACKBONE, "model.layers.{last}.input_layernorm.weight"),
        (BACKBONE, "model.norm.weight"),
        (BACKBONE, PHI_TOWER + "embeddings.class_embedding"),
        (BACKBONE, PHI_TOWER + "encoder.layers.0.mlp.fc2.bias"),
        (BACKBONE, "model.vision_embed_tokens.sub_GN"),
        (LORA, "model.layers.{last}.mlp.down_proj.lora_B.weight"),
        (HEAD, "model.vision_embed_tokens.img_projection.0.weight"),
        (HEAD, "W_v.weight"),
        (HEAD, "value_head.weight"),
    ),
    "qwen": (
        (BACKBONE, "model.layers.{last}.self_attn.k_proj.bias"),
        (BACKBONE, "model.layers.{last}.input_layernorm.weight"),
        (BACKBONE, "model.norm.weight"),
        (BACKBONE, "visual.patch_embed.proj.weight"),
        (BACKBONE, "visual.blocks.0.attn.qkv.bias"),
        (LORA, "model.layers.{last}.mlp.down_proj.lora_B.weight"),
        (HEAD, "visual.merger.ln_q.weight"),
        (HEAD, "visual.merger.mlp.0.weight"),
        (HEAD, "ca_layernorm.weight"),
        (HEAD, "W_v.weight"),
        (HEAD, "value_head.weight"),
    ),
    "llava": (
        (BACKBONE, "language_model.model.layers.{last}.self_attn.q_proj.weight"),
        (BACKBONE, "language_model.model.norm.weight"),
        (BACKBONE, "image_newline"),
        (BACKBONE, LLAVA_TOWER + "embeddings.class_embedding"),
        (BACKBONE, LLAVA_TOWER + "encoder.layers.0.mlp.fc2.bias"),
        (LORA, "language_model.model.layers.{last}.mlp.down_proj.lora_B.weight"),
        (HEAD, "multi_modal_projector.linear_1.weight"),
        (HEAD, "value_head.weight"),
    ),
}


def _richest() -> dict[Path, Case]:
    """Per folder the last merged case in this order: without SkipCA, with it, with it and keys of its own."""
    merged = (case for case in CASES if not case.is_low_rank)
    ranked = sorted(merged, key=lambda case: (has_skip_ca(case.variant), case.skip_ca_keys == "image_tokens"))
    return {case.folder: case for case in ranked}


RICHEST = _richest()
CHANGED_WEIGHTS = [(case, *weight) for case in RICHEST.values() for weight in WEIGHTS[case.family]]


def _copy(case: Case, tmp_path: Path) -> Case:
    """A copy of a case that may be damaged."""
    folder = shutil.copytree(case.folder, tmp_path / case.folder.name)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Case(folder, case.family, folder / case.variant.name, case.skip_ca_keys)


def _id(value: object) -> str:
    return value.folder.name if isinstance(value, Case) else str(value).rsplit("}.")[-1]


@pytest.mark.parametrize(("case", "file", "name"), CHANGED_WEIGHTS, ids=_id)
def test_one_changed_weight_is_noticed(case: Case, file: str, name: str, tmp_path: Path) -> None:
    if name.startswith(("W_", "ca_")) and not has_skip_ca(case.variant):
        pytest.skip("this family has no SkipCA variant")
    copied = _copy(case, tmp_path)
    config = read_json(copied.folder / "backbone" / "config.json")
    last = config.get("text_config", config)["num_hidden_layers"] - 1
    path = copied.folder / file.format(variant=copied.variant.name)
    _change(path, lambda tensors: _bump(tensors[name.format(last=last)]))
    with pytest.raises(AssertionError):
        check_rewards(*copied.path)


def _other_word(tensors: dict[str, Tensor]) -> None:
    before_end = int(tensors["attention_mask"][0].nonzero()[-2])
    ids = tensors["input_ids"]
    ids[0, before_end] += 1 if ids[0, before_end] < 5 else -1


def _darker(tensors: dict[str, Tensor]) -> None:
    if "pixel_values_u8_low" in tensors:
        tensors["pixel_values_u8_low"][0, 1] //= 2
    elif "image_grid_thw" in tensors:  # of the last sample
        tensors["pixel_values"][-8:] -= 1
    else:
        tensors["pixel_values"][0, 1] -= 1


@pytest.mark.parametrize("case", RICHEST.values(), ids=lambda case: case.folder.name)
@pytest.mark.parametrize("edit", [_other_word, _darker])
def test_one_changed_input_is_noticed(case: Case, edit: Edit, tmp_path: Path) -> None:
    copied = _copy(case, tmp_path)
    _change(copied.folder / "inputs.safetensors", edit)
    with pytest.raises(AssertionError):
        check_rewards(*copied.path)
