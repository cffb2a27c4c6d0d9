"""Golden cases of LLaVA-Reward's networks: one folder a family variant, as tests/golden/llava_reward/README.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.llava_reward.backbones.llava import LlavaSample
from model.llava_reward.backbones.phi3v import Phi3VSample
from model.llava_reward.backbones.qwen import QwenSample
from model.llava_reward.checkpoint import load_network
from model.llava_reward.config import read_clip_config, read_head_config
from model.llava_reward.network import RewardNetwork
from model.perspectives import Perspective
from tests.golden_cases import read_json, system_folders

SYSTEM = "llava_reward"
FAMILIES = ("phi3v", "qwen", "llava")
TOLERANCE = 1e-4
# Batched against alone, in float32: kernels may add up in another order, nothing more.
BATCH_TOLERANCE = 1e-5
ANY = Perspective.ALIGNMENT  # the cases hold one adapter at a time; its name does not matter


def family_of(folder: Path) -> str | None:
    """phi3v for a folder such as phi3v_longrope; None for what is no family."""
    return next((family for family in FAMILIES if folder.name.split("_")[0] == family), None)


def family_folders() -> list[Path]:
    """Folders that hold a backbone."""
    return [f for f in system_folders(SYSTEM) if family_of(f) and (f / "backbone").is_dir()]


def variants_of(folder: Path) -> list[Path]:
    """Folders that hold an adapter and its expected rewards."""
    return sorted(path.parent for path in folder.glob("*/expected.json"))


def has_skip_ca(variant: Path) -> bool:
    return read_head_config(variant / "adapter" / "reward_config.yaml").has_skip_ca


def expected_of(variant: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(variant / "expected.json")
    return values


def read_inputs(folder: Path, family: str) -> list[Any]:
    """The samples of a family, without padding, as ``Backbone.sample`` would make them."""
    tensors = load_file(folder / "inputs.safetensors")
    rows = zip(tensors["input_ids"], tensors["attention_mask"], strict=True)
    ids = [row[mask.bool()] for row, mask in rows]
    if family == "phi3v":
        return _phi3v(folder, tensors, ids)
    config = read_json(folder / "backbone" / "config.json")
    image_id = config["image_token_id" if family == "qwen" else "image_token_index"]
    slotted = [row.where(row != image_id, -1) for row in ids]
    return _qwen(tensors, slotted) if family == "qwen" else _llava(tensors, slotted)


def _phi3v(folder: Path, tensors: dict[str, Tensor], ids: list[Tensor]) -> list[Any]:
    crop = read_clip_config(folder / "backbone" / "clip_tower.json").image_size
    low = tensors["pixel_values_u8_low"]
    repeats = crop // low.shape[-1]
    pixels = low.repeat_interleave(repeats, -1).repeat_interleave(repeats, -2).float() / 127.5 - 1
    grids = [(int(h) // crop, int(w) // crop) for h, w in tensors["image_sizes"]]
    counts = tensors["num_valid_crops"].tolist()
    return [Phi3VSample(i, p[:n], g) for i, p, n, g in zip(ids, pixels, counts, grids, strict=True)]


def _qwen(tensors: dict[str, Tensor], ids: list[Tensor]) -> list[Any]:
    grids = tensors["image_grid_thw"]
    patches = tensors["pixel_values"].split(grids.prod(1).tolist())
    return [QwenSample(i, p, (h, w)) for i, p, (_, h, w) in zip(ids, patches, grids.tolist(), strict=True)]


def _llava(tensors: dict[str, Tensor], ids: list[Tensor]) -> list[Any]:
    sizes, counts = tensors["image_sizes"].tolist(), tensors["num_valid_patches"].tolist()
    rows = zip(ids, tensors["pixel_values"], counts, sizes, strict=True)
    return [LlavaSample(i, p[:n], (h, w)) for i, p, n, (h, w) in rows]


def read_network(
    folder: Path, family: str, variant: Path, skip_ca_keys: str | None = None, is_low_rank: bool = False
) -> RewardNetwork:
    return load_network(
        folder / "backbone",
        {ANY: variant / "adapter"},
        device=torch.device("cpu"),
        dtype=torch.float32,
        family=family,
        skip_ca_keys=skip_ca_keys,
        is_low_rank=is_low_rank,
    )


@torch.inference_mode()
def rewards(network: RewardNetwork, batch: list[Any]) -> Tensor:
    return network(batch, [ANY])[ANY]


def check_rewards(
    folder: Path, family: str, variant: Path, skip_ca_keys: str | None = None, is_low_rank: bool = False
) -> None:
    """Each sample alone, and all of them in one batch, against the reference's single-sample rewards."""
    wanted = "reward_single" if skip_ca_keys != "image_tokens" else "reward_single_keys_are_image_tokens"
    expected = torch.tensor(expected_of(variant)[wanted])
    network = read_network(folder, family, variant, skip_ca_keys, is_low_rank)
    inputs = read_inputs(folder, family)
    assert len(inputs) == len(expected)
    alone = torch.cat([rewards(network, [item]) for item in inputs])
    torch.testing.assert_close(alone, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(rewards(network, inputs), expected, atol=TOLERANCE, rtol=0)
