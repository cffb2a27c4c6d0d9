"""Trains a LLaMA-style tokenizer: BPE with byte fallback, constructed as the published one of Phi-3.5-vision.

A post-processor adds the start token, ``▁`` stands for blanks, and chat tokens lie behind the vocabulary. Encodes any
Unicode text, byte by byte where it must.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_BLANK = "▁"
_UNKNOWN = "<unk>"

END = "<|endoftext|>"
_CHAT_TOKENS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def train_tokenizer(texts: Iterable[str], cut: pre_tokenizers.PreTokenizer, max_vocab: int) -> Tokenizer:
    """A LLaMA-style tokenizer from ``texts``, cut into words by ``cut`` while it is trained."""
    vocabulary, merges = _train(texts, cut, max_vocab)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (_UNKNOWN, "<s>", "</s>", END)])
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in _CHAT_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _train(
    texts: Iterable[str], cut: pre_tokenizers.PreTokenizer, max_vocab: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    reserved = [_UNKNOWN, "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN, byte_fallback=True))
    tokenizer.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        special_tokens=reserved,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
