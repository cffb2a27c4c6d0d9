"""Tiny qwen and llava checkpoint bundles: the golden cases' random weights with a small tokenizer each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.golden_cases import DEFAULT_ROOT

GOLDEN = DEFAULT_ROOT / "llava_reward"
_BLANK = "▁"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
# By family: perspective to variant of the golden case, for ``write_bundle``.
ADAPTERS = {
    "qwen": {"alignment": "bt_plain", "safety": "bt_skipca", "overall": "gpm_skipca"},
    "llava": {"safety": "bt_plain", "overall": "gpm_plain"},
}


def qwen_tokenizer() -> Tokenizer:
    """Byte-level BPE behind NFC, as Qwen has it, of some pairs only; special tokens behind the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("r", "e"), ("re", "d"), ("u", "s"), ("us", "e"), ("use", "r")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    return tokenizer


def llava_tokenizer(*, is_legacy: bool = True) -> Tokenizer:
    """LLaMA-style BPE with byte fallback.

    - is_legacy: a blank goes before every piece of text between special tokens, and else before the first alone
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("r", "e"), ("re", "d"), ("U", "S")]
    pieces += [_BLANK, *"acdeRrSstUE:", *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if is_legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in LLAVA_SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_bundle(out: Path, family: str, adapters: dict[str, str], **scorer: Any) -> Path:
    """A bundle in ``out`` whose adapters are variants of the family's golden case.

    - adapters: perspective to variant, such as ``{"safety": "bt_plain"}``
    - scorer: further keys of ``scorer.json``
    """
    backbone = Path(shutil.copytree(GOLDEN / family / "backbone", out / "backbone"))
    for perspective, variant in adapters.items():
        shutil.copytree(GOLDEN / family / variant / "adapter", out / perspective)
    config = json.loads((backbone / "config.json").read_text())
    if family == "qwen":
        config["max_position_embeddings"] = 4096  # real pictures take up to 1280 positions, the golden ones few
        qwen_tokenizer().save(str(backbone / "tokenizer.json"))
    else:
        llava_tokenizer().save(str(backbone / "tokenizer.json"))
    (backbone / "config.json").write_text(json.dumps(config))
    values = {
        "system": "llava_reward",
        "family": family,
        "name": f"tiny-{family}",
        "licence": "Apache-2.0",
        "is_trained": False,
        "backbone": "backbone",
        "adapters": {perspective: perspective for perspective in adapters},
        **scorer,
    }
    (out / "scorer.json").write_text(json.dumps(values))
    return out
