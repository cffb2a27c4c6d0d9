"""The scene tokenizer: short for scenes, and able to encode any text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from model.llava_reward.prompt_tokens import PromptTokenizer
from model.llava_reward.scene_tokenizer import build_scene_tokenizer
from model.scene_captions import caption_of
from model.scenes import draw


@pytest.fixture(scope="module")
def built() -> Tokenizer:
    return build_scene_tokenizer()


@pytest.fixture
def tokenizer(built: Tokenizer, tmp_path: Path) -> PromptTokenizer:
    built.save(str(tmp_path / "tokenizer.json"))
    return PromptTokenizer(tmp_path / "tokenizer.json")


def _words(text: str) -> int:
    """Words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def test_it_is_the_same_in_every_run(built: Tokenizer) -> None:
    assert build_scene_tokenizer().to_str() == built.to_str()
    assert built.get_vocab_size() < 1000


def test_a_word_of_a_scene_is_one_token(tokenizer: PromptTokenizer) -> None:
    for seed in range(1000, 1060):
        scene = draw(seed, size=(64, 64))
        # start token, blank and line feed before the prompt, end token behind it
        assert len(tokenizer.after_image(scene.prompt)) == _words(scene.prompt) + 4, scene.prompt
        caption = caption_of(scene, has_prompt=True).text()
        assert len(tokenizer.inner_ids(caption)) == _words(caption), caption


@pytest.mark.parametrize("text", ["", "a red ball", "Ünïcode 🎨 中文", " two  blanks ", "<|endoftext|><s>", "\x00\n\t"])
def test_any_text_comes_back(built: Tokenizer, tokenizer: PromptTokenizer, text: str) -> None:
    assert built.decode(tokenizer.inner_ids(text), skip_special_tokens=False) == text
    assert tokenizer.end_id not in tokenizer.inner_ids(text)
