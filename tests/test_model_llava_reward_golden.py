"""LLaVA-Reward (phi3v) against values of the authors' released code. Layout: tests/golden/llava_reward/README.md."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.llava_reward.backbones.phi3v import Lengths
from model.llava_reward.backbones.rope import rope_tables
from model.llava_reward.checkpoint import load_network
from model.llava_reward.config import ClipConfig, read_clip_config, read_head_config
from model.llava_reward.heads import preference_probability
from model.llava_reward.network import NetworkInput, RewardBranch, RewardNetwork, strip_padding
from model.llava_reward.pixels import crops_from_pixels
from model.llava_reward.processor import hd_layout, hd_transform, num_image_tokens
from model.perspectives import Perspective
from tests.golden_cases import DEFAULT_ROOT, golden_root, read_json, require_cases, system_folders

pytestmark = pytest.mark.golden

SYSTEM = "llava_reward"
TOLERANCE = 1e-4
# Batched against alone, in float32: kernels may add up in another order, nothing more.
BATCH_TOLERANCE = 1e-5
ANY = Perspective.ALIGNMENT  # the cases hold one adapter at a time; its name does not matter
PATCH = 14

torch.set_num_threads(2)


def _variants(family: Path) -> list[Path]:
    return sorted(path.parent for path in family.glob("*/expected.json"))


def _pictures(folder: Path) -> list[dict[str, object]]:
    path = folder / "expected.json"
    return read_json(path).get("cases", []) if path.exists() else []


PHI3V = [folder for folder in system_folders(SYSTEM) if folder.name.startswith("phi3v")]
FAMILIES = [folder for folder in PHI3V if (folder / "backbone").is_dir()]
VARIANTS = [(family, variant) for family in FAMILIES for variant in _variants(family)]
PICTURES = [(folder, case) for folder in PHI3V for case in _pictures(folder)]
SIZE_TABLES = [p for folder in PHI3V for p in sorted(folder.glob("size_table_crops*.json"))]


def _variant_id(value: object) -> str:
    return "-".join(p.name for p in value) if isinstance(value, tuple) else str(value)


variants = pytest.mark.parametrize("case", VARIANTS, ids=_variant_id)
pictures = pytest.mark.parametrize(
    ("folder", "case"), PICTURES, ids=lambda v: v["key"] if isinstance(v, dict) else v.name
)


def read_inputs(family: Path) -> list[NetworkInput]:
    """The samples of a family, without padding, pixels rebuilt as its README says."""
    tensors = load_file(family / "inputs.safetensors")
    crop = read_clip_config(family / "backbone" / "clip_tower.json").image_size
    low = tensors["pixel_values_u8_low"]
    repeats = crop // low.shape[-1]
    pixels = low.repeat_interleave(repeats, -1).repeat_interleave(repeats, -2).float() / 127.5 - 1
    ids = strip_padding(tensors["input_ids"], tensors["attention_mask"])
    grids = [(int(h) // crop, int(w) // crop) for h, w in tensors["image_sizes"]]
    counts = tensors["num_valid_crops"].tolist()
    return [NetworkInput(i, p[:n], g) for i, p, n, g in zip(ids, pixels, counts, grids, strict=True)]


def read_network(family: Path, variant: Path) -> RewardNetwork:
    return load_network(
        family / "backbone", {ANY: variant / "adapter"}, device=torch.device("cpu"), dtype=torch.float32
    )


@torch.inference_mode()
def rewards(network: RewardNetwork, batch: list[NetworkInput]) -> Tensor:
    return network(batch, [ANY])[ANY]


def check_rewards(family: Path, variant: Path) -> None:
    """Each sample alone, and all of them in one batch, against the reference's single-sample rewards."""
    expected = torch.tensor(read_json(variant / "expected.json")["reward_single"])
    network, inputs = read_network(family, variant), read_inputs(family)
    assert len(inputs) == len(expected)
    alone = torch.cat([rewards(network, [item]) for item in inputs])
    torch.testing.assert_close(alone, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(rewards(network, inputs), expected, atol=TOLERANCE, rtol=0)


def test_the_system_has_cases() -> None:
    require_cases(SYSTEM, VARIANTS + PICTURES + SIZE_TABLES)
    used = {family for family, _ in VARIANTS} | {folder for folder, _ in PICTURES} | {p.parent for p in SIZE_TABLES}
    assert [folder.name for folder in PHI3V if folder not in used] == [], "folders without any case"
    if golden_root() == DEFAULT_ROOT:
        assert all((VARIANTS, PICTURES, SIZE_TABLES))


@variants
def test_rewards_equal_the_reference(case: tuple[Path, Path]) -> None:
    check_rewards(*case)


@variants
def test_any_batch_gives_the_reward_of_the_sample_alone(case: tuple[Path, Path]) -> None:
    network, inputs = read_network(*case), read_inputs(case[0])
    alone = torch.cat([rewards(network, [item]) for item in inputs])
    indices = range(len(inputs))
    neighbours = itertools.pairwise((*indices, *reversed(indices)))
    batches = [*neighbours, tuple(indices), tuple(reversed(indices)), (*indices, *indices)]
    for batch in batches:
        got = rewards(network, [inputs[i] for i in batch])
        torch.testing.assert_close(got, alone[list(batch)], atol=BATCH_TOLERANCE, rtol=0)


@variants
@torch.inference_mode()
def test_hidden_states_of_the_end_token_equal_the_reference(case: tuple[Path, Path]) -> None:
    expected = read_json(case[1] / "expected.json")
    network, inputs = read_network(*case), read_inputs(case[0])
    branch = network.branches[str(ANY)]
    assert isinstance(branch, RewardBranch)
    merged = network.vision([i.crops for i in inputs], [i.grid for i in inputs])
    ids = pad_sequence([i.input_ids for i in inputs], batch_first=True)
    lengths = Lengths(torch.tensor([len(i.input_ids) for i in inputs]), ids.shape[1])
    assert lengths.counts.tolist() == expected["lengths"]
    rope = rope_tables(lengths.counts, lengths.padded, network.config.rope)
    projected = [branch.model.vision_embed_tokens(m) for m in merged]
    end = branch.model.end_hidden(branch.model.embed(ids, torch.cat(projected)), rope, lengths)
    for name, got in (
        ("eos_final_norm_hidden_single", end),
        ("eos_head_input_single", branch.head_input(end, projected)),
    ):
        torch.testing.assert_close(got, torch.tensor(expected[name]), atol=TOLERANCE, rtol=0)


@variants
def test_preference_probabilities_equal_the_reference(case: tuple[Path, Path]) -> None:
    expected = read_json(case[1] / "expected.json")
    head = read_head_config(case[1] / "adapter" / "reward_config.yaml")
    assert head.tau == expected["tau"]
    values = rewards(read_network(*case), read_inputs(case[0])).tolist()
    for i, j, probability in expected["pair_prob_single_i_beats_j"]:
        assert preference_probability(values[i], values[j], head.tau) == pytest.approx(probability, abs=TOLERANCE)


def _clip(crop: int) -> ClipConfig:
    return ClipConfig(1024, 4096, 24, 16, crop, PATCH, 1e-5)


def check_picture(folder: Path, case: dict, picture: Image.Image) -> None:
    """One picture through preprocessing, against the reference's samples and statistics of every crop."""
    slots, _, crop, _ = case["pixel_values_shape"]
    padded = hd_transform(picture.convert("RGB"), num_crops=case["num_crops"], crop_size=crop)
    assert [padded.height, padded.width] == case["image_sizes"]
    assert num_image_tokens(padded.width, padded.height, _clip(crop)) == case["num_img_tokens"]
    crops = crops_from_pixels(torch.tensor(np.array(padded))[None], crop)[0]
    assert len(crops) == case["valid_crops"]
    values = torch.cat((crops, torch.zeros(slots - len(crops), *crops.shape[1:])))
    expected = load_file(folder / "expected.safetensors")
    for name, got in (
        ("sample", values[:, :, 3::37, 5::41]),
        ("crop_mean", values.mean((2, 3))),
        ("crop_std", values.std((2, 3), correction=0)),
    ):
        torch.testing.assert_close(got, expected[f"{case['key']}_{name}"], atol=TOLERANCE, rtol=0)


@pictures
def test_preprocessing_equals_the_reference(folder: Path, case: dict) -> None:
    check_picture(folder, case, Image.open(folder / case["file"]))


def check_sizes(table: list[dict], num_crops: int) -> None:
    for row in table:
        padded = hd_layout(row["width"], row["height"], num_crops=num_crops, crop_size=336).padded
        tokens = num_image_tokens(*padded, _clip(336))
        assert (*padded, tokens) == (row["padded_width"], row["padded_height"], row["num_img_tokens"]), row


@pytest.mark.parametrize("path", SIZE_TABLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_sizes_and_token_counts_equal_the_reference(path: Path) -> None:
    match = re.fullmatch(r"size_table_crops(\d+)", path.stem)
    assert match
    check_sizes(read_json(path), int(match[1]))


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


LM = "model.layers.{last}."
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
WEIGHTS = (
    ("backbone/model.safetensors", LM + "self_attn.qkv_proj.weight"),
    ("backbone/model.safetensors", LM + "input_layernorm.weight"),
    ("backbone/model.safetensors", "model.norm.weight"),
    ("backbone/model.safetensors", TOWER + "embeddings.class_embedding"),
    ("backbone/model.safetensors", TOWER + "encoder.layers.0.mlp.fc2.bias"),
    ("backbone/model.safetensors", "model.vision_embed_tokens.sub_GN"),
    ("{variant}/adapter/lora/adapter_model.bin", LM + "mlp.down_proj.lora_B.weight"),
    ("{variant}/adapter/pytorch_model.bin", "model.vision_embed_tokens.img_projection.0.weight"),
    ("{variant}/adapter/pytorch_model.bin", "W_v.weight"),
    ("{variant}/adapter/pytorch_model.bin", "value_head.weight"),
)


@pytest.fixture(params=FAMILIES, ids=lambda p: p.name)
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a family that may be damaged, and its richest variant."""
    family = shutil.copytree(request.param, tmp_path / "family")
    for path in family.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    found = _variants(family)
    with_skip_ca = [v for v in found if read_head_config(v / "adapter" / "reward_config.yaml").has_skip_ca]
    return family, (with_skip_ca or found)[0]


@pytest.mark.parametrize(("file", "name"), WEIGHTS, ids=[name.rsplit("}.")[-1] for _, name in WEIGHTS])
def test_one_changed_weight_is_noticed(copied: tuple[Path, Path], file: str, name: str) -> None:
    family, variant = copied
    if name.startswith("W_") and not read_head_config(variant / "adapter" / "reward_config.yaml").has_skip_ca:
        pytest.skip("this family has no SkipCA variant")
    last = read_json(family / "backbone" / "config.json")["num_hidden_layers"] - 1
    _change(family / file.format(variant=variant.name), lambda tensors: _bump(tensors[name.format(last=last)]))
    with pytest.raises(AssertionError):
        check_rewards(family, variant)


def _other_word(tensors: dict[str, Tensor]) -> None:
    before_end = int(tensors["attention_mask"][0].nonzero()[-2])
    ids = tensors["input_ids"]
    ids[0, before_end] += 1 if ids[0, before_end] < 5 else -1


def _darker_crop(tensors: dict[str, Tensor]) -> None:
    tensors["pixel_values_u8_low"][0, 1] //= 2


@pytest.mark.parametrize("edit", [_other_word, _darker_crop])
def test_one_changed_input_is_noticed(copied: tuple[Path, Path], edit: Edit) -> None:
    family, variant = copied
    _change(family / "inputs.safetensors", edit)
    with pytest.raises(AssertionError):
        check_rewards(family, variant)


@pictures
def test_one_changed_picture_is_noticed(folder: Path, case: dict) -> None:
    pixels = np.array(Image.open(folder / case["file"]).convert("RGB"))
    block = pixels[: max(2, len(pixels) // 8), : max(2, pixels.shape[1] // 8)]
    block += np.uint8(40)  # wraps around, and so changes every value
    with pytest.raises(AssertionError):
        check_picture(folder, case, Image.fromarray(pixels))


@pytest.mark.parametrize("path", SIZE_TABLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_one_changed_size_is_noticed(path: Path) -> None:
    table = read_json(path)
    table[-1]["num_img_tokens"] += 1
    with pytest.raises(AssertionError):
        check_sizes(table, int(path.stem.removeprefix("size_table_crops")))
