"""The tiny checkpoint's tokenizer: LLaMA-style BPE with byte fallback, trained on sentences made here.

Same construction as the published tokenizer (start token added by a post-processor, ``▁`` for blanks, chat tokens
behind the vocabulary), some thousand times less text. Encodes any Unicode text, byte by byte where it must.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_BLANK = "▁"
_UNKNOWN = "<unk>"
_MAX_VOCAB = 1480
_SENTENCES = 6000

END = "<|endoftext|>"
_CHAT_TOKENS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def _words(text: str) -> list[str]:
    return text.split()


_OBJECTS = _words("""
circle square triangle star diamond rectangle hexagon oval ring cross heart arrow crescent cube sphere cylinder cone
dog cat horse cow sheep bird duck eagle owl fish whale lion tiger bear rabbit mouse elephant giraffe zebra monkey
apple orange banana pear lemon cherry grape strawberry tomato carrot bread cheese cake pizza cookie cup bottle bowl
plate spoon fork knife chair table sofa bed lamp clock book pencil umbrella backpack suitcase car bus truck train
bicycle motorcycle boat ship airplane rocket balloon kite ball guitar piano violin house castle tower bridge church
temple tree flower mushroom mountain river lake island beach desert forest city street garden cloud moon sun robot
dragon knight wizard astronaut pirate queen king woman man girl boy child person face hand eye dress hat shoe crown
""")
_COLOURS = _words("""
red green blue yellow orange purple pink brown black white grey gray cyan magenta teal navy maroon olive gold silver
turquoise violet crimson beige lime indigo
""")
_RELATIONS = (
    "above",
    "below",
    "under",
    "over",
    "beside",
    "next to",
    "to the left of",
    "to the right of",
    "in front of",
    "behind",
    "inside",
    "on top of",
    "near",
    "far from",
    "between",
    "holding",
    "wearing",
    "riding",
    "looking at",
)
_NUMBERS = _words("a one two three four five six seven eight nine ten several many no")
_QUALITIES = _words("""
small large big tiny huge tall short round flat shiny matte old new broken wooden metal glass stone striped dotted
plain bright dark soft blurry sharp clean noisy beautiful ugly happy sad angry sleeping running flying sitting standing
smiling ancient modern futuristic magical realistic detailed colourful transparent glowing burning frozen wet bloody
naked violent dangerous scary peaceful friendly
""")
_STYLES = _words("""
photo photograph painting drawing sketch illustration render portrait landscape poster logo cartoon anime watercolor
oil on canvas pencil digital art concept art 3d pixel art cinematic lighting studio background high quality highly
detailed 4k 8k sharp focus trending on artstation octane unreal engine by greg rutkowski depth of field sunset night
morning fog rain snow winter summer white background minimal style film grain vintage masterpiece intricate elegant
""")


def build_tokenizer(seed: int) -> Tokenizer:
    """Train the tokenizer; equal seeds give equal files."""
    # Words are cut apart for training only, so that no token spans two words.
    cut = pre_tokenizers.Metaspace(_BLANK, prepend_scheme="always")
    return train_tokenizer(sentences(seed), cut, _MAX_VOCAB)


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


def sentences(seed: int) -> Iterator[str]:
    """Prompts from a small grammar of objects, colours, relations and styles."""
    draw = random.Random(seed)  # noqa: S311  reproducible, not secret
    for _ in range(_SENTENCES):
        yield _sentence(draw)


def _sentence(draw: random.Random) -> str:
    scene = _thing(draw)
    if draw.random() < 0.7:
        scene = f"{scene} {draw.choice(_RELATIONS)} {_thing(draw)}"
    if draw.random() < 0.3:
        scene = f"{scene} and {_thing(draw)}"
    if draw.random() < 0.4:
        scene = f"a {draw.choice(_STYLES)} of {scene}"
    styles = draw.sample(_STYLES, draw.randrange(4))
    return ", ".join([scene, *styles]) + draw.choice(("", "", "."))


def _thing(draw: random.Random) -> str:
    words = [draw.choice(_NUMBERS) if draw.random() < 0.4 else draw.choice(("a", "the"))]
    words += [draw.choice(_QUALITIES)] if draw.random() < 0.5 else []
    words += [draw.choice(_COLOURS)] if draw.random() < 0.7 else []
    return " ".join([*words, draw.choice(_OBJECTS)])
