"""Pictures and text of qwen and llava: by hand, and against the image processors of transformers (those on Pillow).

``fetch_image``, which resizes a qwen picture first, is in no installed library: its sizes are checked by hand, and its
resize is Pillow's own.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

from model.errors import ConfigError, ErrorCode, InputError
from model.llava_reward.backbones.qwen import mrope_positions
from model.llava_reward.bundle import read_bundle
from model.llava_reward.llava_inputs import LlavaInputs, best_pinpoint, fitted_size, num_image_tokens
from model.llava_reward.model_config import LlavaConfig, read_llava_config
from model.llava_reward.pixels import normalised, patches_from_pixels
from model.llava_reward.processor import LlavaRewardPreprocessor, load_preprocessor
from model.llava_reward.prompt_tokens import LLAVA_TEXT, QWEN_TEXT, PromptTokenizer
from model.llava_reward.qwen_inputs import FETCH_PIXELS, PROCESSOR_PIXELS, QwenInputs, smart_resize
from model.schema import Generation
from tests.llava_reward_bundles import (
    GOLDEN,
    LLAVA_SPECIAL,
    QWEN_SPECIAL,
    llava_tokenizer,
    qwen_tokenizer,
    write_bundle,
)

ROOT = Path(__file__).parents[1]
SIZES = ((64, 64), (300, 90), (90, 300), (333, 211), (41, 700), (1030, 515), (1500, 1100))
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # of llava-v1.6-vicuna-13b


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise(width, height).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("inputs") / "qwen", "qwen", {"safety": "bt_plain"})


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("inputs") / "llava", "llava", {"safety": "bt_plain"})


# --- pictures of qwen ---


def test_qwen_sizes_by_hand() -> None:
    # 1024/28 = 36.57, to 37*28 = 1036; 1036^2 = 1073296 is above 1003520: 1036 / sqrt(1073296/1003520) = 1001.8, to
    # 35*28 = 980.
    assert smart_resize(1024, 1024, factor=28, pixels=FETCH_PIXELS) == (1036, 1036)
    assert smart_resize(1036, 1036, factor=28, pixels=PROCESSOR_PIXELS) == (980, 980)
    # Below the least: sqrt(200704/(56*84)) = 6.532; 56 and 84 times that are 365.8 and 548.7, up to 392 and 560.
    assert smart_resize(56, 84, factor=28, pixels=PROCESSOR_PIXELS) == (392, 560)
    # 10 rounds to nothing, but a side keeps one token: 28; then 28*56 = 1568 < 3136: sqrt(3136/(10*50)) = 2.504,
    # 25.04 up to 28 and 125.2 up to 140.
    assert smart_resize(10, 50, factor=28, pixels=FETCH_PIXELS) == (28, 140)


@pytest.mark.parametrize("size", [(8200, 40), (40, 8200), (201, 1)])
def test_qwen_too_narrow(qwen: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="more than 200 times") as caught:
        QwenInputs(read_bundle(qwen)).picture(Image.new("RGB", size))
    assert caught.value.code is ErrorCode.IMAGE_TOO_NARROW


def test_qwen_narrow_only_after_rounding(qwen: Path) -> None:
    # 8200/41 is 200 exactly, but 41 rounds to 28 and 8200 to 8204, which is 293 times as much.
    with pytest.raises(InputError, match="8204x28"):
        QwenInputs(read_bundle(qwen)).picture(Image.new("RGB", (8200, 41)))


@pytest.mark.parametrize("pixels", [FETCH_PIXELS, PROCESSOR_PIXELS])
def test_qwen_sizes_equal_transformers(pixels: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    for width, height in draw.integers(28, 4000, (500, 2)).tolist():
        theirs = qwen2_vl.smart_resize(height, width, 28, *pixels)
        assert smart_resize(width, height, factor=28, pixels=pixels) == theirs[::-1]


def test_qwen_image_tokens_stay_within_the_most(qwen: Path) -> None:
    inputs = QwenInputs(read_bundle(qwen))
    assert inputs.max_image_tokens == 1280
    for width, height in np.random.default_rng(4).integers(20, 3000, (500, 2)).tolist():
        if max(width, height) <= 200 * min(width, height):
            first = smart_resize(width, height, factor=28, pixels=FETCH_PIXELS)
            second = smart_resize(*first, factor=28, pixels=PROCESSOR_PIXELS)
            assert 256 <= second[0] * second[1] // 784 <= 1280


@pytest.mark.parametrize("size", SIZES)
def test_qwen_patches_equal_transformers(qwen: Path, size: tuple[int, int]) -> None:
    image = noise(*size)
    arrays, tokens = QwenInputs(read_bundle(qwen)).picture(image)
    least, most = PROCESSOR_PIXELS
    processor = qwen2_vl.Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most})
    fetched = image.resize(smart_resize(*size, factor=28, pixels=FETCH_PIXELS))  # Pillow's default is bicubic
    theirs = processor(fetched, return_tensors="np")
    assert arrays["pixels"].dtype == np.uint8
    assert [1, *(side // 14 for side in arrays["pixels"].shape[:2])] == theirs["image_grid_thw"][0].tolist()
    assert tokens == theirs["image_grid_thw"].prod() // 4
    patches = patches_from_pixels(torch.tensor(arrays["pixels"]), 14, 2, 2)
    np.testing.assert_allclose(patches.numpy(), theirs["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (1, 7)])
def test_qwen_positions_equal_transformers(grid: tuple[int, int]) -> None:
    rows, columns = grid
    ids = torch.tensor([[9, 8, *[-1] * (rows * columns), 7, 6, 5]])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config, get_vision_position_ids=None)
    model.get_vision_position_ids = lambda *a, **k: Qwen2_5_VLModel.get_vision_position_ids(model, *a, **k)
    theirs, _ = Qwen2_5_VLModel.get_rope_index(
        model, ids, (ids < 0).int(), image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]])
    )
    assert mrope_positions(ids[0], rows, columns).tolist() == theirs[:, 0].tolist()


# --- pictures of llava ---


@pytest.mark.parametrize("size", SIZES)
def test_llava_tiles_equal_transformers(llava: Path, size: tuple[int, int]) -> None:
    image = noise(*size)
    arrays, tokens = LlavaInputs(read_bundle(llava)).picture(image)
    config = read_llava_config(llava / "backbone" / "config.json")
    side = config.clip.image_size
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(p) for p in config.pinpoints],
    )
    theirs = processor(image, return_tensors="np")
    assert arrays["pixels"].dtype == np.uint8
    assert arrays["image_size"].tolist() == theirs["image_sizes"][0].tolist()
    tiles = normalised(torch.tensor(arrays["pixels"]))
    np.testing.assert_allclose(tiles.numpy(), theirs["pixel_values"][0], atol=1e-6)
    assert tokens == their_token_count(*size, config)


def their_token_count(width: int, height: int, config: LlavaConfig) -> int:
    pinpoints = [list(p) for p in config.pinpoints]
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=config.clip.patch_size,
        num_additional_image_tokens=1,
    )
    processor._get_unpadded_features = lambda *a: LlavaNextProcessor._get_unpadded_features(processor, *a)
    tile = config.clip.image_size
    return LlavaNextProcessor._get_number_of_features(processor, height, width, tile, tile) - 1


def real_llava() -> LlavaConfig:
    config = read_llava_config(GOLDEN / "llava" / "backbone" / "config.json")
    clip = config.clip.__class__(1024, 4096, 24, 16, 336, 14, 1e-5)
    return LlavaConfig(clip, PINPOINTS, 4096)


def test_llava_token_counts_equal_the_features_that_transformers_packs() -> None:
    config, draw = real_llava(), np.random.default_rng(5)
    sizes = [*draw.integers(20, 2000, (60, 2)).tolist(), [4000, 20], [20, 4000]]
    theirs = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=336, patch_size=14),
            image_grid_pinpoints=[list(p) for p in PINPOINTS],
        )
    )
    for width, height in sizes:
        pinpoint = best_pinpoint(width, height, PINPOINTS)
        tokens = num_image_tokens(width, height, config, pinpoint)
        assert tokens == their_token_count(width, height, config)
        features = torch.zeros(1 + pinpoint[0] * pinpoint[1] // 336**2, 576, 2)
        packed, _ = LlavaNextModel.pack_image_features(theirs, [features], [(height, width)], "default", torch.zeros(2))
        assert len(packed[0]) == tokens


def test_llava_layout_by_hand() -> None:
    # 800x400: of 336x672 (height first) 672*336 = 225792 pixels are kept, of 672x672 the same with more waste.
    assert best_pinpoint(800, 400, PINPOINTS) == (336, 672)
    assert fitted_size(800, 400, (336, 672)) == (672, 336)
    # The whole picture 24*24, two tiles 24*48 without padding, 24 row ends.
    assert num_image_tokens(800, 400, real_llava(), (336, 672)) == 576 + 1152 + 24
    # 300x200 in 672x672: 200*672/300 = 448.00000000000006 in floating point, rounded up. 48*200/300 = 32 rows stay.
    assert fitted_size(300, 200, (672, 672)) == (672, 449)
    assert num_image_tokens(300, 200, real_llava(), (672, 672)) == 576 + 32 * 48 + 32


def test_llava_takes_the_narrowest_picture(llava: Path) -> None:
    # Every pinpoint keeps no pixel; 56x112 wastes least. 5*8/20000 rounds to no row of patches: the whole tile is left.
    assert best_pinpoint(20000, 5, ((112, 112), (56, 112))) == (56, 112)
    arrays, tokens = LlavaInputs(read_bundle(llava)).picture(Image.new("RGB", (20000, 5)))
    assert (tokens, arrays["pixels"].shape) == (16, (3, 56, 56, 3))


# --- text ---


def saved(tokenizer: object, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))  # type: ignore[attr-defined]
    return path


PROMPTS = ("", "a red user", "  two blanks  ", "tab\tand\nnewline\n", "naïve café", "猫と犬 🐱", "a \u0065\u0301 b")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_qwen_text_is_the_published_one(tmp_path: Path, prompt: str) -> None:
    full = qwen_tokenizer()
    tokens = PromptTokenizer(saved(full, tmp_path), QWEN_TEXT)
    whole = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{prompt}<|im_end|>"
    image_id = full.token_to_id("<|image_pad|>")
    assert [*tokens.before_image, image_id, *tokens.after_image(prompt)] == full.encode(whole).ids
    assert tokens.end_id == full.token_to_id("<|im_end|>")


@pytest.mark.parametrize("is_legacy", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_llava_text_is_the_published_one(tmp_path: Path, prompt: str, is_legacy: bool) -> None:
    full = llava_tokenizer(is_legacy=is_legacy)
    tokens = PromptTokenizer(saved(full, tmp_path), LLAVA_TEXT)
    ids = [*tokens.before_image, full.token_to_id("<image>"), *tokens.after_image(prompt)]
    assert ids == full.encode(f"USER: <image>\n{prompt}</s>").ids
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_special_tokens_inside_a_prompt_are_plain_text(tmp_path: Path, family: str) -> None:
    full, text = (qwen_tokenizer(), QWEN_TEXT) if family == "qwen" else (llava_tokenizer(), LLAVA_TEXT)
    special = QWEN_SPECIAL if family == "qwen" else LLAVA_SPECIAL
    tokens = PromptTokenizer(saved(full, tmp_path), text)
    reserved = {full.token_to_id(token) for token in special}
    for token in special:
        ids = tokens.after_image(f"before {token} after{token}")
        inner = ids[1:-1] if family == "qwen" else ids[:-1]
        assert not reserved & set(inner)
        assert token in full.decode(inner, skip_special_tokens=False)


def test_the_tokenizer_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another family"):
        PromptTokenizer(saved(llava_tokenizer(), tmp_path), QWEN_TEXT)


def test_least_tokens_is_never_too_many(tmp_path: Path) -> None:
    tokens = PromptTokenizer(saved(qwen_tokenizer(), tmp_path), QWEN_TEXT)
    for prompt in ("ᾂ" * 50, "α\u0313\u0300\u0345" * 50, " user" * 50, ""):
        assert tokens.least_tokens(prompt) <= len(tokens.after_image(prompt))


# --- the whole CPU step ---


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_prepared_rows(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    rows = load_preprocessor(folder).preprocess([Generation("g", "a red", png(300, 90)), Generation("h", "x", b"junk")])
    ids = rows[0].arrays["input_ids"]
    slots = np.flatnonzero(ids == -1)
    assert ids.dtype == np.int32
    assert (np.diff(slots) == 1).all()
    # qwen: 300x90 to 308x84, then sqrt(200704/(308*84)) = 2.785 times that, up to 868x252: 31*9 tokens.
    # llava: 56x168 keeps 168x50 pixels, more than others; 12*90/300 = 3.6 of 4 rows, and the odd one is kept.
    assert len(slots) == {"qwen": 31 * 9, "llava": 4 * 4 + 4 * 12 + 4}[family]
    assert rows[1].error is not None
    assert rows[1].error.code is ErrorCode.IMAGE_NOT_AN_IMAGE


def test_preprocessing_hash_follows_the_pinpoints(llava: Path, tmp_path: Path) -> None:
    copy = write_bundle(tmp_path / "copy", "llava", {"safety": "bt_plain"})
    assert load_preprocessor(copy).preprocessing_hash == load_preprocessor(llava).preprocessing_hash
    path = copy / "backbone" / "config.json"
    values = json.loads(path.read_text())
    values["image_grid_pinpoints"] = values["image_grid_pinpoints"][:3]
    path.write_text(json.dumps(values))
    assert load_preprocessor(copy).preprocessing_hash != load_preprocessor(llava).preprocessing_hash


def test_prompt_limit_leaves_room_for_the_largest_picture(llava: Path) -> None:
    preprocessor = LlavaRewardPreprocessor(read_bundle(llava))
    # 4096 positions; 112x112 pixels take 4*4 + 8*8 + 8 = 88 tokens, and the text before them.
    assert preprocessor.max_prompt_tokens == 4096 - 88 - len(preprocessor.tokenizer.before_image)


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_the_cpu_step_loads_neither_torch_nor_transformers(family: str, request: pytest.FixtureRequest) -> None:
    code = """
import sys
from model.scorer import load_preprocessor, read_identity
load_preprocessor(sys.argv[1])
read_identity(sys.argv[1])
assert not {"torch", "transformers"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(request.getfixturevalue(family))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
