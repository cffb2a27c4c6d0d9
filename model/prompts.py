"""What every scorer refuses in a prompt, before its own tokenizer sees it. Standard library only."""

from __future__ import annotations

from model.errors import ErrorCode, InputError, Stage


def encode_prompt(prompt: str) -> bytes:
    """The prompt as UTF-8; raises ``InputError`` bad_prompt where no UTF-8 file could hold it."""
    try:
        return prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"the prompt holds half of a surrogate pair at character {error.start}; write it as UTF-8 again"
        raise InputError(ErrorCode.BAD_PROMPT, Stage.PREPROCESS, message) from error
