"""Picture layout, token ids and limits of LLaVA-Reward's CPU step, on the shipped checkpoint."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from model.errors import ErrorCode, InputError, Stage
from model.llava_reward.config import ClipConfig
from model.llava_reward.processor import (
    LlavaRewardPreprocessor,
    PromptTokenizer,
    hd_layout,
    hd_transform,
    load_preprocessor,
    max_image_tokens,
    num_image_tokens,
)
from model.schema import Generation
from model.scorer import Prepared, resolve

DEMO = resolve("demo")
TOKENIZER = DEMO / "backbone" / "tokenizer.json"
SPECIAL = ("<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>", "<s>", "</s>", "<unk>", "<|image_1|>", "<0x41>")


def png(width: int, height: int, colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def preprocessor() -> LlavaRewardPreprocessor:
    return load_preprocessor(DEMO)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TOKENIZER)


def prepare(preprocessor: LlavaRewardPreprocessor, prompt: str = "a cat", image: bytes | None = None) -> Prepared:
    return preprocessor.preprocess([Generation("g", prompt, png(64, 64) if image is None else image)])[0]


def test_layout_by_hand() -> None:
    # ratio 2: s*ceil(s/2) = 1, 2, 6 for s = 1, 2, 3; at most 4 crops give s = 2.
    layout = hd_layout(200, 100, num_crops=4, crop_size=112)
    assert (layout.resized, layout.padded, layout.is_transposed) == ((224, 112), (224, 112), False)
    # 3:2, 16 crops of 336: s = 4 (4*ceil(4/1.5) = 12, 5*ceil(5/1.5) = 20); 1344/1.5 = 896, padded to 1008.
    layout = hd_layout(768, 512, num_crops=16, crop_size=336)
    assert (layout.resized, layout.padded) == ((1344, 896), (1344, 1008))
    portrait = hd_layout(512, 768, num_crops=16, crop_size=336)
    assert (portrait.resized, portrait.padded, portrait.is_transposed) == ((896, 1344), (1008, 1344), True)


def test_image_tokens_by_hand() -> None:
    real = ClipConfig(1024, 4096, 24, 16, 336, 14, 1e-5)
    assert num_image_tokens(1344, 1344, real) == 17 * 144 + 1 + 5 * 12 == 2509
    assert max_image_tokens(16, real) == 2653
    small = ClipConfig(64, 128, 3, 4, 112, 14, 1e-5)
    assert num_image_tokens(224, 224, small) == 5 * 16 + 1 + 3 * 4 == 93


def test_padding_is_white_and_centred() -> None:
    padded = np.asarray(hd_transform(Image.new("RGB", (768, 512), "black"), num_crops=16, crop_size=336))
    is_white = (padded == 255).all(axis=(1, 2))
    # 1008 - 896 = 112 rows of padding: 56 above, 56 below.
    assert is_white[:56].all()
    assert not is_white[56:-56].any()
    assert is_white[-56:].all()


def test_portrait_equals_the_mirrored_landscape() -> None:
    values = np.random.default_rng(0).integers(0, 256, (70, 45, 3), dtype=np.uint8)
    portrait = hd_transform(Image.fromarray(values), num_crops=4, crop_size=112)
    landscape = hd_transform(Image.fromarray(values.transpose(1, 0, 2).copy()), num_crops=4, crop_size=112)
    assert np.array_equal(np.asarray(portrait), np.asarray(landscape).transpose(1, 0, 2))


def test_too_narrow() -> None:
    # 4 crops of 112: 448 pixels over a ratio of 1000 leave none.
    with pytest.raises(InputError, match="20000x20") as caught:
        hd_layout(20000, 20, num_crops=4, crop_size=112)
    assert caught.value.code is ErrorCode.IMAGE_TOO_NARROW
    assert hd_layout(20000, 20, num_crops=16, crop_size=336).resized == (5376, 5)


def test_prepared_row_keeps_image_facts_of_a_narrow_image(preprocessor: LlavaRewardPreprocessor) -> None:
    row = prepare(preprocessor, image=png(20000, 20))
    assert row.error is not None
    assert row.error.code is ErrorCode.IMAGE_TOO_NARROW
    assert row.image is not None
    assert (row.image.width, row.image.height, row.image.format) == (20000, 20, "PNG")


def test_layout_of_ids(preprocessor: LlavaRewardPreprocessor) -> None:
    row = prepare(preprocessor)
    ids = row.arrays["input_ids"]
    assert (row.arrays["pixels"].dtype, row.arrays["pixels"].shape) == (np.uint8, (224, 224, 3))
    assert ids.dtype == np.int32
    slots = np.flatnonzero(ids == -1)
    assert len(slots) == 93
    assert (np.diff(slots) == 1).all()
    end = Tokenizer.from_file(str(TOKENIZER)).token_to_id("<|endoftext|>")
    assert (ids[0], ids[slots[-1] + 1], ids[-1]) == (1, 1, end)
    assert (ids[:-1] != end).all()


@pytest.mark.parametrize("prompt", ["", "a red cat", "  two blanks ", "tab\tand\nnewline\n", "naïve café", "猫と犬 🐱"])
def test_ordinary_prompts_are_encoded_as_the_published_text(tokenizer: PromptTokenizer, prompt: str) -> None:
    full = Tokenizer.from_file(str(TOKENIZER))
    assert tokenizer.after_image(prompt) == full.encode(f"\n{prompt}<|endoftext|>").ids
    assert tokenizer.before_image == full.encode("<|user|>\n").ids


@pytest.mark.parametrize("spelled", SPECIAL)
@pytest.mark.parametrize("prompt", ["{}", "before {} after", "{}{}", "\n{}"])
def test_special_tokens_inside_a_prompt_are_plain_text(tokenizer: PromptTokenizer, spelled: str, prompt: str) -> None:
    text = prompt.replace("{}", spelled)
    ids = tokenizer.after_image(text)
    plain = Tokenizer.from_file(str(TOKENIZER))
    reserved = {plain.token_to_id(token) for token in SPECIAL if plain.token_to_id(token) is not None}
    assert ids[-1] == tokenizer.end_id
    assert ids[0] == 1
    assert not reserved & set(ids[1:-1])
    assert min(ids) >= 0
    # Nothing is lost: the pieces spell the prompt.
    assert plain.decode(ids[1:-1], skip_special_tokens=False) == f"\n{text}"


def test_special_tokens_not_marked_special_are_plain_text_too(tmp_path: Path) -> None:
    values = json.loads(TOKENIZER.read_text())
    for token in values["added_tokens"]:
        token["special"] = token["content"] != "</s>"  # as the published tokenizer has it
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    assert 2 not in PromptTokenizer(path).after_image("a </s> b")


@pytest.mark.parametrize(
    "prompt", ["", "a\x00b", "🎨🎨 \U0001f9d1‍\U0001f4bb", "‮right to left", "ﷺ" * 50, "\r\n\t", "x" * 2000]
)
def test_any_unicode_is_legal(preprocessor: LlavaRewardPreprocessor, prompt: str) -> None:
    row = prepare(preprocessor, prompt)
    assert row.error is None
    assert 0 not in row.arrays["input_ids"][1:]  # <unk> never occurs: bytes stand in


def test_nul_counts(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.after_image("a\x00b") != tokenizer.after_image("ab")


def test_lone_surrogate(preprocessor: LlavaRewardPreprocessor) -> None:
    row = prepare(preprocessor, "a \ud83d cat")
    assert row.error is not None
    assert (row.error.code, row.error.stage) == (ErrorCode.BAD_PROMPT, Stage.PREPROCESS)
    assert "character 2" in row.error.message


def test_prompt_too_long(preprocessor: LlavaRewardPreprocessor) -> None:
    limit = preprocessor.max_prompt_tokens
    # max_position_embeddings 4096, less 2-4 ids before the image and at most (4+1)*16 + 1 + (4+1)*4 = 101 in it
    assert limit == 4096 - 101 - len(preprocessor.tokenizer.before_image)
    row = prepare(preprocessor, "a cat and " * 5000)
    assert row.error is not None
    assert (row.error.code, row.error.stage) == (ErrorCode.PROMPT_TOO_LONG, Stage.PREPROCESS)
    assert f"max_prompt_tokens={limit}" in row.error.message
    assert "50000 characters" in row.error.message
    assert "cat" not in row.error.message


def test_absurdly_long_prompt_is_refused_without_encoding(preprocessor: LlavaRewardPreprocessor) -> None:
    row = prepare(preprocessor, "x" * 20_000_000)
    assert row.error is not None
    assert "at least" in row.error.message


def test_prompt_limit_is_exact(preprocessor: LlavaRewardPreprocessor) -> None:
    def tokens(count: int) -> int:
        return len(preprocessor.tokenizer.after_image("🎨" * count))

    longest = next(n for n in range(2000, 0, -1) if tokens(n) <= preprocessor.max_prompt_tokens)
    assert prepare(preprocessor, "🎨" * longest).error is None
    assert prepare(preprocessor, "🎨" * (longest + 1)).error is not None


def test_padding_and_truncation_in_the_tokenizer_file_have_no_effect(tmp_path: Path) -> None:
    full = Tokenizer.from_file(str(TOKENIZER))
    full.enable_truncation(8)
    full.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    full.save(str(path))
    prompt = "a red circle above a blue square " * 4
    assert PromptTokenizer(path).after_image(prompt) == PromptTokenizer(TOKENIZER).after_image(prompt)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scorer.json", lambda v: v.update(num_crops=3)),
        ("scorer.json", lambda v: v.update(max_prompt_tokens=77)),
        ("scorer.json", lambda v: v.update(max_image_pixels=10_000)),
        ("backbone/tokenizer.json", lambda v: v["added_tokens"][-1].update(rstrip=False)),
    ],
)
def test_preprocessing_hash_follows_what_decides_the_arrays(tmp_path: Path, file: str, change) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    assert load_preprocessor(copy).preprocessing_hash == load_preprocessor(DEMO).preprocessing_hash
    values = json.loads((copy / file).read_text())
    change(values)
    (copy / file).write_text(json.dumps(values))
    assert load_preprocessor(copy).preprocessing_hash != load_preprocessor(DEMO).preprocessing_hash


def test_preprocessor_and_identity_load_no_torch() -> None:
    code = """
import sys
from model.scorer import load_preprocessor, read_identity
from model.fake import FakeScorer
from model.schema import Generation
FakeScorer()
preprocessor = load_preprocessor("demo")
identity = read_identity("demo")
assert preprocessor.preprocess([Generation("g", "a cat", open(sys.argv[1], "rb").read())])[0].error is None
assert not {"torch", "ray", "boto3", "obstore", "pyarrow"} & set(sys.modules), sorted(sys.modules)
print(preprocessor.preprocessing_hash == identity.preprocessing_hash)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEMO / "golden" / "0.png")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
