"""Preference data for training, evaluation and calibration: pairs, or images with a label, from one file.

JSON, JSONL or Parquet, local or ``s3://``; the published shapes are read unchanged (``model/preference_records.py``).
Reads the file and no image. Knows no Ray; storage clients are imported when a file is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from model import storage
from model.errors import ConfigError
from model.preference_records import LabelledImage, MalformedRecordError, PreferencePair, RecordReader, keys_for
from model.record_files import Fault, read_raw

__all__ = [
    "LabelledImage",
    "PreferenceData",
    "PreferencePair",
    "Record",
    "image_uris",
    "preferences_of",
    "read_preferences",
    "record_id",
]

MAX_RECORDS = 2_000_000  # about 1 GiB of pairs in memory; the largest published set has 1.2 million
MAX_LISTED = 20  # malformed records that one message lists; the others are counted

Record = PreferencePair | LabelledImage


@dataclass(frozen=True)
class PreferenceData:
    """The records of one file, in its order: ``PreferencePair`` where paired, ``LabelledImage`` where not.

    ``sha256``: of the records as written, so that the same content in another format, or with its images in another
    place, has the same hash; image bytes do not enter. ``ties``: ranked records in which no two ranks differ, which
    give no pair. ``has_ids``: whether ids stand in the file; where one is missing, it is the record's number.
    """

    kind: Literal["paired", "unpaired"]
    records: tuple[Record, ...]
    source: str
    sha256: str
    ties: int = 0
    has_ids: bool = False


def read_preferences(
    uri: str,
    *,
    image_root: str | None = None,
    fields: Mapping[str, str] | None = None,
    labels: Mapping[str, int] | None = None,
) -> PreferenceData:
    """Every record of the file.

    - uri: of one file; at most ``MAX_FILE_BYTES`` (512 MiB), unpacked too, and ``MAX_RECORDS`` records
    - image_root: put before relative image paths; a local one is made absolute
    - fields: field -> key that holds it instead of the usual ones (``model.preference_records.FIELDS``)
    - labels: what labels other than 0 and 1 mean, such as ``{"safe": 1, "unsafe": 0}`` or ``{"true": 0, "false": 1}``
    - raises: ``ConfigError`` that names each malformed record (the first ``MAX_LISTED``, one a line), pairs mixed
      with labelled images, or a file that cannot be read; ``PermissionError`` and ``TransientError`` of the storage
    """
    return preferences_of(read_raw(uri), uri, image_root=image_root, fields=fields, labels=labels)


def preferences_of(
    entries: Iterable[tuple[int, dict[str, Any] | Fault]],
    uri: str,
    *,
    image_root: str | None = None,
    fields: Mapping[str, str] | None = None,
    labels: Mapping[str, int] | None = None,
) -> PreferenceData:
    """The same of what ``model.record_files.read_raw`` gave for ``uri``."""
    reader = RecordReader(keys_for(fields), _checked_labels(labels))
    reading = _Reading(uri, reader)
    for number, raw in entries:
        reading.add(number, raw)
    reading.finish(fields or {})
    root = _root(image_root)
    kind: Literal["paired", "unpaired"] = "unpaired" if reading.first["unpaired"] else "paired"
    digest = reading.digest.hexdigest()
    records = tuple(_placed(one, root) for one in reading.records)
    return PreferenceData(kind, records, uri, digest, reading.ties, reading.has_ids)


def image_uris(record: Record) -> tuple[str, ...]:
    """The images of a record: chosen and rejected, or the one."""
    return (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.image,)


def record_id(record: Record) -> str:
    """The id under which a record is named in messages and findings."""
    return record.pair_id if isinstance(record, PreferencePair) else record.image_id


class _Reading:
    """Collects records and what is wrong with the others."""

    def __init__(self, uri: str, reader: RecordReader) -> None:
        self.uri = uri
        self.reader = reader
        self.records: list[Record] = []
        self.first: dict[str, int] = {"paired": 0, "unpaired": 0}  # number of the first record of each kind
        self.ties = 0
        self.has_ids = True
        self.digest = hashlib.sha256()
        self.malformed = self.total = 0
        self.listed: list[str] = []
        self.seen_keys: set[str] = set()

    def add(self, number: int, raw: dict[str, Any] | Fault) -> None:
        self.total += 1
        try:
            if isinstance(raw, Fault):
                raise MalformedRecordError(raw.reason)
            self.seen_keys.update(raw)
            shape = self.reader.shape_of(raw)
            self._check_kind("unpaired" if shape == "unpaired" else "paired", number)
            found = self.reader.records(raw, shape, number)
        except MalformedRecordError as error:
            self.malformed += 1
            if len(self.listed) < MAX_LISTED:
                self.listed.append(f"{self.uri}, record {number}: {error}")
            return
        self.ties += not found
        self.has_ids &= self.reader.has_id(raw, shape)
        self.records.extend(found)
        if len(self.records) > MAX_RECORDS:
            raise ConfigError(f"{self.uri} holds more than {MAX_RECORDS} records; split it")
        for record in found:
            self.digest.update(json.dumps([shape == "unpaired", asdict(record)], sort_keys=True).encode() + b"\n")

    def _check_kind(self, kind: str, number: int) -> None:
        self.first[kind] = self.first[kind] or number
        if all(self.first.values()):
            raise ConfigError(
                f"{self.uri} mixes pairs (record {self.first['paired']}) with labelled images "
                f"(record {self.first['unpaired']}); write them to two files"
            )

    def finish(self, fields: Mapping[str, str]) -> None:
        """Raises ``ConfigError`` where there is something wrong, or nothing there."""
        for name, key in fields.items():
            if self.total and key not in self.seen_keys:
                raise ConfigError(f"{self.uri}: {name}={key}, but no record has the key {key!r}")
        if self.malformed:
            more = self.malformed - len(self.listed)
            head = f"{self.uri}: {self.malformed} of {self.total} records are malformed"
            raise ConfigError("\n".join([head, *self.listed, *([f"and {more} more"] if more else [])]))
        if not self.records:
            what = f"{self.ties} rankings without two different ranks" if self.ties else "no record"
            raise ConfigError(f"{self.uri} holds {what}: there is nothing to learn from")


def _checked_labels(labels: Mapping[str, int] | None) -> Mapping[str, int] | None:
    for text, label in (labels or {}).items():
        if label not in (0, 1):
            raise ConfigError(f"label {text}={label}; a label means 0 or 1 (1 is safe, or good)")
    return labels or None


def _root(image_root: str | None) -> str | None:
    if image_root is None:
        return None
    if not storage.is_s3(image_root):
        return str(storage.local_path(image_root).absolute())
    storage.split_s3(image_root)
    return image_root


def _placed(record: Record, root: str | None) -> Record:
    if isinstance(record, PreferencePair):
        return replace(record, chosen=_below(record.chosen, root), rejected=_below(record.rejected, root))
    return replace(record, image=_below(record.image, root))


def _below(image: str, root: str | None) -> str:
    if root is None or "://" in image or image.startswith("/"):
        return image
    return f"{root.rstrip('/')}/{image}"
