"""A tokenizer for prompts and captions of drawn scenes: every word of their grammar is one token.

Same construction as the published tokenizer, as in ``tokenizer_training.py``; any other text is encoded too, by
characters and bytes where it must.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer, pre_tokenizers

from model.llava_reward.tokenizer_training import train_tokenizer
from model.scene_captions import Arrangement, Caption
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import Mismatch, describe, sample_spec

_SPECS = 6000  # each word of the grammar comes often, at the start of a prompt too
_MAX_VOCAB = 4096  # never reached: merging ends when every word is whole
_BLANK = "▁"


def build_scene_tokenizer() -> Tokenizer:
    """Trained on prompts and captions of its own drawing; the same in every run."""
    cut = pre_tokenizers.Sequence(
        [
            # The first word of a prompt follows a line feed, so it has no blank before it.
            pre_tokenizers.Metaspace(_BLANK, prepend_scheme="never"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    return train_tokenizer(_texts(), cut, _MAX_VOCAB)


def _texts() -> Iterator[str]:
    random = Random(0)  # noqa: S311  reproducible, not secret
    signs = (None, *ProhibitedSign, *HarmlessSign)
    for number in range(_SPECS):
        spec = sample_spec(random)
        yield describe(spec, random)
        caption = Caption(
            spec.groups,
            random.choice(list(Arrangement)),
            spec.background,
            spec.style,
            random.choice(signs),
            random.choice((None, *Artefact)),
            number % 2 == 0,
            random.choice((None, *Mismatch)),
        )
        yield f" {caption.text()}"  # it follows the end token, and there a blank is put before the first word
