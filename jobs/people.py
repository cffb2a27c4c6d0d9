"""What people said of images: preference pairs, labels, or ratings, from one file of records.

- pairs and labels (1 good, 0 bad): as in ``model/preferences.py``
- ratings: ``prompt, image`` and a human score (``rating``, or ``rank`` where 1 is best; or several raters)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jobs import t2i_ratings
from model import storage
from model.errors import ConfigError
from model.evaluation.correlation import finite_number
from model.preference_records import FIELDS, keys_for
from model.preferences import LabelledImage, PreferenceData, PreferencePair, preferences_of
from model.record_files import Fault, all_records, read_raw

# field of a rating -> names that published data uses for it, in order of preference
_RATING_KEYS = {
    "id": ("prompt_id", "image_id", "generation_id", "id"),
    "prompt": ("prompt", "caption", "image_caption"),
    "image": ("image", "path", "image_path", "image_uri"),
    "rating": ("rating", "human", "human_score", "score"),
    "rank": ("rank",),
}
MAPPED_FIELDS = (*FIELDS, "rating", "rank")  # what ``--map`` may name
_ASKED = ("chosen", "rejected", "label", "generations", "ranking")  # of pairs and labels

Record = dict[str, Any]


class OpinionKind(StrEnum):
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

    A label is 0 or 1 under the rater ``label``; a pair has no numbers. ``fields``: what else stands in the record.
    """

    items: tuple[Item, ...]
    human: Mapping[str, float | None]
    fields: Mapping[str, object]


@dataclass(frozen=True)
class People:
    """All records of a file. ``raters``: the human columns, in order; ``sha256``: of the records."""

    kind: OpinionKind
    opinions: tuple[Opinion, ...]
    raters: tuple[str, ...]
    source: str
    sha256: str

    def groups(self, fields: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
        """field -> value of each record, as text. Raises ``ConfigError`` for a field that no record has."""
        found = {}
        for name in fields:
            values = [one.fields.get(name) for one in self.opinions]
            if all(value is None for value in values):
                raise ConfigError(f"--by {name}: no record of {self.source} has this field")
            found[name] = tuple(None if value is None else str(value) for value in values)
        return found

    def has(self, field: str) -> bool:
        """Whether any record has this field."""
        return any(one.fields.get(field) is not None for one in self.opinions)


def read_people(
    uri: str,
    fields: Mapping[str, str] | None = None,
    labels: Mapping[str, int] | None = None,
    raters: Sequence[str] = (),
) -> People:
    """The records of ``uri``, whose kind is seen from the keys of the first one.

    - fields: field (one of ``MAPPED_FIELDS``) -> key that holds it, where it is another
    - labels: what labels other than 0 and 1 mean
    - raters: names of several human columns, for ratings
    - raises: ``ConfigError`` naming the records that are not like that
    """
    fields = fields or {}
    if unknown := set(fields) - set(MAPPED_FIELDS):
        raise ConfigError(f"--map {min(unknown)}: expected one of {', '.join(MAPPED_FIELDS)}")
    entries = list(read_raw(uri))
    if _are_ratings(uri, entries, fields, raters):
        return _ratings(uri, all_records(uri, entries), fields, raters)
    return _people(preferences_of(entries, uri, fields=fields, labels=labels))


def _are_ratings(
    uri: str, entries: Sequence[tuple[int, Record | Fault]], fields: Mapping[str, str], raters: Sequence[str]
) -> bool:
    first = next((entry for _, entry in entries if not isinstance(entry, Fault)), {})
    if raters or t2i_ratings.is_reference([first]):
        return True
    keys = keys_for({name: key for name, key in fields.items() if name in FIELDS}) | _rating_keys(fields)
    found = {name for name, names in keys.items() if any(first.get(key) is not None for key in names)}
    if {"chosen", "rejected"} <= found or "label" in found:
        return False
    if not found & {"rating", "rank", *_ASKED} and entries:
        raise ConfigError(
            f"{uri}: the first record has neither chosen and rejected, nor label, nor rating; name them with --map, "
            "such as --map rating=mos, or --human for several raters"
        )
    return bool(found & {"rating", "rank"})


def _people(data: PreferenceData) -> People:
    """Pairs or labels. An id that is only a record's number is none that scores could be joined by."""
    opinions = []
    for one in data.records:
        if isinstance(one, PreferencePair):
            items = (Item(one.prompt, one.chosen), Item(one.rejected_prompt, one.rejected))
            opinions.append(Opinion(items, {}, one.group))
        else:
            opinions.append(_labelled(one, data.has_ids))
    is_pairs = data.kind == "paired"
    kind, raters = (OpinionKind.PAIRS, ()) if is_pairs else (OpinionKind.LABELS, ("label",))
    return People(kind, tuple(opinions), raters, data.source, data.sha256)


def _labelled(one: LabelledImage, has_ids: bool) -> Opinion:
    item = Item(one.prompt, one.image, one.image_id if has_ids else None)
    return Opinion((item,), {"label": float(one.label)}, one.group)


def _rating_keys(fields: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (fields[name],) if name in fields else keys for name, keys in _RATING_KEYS.items()}


def _ratings(uri: str, records: list[Record], fields: Mapping[str, str], raters: Sequence[str]) -> People:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    if t2i_ratings.is_reference(records):
        records, raters = t2i_ratings.flat_reference(records), t2i_ratings.RATERS
    for name, key in fields.items():
        if name not in _RATING_KEYS:
            raise ConfigError(f"--map {name}: {uri} holds ratings, which have {', '.join(_RATING_KEYS)}")
        if all(record.get(key) is None for record in records):
            raise ConfigError(f"--map {name}={key}: no record of {uri} has the key {key!r}")
    known = {key for record in records for key, value in record.items() if value is not None} - set(raters)
    keys = {name: next((key for key in names if key in known), "") for name, names in _rating_keys(fields).items()}
    opinions = []
    for number, record in enumerate(records, start=1):
        try:
            opinions.append(Opinion((_rated(record, keys),), _numbers(record, keys, raters), record))
        except ValueError as error:
            raise ConfigError(f"{uri}, record {number}: {error}") from error
    return People(OpinionKind.RATINGS, tuple(opinions), tuple(raters) or ("rating",), uri, digest.hexdigest())


def _rated(record: Record, keys: Mapping[str, str]) -> Item:
    identifier = record.get(keys["id"])
    prompt, image = (_text(record.get(keys[name])) for name in ("prompt", "image"))
    item = Item(prompt, image, None if identifier is None else str(identifier))
    if not item.image and item.id is None:
        raise ValueError("neither an image nor an id")
    return item


def _numbers(record: Record, keys: Mapping[str, str], raters: Sequence[str]) -> dict[str, float | None]:
    if raters:
        return {name: finite_number(record.get(name)) for name in raters}
    if keys["rating"]:
        return {"rating": finite_number(record.get(keys["rating"]))}
    rank = finite_number(record.get(keys["rank"]))
    return {"rating": None if rank is None else -rank}  # rank 1 is the best


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def folder_of(uri: str) -> str:
    """The folder that a file lies in: where relative images start unless told otherwise."""
    if storage.is_s3(uri):
        return uri.rpartition("/")[0]
    return str(storage.local_path(uri).resolve().parent)
