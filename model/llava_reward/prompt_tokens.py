"""Token ids of the text around the image, from a ``tokenizer.json``. Needs the library tokenizers, never torch.

A prompt is always plain text: special tokens spelled inside it are encoded as their characters, so it can neither
move the end token nor add an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.errors import ConfigError
from model.llava_reward.config import read_json

# Characters that Unicode's composition (NFC), which some tokenizers start with, may join into one, at most.
_MOST_COMPOSED = 4


@dataclass(frozen=True)
class PromptText:
    """The published text of a family: ``before``, image, ``opening``, ``lead``, the prompt, ``end``.

    - image: the token that stands for the image where the text is encoded as one; None where the image splits it
      into two parts that are encoded apart, each with its own start token
    - opening: a special token right behind the image, or nothing; end: the token whose hidden state is the reward's
    """

    before: str
    image: str | None
    opening: str
    lead: str
    end: str


# What the released code's chat templates come to, after its cuts.
PHI3V_TEXT = PromptText("<|user|>\n", None, "", "\n", "<|endoftext|>")
QWEN_TEXT = PromptText("<|im_start|>user\n<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "", "<|im_end|>")
LLAVA_TEXT = PromptText("USER: ", "<image>", "", "\n", "</s>")


class PromptTokenizer:
    """Encodes prompts for one family. Thread-safe.

    - raises: ``ConfigError`` if the file is no tokenizer, lacks one of the family's tokens, or would encode the
      whole text otherwise than its parts
    """

    def __init__(self, path: Path, text: PromptText = PHI3V_TEXT) -> None:
        values = read_json(path)
        full = _tokenizer(path, values)
        self._text = text
        self._plain = _plain_tokenizer(path, values, is_inner=text.image is not None)
        self.end_id = _token_id(path, full, text.end)
        self._opening = [_token_id(path, full, text.opening)] if text.opening else []
        self.before_image: list[int] = self._before(path, full)
        self.max_token_chars = max(map(len, full.get_vocab()))
        self._check_probe(path, full)

    def _before(self, path: Path, full: tokenizers.Tokenizer) -> list[int]:
        if self._text.image is None:
            ids: list[int] = full.encode(self._text.before).ids
            return ids
        image_id = _token_id(path, full, self._text.image)
        ids = full.encode(self._text.before + self._text.image).ids
        return ids[: ids.index(image_id)]

    def _check_probe(self, path: Path, full: tokenizers.Tokenizer) -> None:
        text, probe = self._text, "a probe "
        behind = f"{text.opening}{text.lead}{probe}{text.end}"
        if text.image is None:
            whole, parts = full.encode(behind).ids, self.after_image(probe)
        else:
            whole = full.encode(text.before + text.image + behind).ids
            parts = [*self.before_image, _token_id(path, full, text.image), *self.after_image(probe)]
        if whole != parts:
            raise ConfigError(f"{path}: encoding plain text and {text.end} apart differs from encoding them together")

    def after_image(self, prompt: str) -> list[int]:
        """Ids of the part behind the image, end token included."""
        is_part = self._text.image is None
        plain = self._plain.encode(f"{self._text.lead}{prompt}", add_special_tokens=is_part).ids
        return [*self._opening, *plain, self.end_id]

    def inner_ids(self, text: str) -> list[int]:
        """Ids of a piece of plain text that begins or ends nothing: no start token, no end token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def least_tokens(self, prompt: str) -> int:
        """A number of tokens that the prompt certainly exceeds or equals, without the cost of encoding it."""
        return len(prompt) // (self.max_token_chars * _MOST_COMPOSED)


def _token_id(path: Path, tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ConfigError(f"{path} has no token {token}; it is the tokenizer of another family of checkpoints")
    return found


def _plain_tokenizer(path: Path, values: dict[str, Any], *, is_inner: bool) -> tokenizers.Tokenizer:
    """The same tokenizer, to which special tokens are text. ``is_inner``: it encodes what follows a special token."""
    values = json.loads(json.dumps(values))
    # Tokens that the file does not mark special would otherwise still be found inside prompts.
    for token in values.get("added_tokens", []):
        token["special"] = True
    for step in _pre_tokenizers(values.get("pre_tokenizer")) if is_inner else ():
        # Only the first piece of a text gets a blank by this scheme, and what follows the image is never the first.
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    plain = _tokenizer(path, values)
    plain.encode_special_tokens = True
    return plain


def _pre_tokenizers(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is not None:
        yield step
        for inner in step.get("pretokenizers", ()):
            yield from _pre_tokenizers(inner)


def _tokenizer(path: Path, values: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
