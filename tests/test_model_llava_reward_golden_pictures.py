"""HD preprocessing of phi3v against the authors' released code. Layout: tests/golden/llava_reward/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.llava_reward.config import ClipConfig
from model.llava_reward.pixels import crops_from_pixels
from model.llava_reward.processor import hd_layout, hd_transform, num_image_tokens
from tests.golden_cases import DEFAULT_ROOT, golden_root, read_json, require_cases, system_folders
from tests.llava_reward_cases import SYSTEM, TOLERANCE

pytestmark = pytest.mark.golden

PATCH = 14


def _pictures(folder: Path) -> list[dict[str, object]]:
    path = folder / "expected.json"
    return read_json(path).get("cases", []) if path.exists() else []


FOLDERS = [folder for folder in system_folders(SYSTEM) if folder.name.startswith("phi3v")]
PICTURES = [(folder, case) for folder in FOLDERS for case in _pictures(folder)]
SIZE_TABLES = [p for folder in FOLDERS for p in sorted(folder.glob("size_table_crops*.json"))]

pictures = pytest.mark.parametrize(
    ("folder", "case"), PICTURES, ids=lambda v: v["key"] if isinstance(v, dict) else v.name
)


def test_the_system_has_cases() -> None:
    require_cases(SYSTEM, list(system_folders(SYSTEM)))
    if golden_root() == DEFAULT_ROOT:
        assert all((PICTURES, SIZE_TABLES))


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
