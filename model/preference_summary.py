"""Counts of preference data: records, prompts, images, labels and free fields. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

from model.image_hash import is_near
from model.preference_set import DataSet, ImageFacts, prompts_of
from model.preferences import LabelledImage, PreferencePair, Record

# A free field with more values than this is an id or a text, and no category.
_MAX_VALUES = 20


@dataclass(frozen=True)
class Summary:
    """``labels``: label -> images; ``groups``: field -> value -> {label or "pairs": records}.

    ``prompt_chars``: median and largest number of characters; ``sides``: smallest and largest width or height in
    pixels; ``alike_sides``: pairs whose two images look alike; ``ties``: rankings that give no pair.
    """

    name: str
    source: str
    sha256: str
    kind: str
    records: int
    ties: int
    prompts: int
    prompt_chars: tuple[float, int]
    images: int
    unreadable: int
    image_bytes: int
    sides: tuple[int, int] | None
    alike_sides: int
    hard_negatives: int
    labels: dict[str, int]
    groups: dict[str, dict[str, dict[str, int]]]


def summarize(one: DataSet) -> Summary:
    """The counts of one data set."""
    records = one.data.records
    prompts = {prompt for record in records for prompt in prompts_of(record)}
    chars = [len(prompt) for record in records for prompt in dict.fromkeys(prompts_of(record))]
    facts = [image for image in one.images.values() if isinstance(image, ImageFacts)]
    sides = [side for image in facts for side in (image.width, image.height)]
    return Summary(
        name=one.name,
        source=one.data.source,
        sha256=one.data.sha256,
        kind=one.data.kind,
        records=len(records),
        ties=one.data.ties,
        prompts=len(prompts),
        prompt_chars=(median(chars), max(chars)),
        images=len(one.images),
        unreadable=len(one.images) - len(facts),
        image_bytes=sum(image.size_bytes for image in facts),
        sides=(min(sides), max(sides)) if sides else None,
        alike_sides=sum(_is_alike(one, pair) for pair in one.pairs),
        hard_negatives=sum(pair.prompt != pair.rejected_prompt for pair in one.pairs),
        labels={str(label): count for label, count in sorted(Counter(i.label for i in one.labelled).items())},
        groups=_groups(records),
    )


def _is_alike(one: DataSet, pair: PreferencePair) -> bool:
    """Two different images that look alike, as an image and its edit do."""
    chosen, rejected = one.images[pair.chosen], one.images[pair.rejected]
    if not isinstance(chosen, ImageFacts) or not isinstance(rejected, ImageFacts) or chosen.sha256 == rejected.sha256:
        return False
    return is_near(chosen.near_hash, rejected.near_hash)


def _groups(records: tuple[Record, ...]) -> dict[str, dict[str, dict[str, int]]]:
    """Records by each free field that looks like a category, and by label in it."""
    values: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.group.items():
            found = values.setdefault(name, set())
            if len(found) <= _MAX_VALUES:
                found.add(value)
    groups: dict[str, dict[str, dict[str, int]]] = {}
    for name in (name for name, found in values.items() if len(found) <= min(_MAX_VALUES, len(records) // 2)):
        counts = Counter((record.group.get(name, "(none)"), _class_of(record)) for record in records)
        for (value, kind), count in sorted(counts.items()):
            groups.setdefault(name, {}).setdefault(value, {})[kind] = count
    return groups


def _class_of(record: Record) -> str:
    return str(record.label) if isinstance(record, LabelledImage) else "pairs"
