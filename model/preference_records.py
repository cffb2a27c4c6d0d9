"""One raw record of preference data -> typed records, or what is wrong with it. Standard library only.

Which of three shapes a record has is decided by which keys it holds, never by how many:

- a pair: ``chosen`` and ``rejected`` (published: ``chosen_path``, ``reject_path``, ``c_rate``, ``r_rate``)
- a labelled image: ``image`` (published: ``path``) and ``label``
- ranked images: ``generations`` and ``ranking``, of which every two with different ranks make a pair

A null counts as absent, since Parquet has no other way to leave a value out. Further keys with a text or a number
become ``group``; lists and objects among them are left aside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from model.errors import ConfigError, InputError
from model.prompts import encode_prompt

Shape = Literal["paired", "unpaired", "ranked"]

# Field -> the keys that hold it where no mapping is given: our own name, then the published one.
_KEYS: dict[str, tuple[str, ...]] = {
    "pair_id": ("pair_id",),
    "image_id": ("image_id",),
    "id": ("id",),
    "prompt": ("prompt",),
    "rejected_prompt": ("rejected_prompt",),
    "chosen": ("chosen", "chosen_path"),
    "rejected": ("rejected", "reject_path"),
    "chosen_rate": ("chosen_rate", "c_rate"),
    "rejected_rate": ("rejected_rate", "r_rate"),
    "image": ("image", "path"),
    "label": ("label",),
    "generations": ("generations",),
    "ranking": ("ranking",),
}
FIELDS = tuple(_KEYS)
_DECISIVE: dict[Shape, tuple[str, str]] = {
    "paired": ("chosen", "rejected"),
    "unpaired": ("image", "label"),
    "ranked": ("generations", "ranking"),
}
_USED: dict[Shape, tuple[str, ...]] = {
    "paired": ("pair_id", "id", "prompt", "rejected_prompt", "chosen", "rejected", "chosen_rate", "rejected_rate"),
    "unpaired": ("image_id", "id", "prompt", "image", "label"),
    "ranked": ("id", "prompt", "generations", "ranking"),
}
_MAX_GENERATIONS = 1000  # of one prompt: half a million pairs. Published sets have 4 to 9.


@dataclass(frozen=True)
class PreferencePair:
    """``chosen`` is preferred to ``rejected``.

    ``rejected_prompt`` equals ``prompt`` unless the rejected side has a caption of its own (a hard negative, perhaps
    of the same image). Rates are carried along as written, on the scale of their source. ``group``: free fields.
    """

    pair_id: str
    prompt: str
    rejected_prompt: str
    chosen: str
    rejected: str
    chosen_rate: float | None = None
    rejected_rate: float | None = None
    group: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledImage:
    """One image with ``label`` 1 (safe, good) or 0. ``group``: free fields, such as category and source."""

    image_id: str
    prompt: str
    image: str
    label: int
    group: Mapping[str, str] = field(default_factory=dict)


class MalformedRecordError(Exception):
    """What is wrong with one record, with its value and the remedy."""


@dataclass(frozen=True)
class RecordReader:
    """``keys``: field -> keys that may hold it; ``labels``: text of a label -> 0 or 1, None for 0 and 1 alone."""

    keys: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, int] | None

    def shape_of(self, raw: Mapping[str, Any]) -> Shape:
        """Which shape the keys make. Raises ``MalformedRecordError`` for none or more than one."""
        found = {shape: [name for name in names if self._has(raw, name)] for shape, names in _DECISIVE.items()}
        whole = [shape for shape, names in found.items() if len(names) == 2]
        if len(whole) == 1:
            return whole[0]
        if whole:
            raise MalformedRecordError(f"fits more than one shape ({' and '.join(whole)}); remove the keys of one")
        for shape, names in found.items():
            if names:
                missing = next(name for name in _DECISIVE[shape] if name not in names)
                raise MalformedRecordError(f"{names[0]!r} is there and no {missing!r}; {self._remedy(missing, raw)}")
        raise MalformedRecordError(
            "neither chosen and rejected, nor image and label, nor generations and ranking; map them to the keys "
            f"it has: {_names(raw)}"
        )

    def records(self, raw: Mapping[str, Any], shape: Shape, number: int) -> list[PreferencePair] | list[LabelledImage]:
        """The records that one raw record stands for. Raises ``MalformedRecordError`` for the first fault."""
        if shape == "ranked":
            return list(self._ranked(raw, number))
        return [self._labelled(raw, number)] if shape == "unpaired" else [self._pair(raw, number)]

    def has_id(self, raw: Mapping[str, Any], shape: Shape) -> bool:
        """Whether the record says its id, rather than being named by its number."""
        return any(self._has(raw, name) for name in _USED[shape] if name == "id" or name.endswith("_id"))

    def _pair(self, raw: Mapping[str, Any], number: int) -> PreferencePair:
        prompt, rejected_prompt = self._prompts(raw)
        return PreferencePair(
            self._id(raw, "pair_id", number),
            prompt,
            rejected_prompt,
            _image(self._value(raw, "chosen"), "chosen"),
            _image(self._value(raw, "rejected"), "rejected"),
            _rate(self._value(raw, "chosen_rate"), "chosen_rate"),
            _rate(self._value(raw, "rejected_rate"), "rejected_rate"),
            self._group(raw, "paired"),
        )

    def _labelled(self, raw: Mapping[str, Any], number: int) -> LabelledImage:
        return LabelledImage(
            self._id(raw, "image_id", number),
            self._prompt(raw),
            _image(self._value(raw, "image"), "image"),
            self._label(self._value(raw, "label")),
            self._group(raw, "unpaired"),
        )

    def _ranked(self, raw: Mapping[str, Any], number: int) -> Iterator[PreferencePair]:
        prompt, group, name = self._prompt(raw), self._group(raw, "ranked"), self._id(raw, "id", number)
        images, ranks = self._value(raw, "generations"), self._value(raw, "ranking")
        if not isinstance(images, list) or not isinstance(ranks, list) or len(images) != len(ranks):
            raise MalformedRecordError(
                f"generations and ranking must be lists of one length, got {_shown(images)} and {_shown(ranks)}"
            )
        if not 2 <= len(images) <= _MAX_GENERATIONS:
            raise MalformedRecordError(f"{len(images)} generations; a ranking needs 2 to {_MAX_GENERATIONS}")
        paths = [_image(image, f"generations[{index}]") for index, image in enumerate(images)]
        for index, rank in enumerate(ranks):
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise MalformedRecordError(f"ranking[{index}] is {_shown(rank)}; write a whole number, 1 for the best")
        for one, other in combinations(range(len(paths)), 2):
            if ranks[one] != ranks[other]:
                best, worst = (one, other) if ranks[one] < ranks[other] else (other, one)
                pair_id = f"{name}:{best}>{worst}"
                yield PreferencePair(pair_id, prompt, prompt, paths[best], paths[worst], group=group)

    def _prompt(self, raw: Mapping[str, Any]) -> str:
        return _text(self._value(raw, "prompt"), "prompt")

    def _prompts(self, raw: Mapping[str, Any]) -> tuple[str, str]:
        """Of the chosen and of the rejected side."""
        value, of_rejected = self._value(raw, "prompt"), self._value(raw, "rejected_prompt")
        if isinstance(value, list):
            if len(value) != 2:
                raise MalformedRecordError(f"prompt is a list of {len(value)}; write [of chosen, of rejected]")
            if of_rejected is not None:
                raise MalformedRecordError("prompt is a list, and there is a rejected_prompt too; keep one of them")
            return _text(value[0], "prompt[0]"), _text(value[1], "prompt[1]")
        prompt = _text(value, "prompt")
        return prompt, prompt if of_rejected is None else _text(of_rejected, "rejected_prompt")

    def _id(self, raw: Mapping[str, Any], name: str, number: int) -> str:
        """``name`` or ``id``, else the number of the record."""
        value = self._value(raw, name)
        value = self._value(raw, "id") if value is None else value
        if value is None:
            return str(number)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise MalformedRecordError(f"{name} is {_shown(value)}; write text or a whole number, or leave it out")
        return _text(str(value), name)

    def _label(self, value: Any) -> int:
        if self.labels is not None:
            text = _label_text(value)
            if text not in self.labels:
                known = ", ".join(f"{name}={label}" for name, label in self.labels.items())
                raise MalformedRecordError(f"label {_shown(value)} is not among the given labels ({known}); add it")
            return self.labels[text]
        # A column of pandas with a gap turns 0 and 1 into 0.0 and 1.0. True and false say nothing about which is safe.
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
            text = _label_text(value)
            remedy = f"write 0 or 1, or say what it means: --label {text}=0 or --label {text}=1"
            raise MalformedRecordError(f"label is {_shown(value)}; {remedy}")
        return int(value)

    def _group(self, raw: Mapping[str, Any], shape: Shape) -> dict[str, str]:
        used = {key for name in _USED[shape] for key in self.keys[name]}
        return {
            _mended(str(key)): _mended(str(value))
            for key, value in raw.items()
            if key not in used and isinstance(value, str | int | float)
        }

    def _has(self, raw: Mapping[str, Any], name: str) -> bool:
        return any(raw.get(key) is not None for key in self.keys[name])

    def _value(self, raw: Mapping[str, Any], name: str) -> Any:
        keys = [key for key in self.keys[name] if raw.get(key) is not None]
        if len(keys) > 1:
            raise MalformedRecordError(f"{name} stands under {' and '.join(keys)}; remove one, or map {name}={keys[0]}")
        return raw[keys[0]] if keys else None

    def _remedy(self, missing: str, raw: Mapping[str, Any]) -> str:
        return f"add it, or map {missing} to a key that it has: {_names(raw)}"


def keys_for(fields: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """Keys of each field; a mapped one stands under its given key alone. Raises ``ConfigError``."""
    for name, key in (fields or {}).items():
        if name not in _KEYS:
            raise ConfigError(f"{name!r} is not a field of preference data; use one of {', '.join(FIELDS)}")
        if not key:
            raise ConfigError(f"{name}= names no key; write {name}=key")
    return _KEYS | {name: (key,) for name, key in (fields or {}).items()}


def _label_text(value: Any) -> str:
    """As it is written in a mapping: ``true`` and ``false``, whole numbers without a point."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _image(value: Any, name: str) -> str:
    text = _text(value, name)
    scheme, separator, rest = text.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise MalformedRecordError(f"{name} {_shown(text)}: images are read from s3:// or a path; copy it there")
    path = rest if separator else text
    if not path or "\0" in path:
        raise MalformedRecordError(f"{name} is {_shown(text)}, which names no image; write s3://bucket/key or a path")
    if ".." in path.split("/"):
        raise MalformedRecordError(f"{name} {_shown(text)} leads upwards; write a path below --image-root without '..'")
    return text


def _text(value: Any, name: str) -> str:
    if value is None:
        hint = "; an empty one must be an empty string" if "prompt" in name else ""
        raise MalformedRecordError(f"no {name}{hint}")
    if not isinstance(value, str):
        raise MalformedRecordError(f"{name} is {_shown(value)}, not text; write it as text")
    try:
        encode_prompt(value)
    except InputError as error:
        message = f"{name} holds half of a surrogate pair, which is no text; write it as UTF-8 again"
        raise MalformedRecordError(message) from error
    return value


def _rate(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not math.isfinite(rate):
        raise MalformedRecordError(f"{name} is {_shown(value)}; write a finite number, or leave it out")
    return rate


def _mended(text: str) -> str:
    """Free fields decide nothing about the pair: broken text in them is mended rather than refused."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _names(raw: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key))[:40] for key in list(raw)[:20]) or "none"


def _shown(value: Any) -> str:
    return repr(value)[:80]
