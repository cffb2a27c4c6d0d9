"""What people said of images: preference pairs, labels, or ratings, from one file of records.

- pairs: ``prompt, chosen, rejected``; labels: ``prompt, image, label`` (1 good, 0 bad)
- ratings: ``prompt, image`` and a human score (``rating``, or ``rank`` where 1 is best; or several raters)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from jobs import t2i_ratings
from jobs.record_files import Record, read_records
from model import storage
from model.errors import ConfigError

# field -> names that published data uses for it, in order of preference
_NAMES = {
    "id": ("pair_id", "prompt_id", "image_id", "generation_id", "id"),
    "prompt": ("prompt", "caption", "image_caption"),
    "image": ("image", "path", "image_path", "image_uri"),
    "chosen": ("chosen", "chosen_path"),
    "rejected": ("rejected", "reject_path"),
    "label": ("label",),
    "rating": ("rating", "human", "human_score", "score"),
    "rank": ("rank",),
}


class Kind(StrEnum):
    """What people were asked."""

    PAIRS = "pairs"
    LABELS = "labels"
    RATINGS = "ratings"


@dataclass(frozen=True)
class Item:
    """One thing to score. ``image`` as written in the data; ``id`` is None where the data has none for it."""

    prompt: str
    image: str
    id: str | None = None

    @property
    def cluster(self) -> str:
        """What it is drawn with: its prompt, or itself where the prompt is empty and so says nothing."""
        return f"prompt {self.prompt}" if self.prompt else f"image {self.image} {self.id or ''}"


@dataclass(frozen=True)
class Opinion:
    """One record. ``items``: (chosen, rejected), or the one image; ``human``: its number per rater, None where absent.

    A label is 0 or 1 under the rater ``label``; a pair has no numbers.
    """

    items: tuple[Item, ...]
    human: Mapping[str, float | None]
    record: Record


@dataclass(frozen=True)
class People:
    """All records of a file. ``raters``: the human columns, in order."""

    kind: Kind
    opinions: tuple[Opinion, ...]
    raters: tuple[str, ...]
    source: str
    sha256: str

    def groups(self, fields: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
        """field -> value of each record, as text. Raises ``ConfigError`` for a field that no record has."""
        found = {}
        for name in fields:
            values = [one.record.get(name) for one in self.opinions]
            if all(value is None for value in values):
                raise ConfigError(f"--by {name}: no record of {self.source} has this field")
            found[name] = tuple(None if value is None else str(value) for value in values)
        return found

    def has(self, field: str) -> bool:
        """Whether any record has this field."""
        return any(one.record.get(field) is not None for one in self.opinions)


def read_people(uri: str, fields: Mapping[str, str] | None = None, raters: Sequence[str] = ()) -> People:
    """The records of ``uri``, whose kind is seen from their fields.

    - fields: field (a key of ``_NAMES``) -> its name in the file, where it is another
    - raters: names of several human columns, for ratings
    - raises: ``ConfigError`` naming the first record that is not like that
    """
    records, digest = read_records(uri)
    if t2i_ratings.is_reference(records):
        records, raters = t2i_ratings.flat_reference(records), t2i_ratings.RATERS
    names = _names(records[0], fields or {}, raters)
    kind = _kind(names, raters, uri)
    opinions = []
    for number, record in enumerate(records, start=1):
        try:
            opinions.append(_opinion(record, kind, names, raters))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{uri}, record {number}: {error}") from error
    found = tuple(raters) if raters else {Kind.LABELS: ("label",), Kind.RATINGS: ("rating",), Kind.PAIRS: ()}[kind]
    return People(kind, tuple(opinions), tuple(found), uri, digest)


def _names(first: Record, fields: Mapping[str, str], raters: Sequence[str]) -> dict[str, str]:
    if unknown := set(fields) - set(_NAMES):
        raise ConfigError(f"--field {min(unknown)}: expected one of {', '.join(_NAMES)}")
    found = {field: next((name for name in names if name in first), None) for field, names in _NAMES.items()}
    return {field: name for field, name in found.items() if name is not None and name not in raters} | dict(fields)


def _kind(names: Mapping[str, str], raters: Sequence[str], uri: str) -> Kind:
    if "chosen" in names and "rejected" in names:
        return Kind.PAIRS
    if raters or "rank" in names or ("rating" in names and "label" not in names):
        return Kind.RATINGS
    if "label" in names:
        return Kind.LABELS
    raise ConfigError(
        f"{uri}: the first record has neither chosen and rejected, nor label, nor rating; name them with "
        "--field, such as --field rating=mos, or --human for several raters"
    )


def _opinion(record: Record, kind: Kind, names: Mapping[str, str], raters: Sequence[str]) -> Opinion:
    if kind is Kind.PAIRS:
        prompt = record[names["prompt"]]
        prompts = prompt if isinstance(prompt, list) else [prompt, prompt]  # two where the caption was changed
        if len(prompts) != 2:
            raise ValueError(f"{len(prompts)} prompts; expected one, or one for each image")
        chosen, rejected = (
            Item(_text(text), _text(record[names[side]]))
            for text, side in zip(prompts, ("chosen", "rejected"), strict=True)
        )
        return Opinion((chosen, rejected), {}, record)
    identifier = record.get(names.get("id", ""))
    item = Item(
        _text(record.get(names.get("prompt", ""), "")),
        _text(record.get(names.get("image", ""), "")),
        None if identifier is None else str(identifier),
    )
    if not item.image and item.id is None:
        raise ValueError("neither an image nor an id")
    return Opinion((item,), _human(record, kind, names, raters), record)


def _human(record: Record, kind: Kind, names: Mapping[str, str], raters: Sequence[str]) -> dict[str, float | None]:
    if kind is Kind.LABELS:
        label = record[names["label"]]
        if label not in (0, 1):  # True and False are
            raise ValueError(f"label {label!r} is neither 0 nor 1")
        return {"label": float(label)}
    if raters:
        return {name: _number(record.get(name)) for name in raters}
    if "rating" in names:
        return {"rating": _number(record.get(names["rating"]))}
    rank = _number(record.get(names["rank"]))
    return {"rating": None if rank is None else -rank}  # rank 1 is the best


def _number(value: object) -> float | None:
    """None for anything that is no finite number, such as null or ``N/A``: the record is then counted as not rated."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def folder_of(uri: str) -> str:
    """The folder that a file lies in: where relative images start unless told otherwise."""
    if storage.is_s3(uri):
        return uri.rpartition("/")[0]
    return str(storage.local_path(uri).resolve().parent)
