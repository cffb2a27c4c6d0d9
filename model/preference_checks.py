"""What is wrong with preference data, found from its records and the facts of its images. Pure: reads nothing.

A *problem* would teach or measure something false (contradictions, leaks, images that cannot be read); a *note* may be
meant so, and is for a person to look at. Images are compared by their bytes, not by their names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from model.image_hash import near_pairs
from model.preference_graph import Node, contradictions, cycles
from model.preference_set import DataSet, ImageFacts, ImageFault, prompts_of, shown
from model.preferences import LabelledImage, Record, record_id

# Characters. Some 250 tokens, where the text encoders of image generators read 77 to 512.
LONG_PROMPT_CHARS = 1000
# Below this share of one label, a classifier that always says the other looks good.
SMALL_SHARE = 0.1

Level = Literal["problem", "note"]


@dataclass(frozen=True)
class Finding:
    """One kind of thing found in one place. ``count``: of what ``text`` names; ``examples``: the first of them."""

    name: str
    level: Level
    where: str
    count: int
    text: str
    remedy: str
    examples: tuple[str, ...]


def find(train: DataSet, test: DataSet | None = None, *, max_examples: int = 5) -> list[Finding]:
    """Every finding in ``train``, in ``test`` and between the two: problems first, then by count."""
    collect = _Collector(max_examples)
    for one in (train, *([test] if test else [])):
        _images(one, collect)
        _records(one, collect)
        _pairs(one, collect)
        _labels(one, collect)
        _prompts(one, collect)
    if test is not None:
        _leaks(train, test, collect)
    _lookalikes(train, test, collect)
    return sorted(collect.findings, key=lambda one: (one.level != "problem", -one.count))


class _Examples:
    """Counts what is added and keeps the first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.kept: list[str] = []

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.kept) < self.limit:
            self.kept.append(example)


class _Collector:
    def __init__(self, max_examples: int) -> None:
        self.max_examples = max_examples
        self.findings: list[Finding] = []

    def add(self, name: str, level: Level, where: str, text: str, remedy: str, examples: Iterable[str]) -> None:
        """A finding if there is any example; all of them are counted, the first are kept."""
        found = _Examples(self.max_examples)
        for example in examples:
            found.add(example)
        self.put(name, level, where, text, remedy, found)

    def put(self, name: str, level: Level, where: str, text: str, remedy: str, found: _Examples) -> None:
        if found.count:
            self.findings.append(Finding(name, level, where, found.count, text, remedy, tuple(found.kept)))


def _images(one: DataSet, collect: _Collector) -> None:
    faults: dict[str, list[str]] = defaultdict(list)
    for uri, facts in one.images.items():
        if isinstance(facts, ImageFault):
            faults[facts.code].append(facts.message if repr(uri) in facts.message else f"{uri}: {facts.message}")
    for code, messages in faults.items():
        text, remedy = f"images that cannot be read ({code})", "mend them, or remove the records that name them"
        collect.add("unreadable_image", "problem", one.name, text, remedy, messages)
    copies = (" = ".join(uris) for uris in one.contents.values() if len(uris) > 1)
    text, remedy = "images under more than one name (the same bytes)", "name each by one path"
    collect.add("same_image", "note", one.name, text, remedy, copies)


def _records(one: DataSet, collect: _Collector) -> None:
    ids = Counter(record_id(record) for record in one.data.records)
    text, remedy = "ids that stand more than once", "give each record its own id, or none"
    collect.add("repeated_id", "problem", one.name, text, remedy, (name for name, count in ids.items() if count > 1))
    repeated = (
        f"{', '.join(map(record_id, records[:4]))}{', …' if len(records) > 4 else ''}: {shown(records[0].prompt)}"
        for records in _by_content(one).values()
        if len(records) > 1
    )
    text, remedy = "records that stand more than once, and would count so often", "keep one of each"
    collect.add("repeated_record", "problem", one.name, text, remedy, repeated)


def _by_content(one: DataSet) -> dict[tuple[object, ...], list[Record]]:
    found: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for pair in one.pairs:
        found[one.edge(pair)].append(pair)
    for image in one.labelled:
        found[(image.prompt, one.content(image.image), image.label)].append(image)
    return found


def _pairs(one: DataSet, collect: _Collector) -> None:
    edges = [one.edge(pair) for pair in one.pairs]
    named = [f"{pair.pair_id}: {shown(pair.prompt)}" for pair in one.pairs]
    same = (name for name, (chosen, rejected) in zip(named, edges, strict=True) if chosen == rejected)
    text, remedy = "pairs with the same image and caption on both sides", "remove them"
    collect.add("identical_sides", "problem", one.name, text, remedy, same)
    first = dict(zip(reversed(edges), reversed(one.pairs), strict=True))
    against = (
        f"{first[edge].pair_id} against {first[edge[1], edge[0]].pair_id}: {shown(first[edge].prompt)}"
        for edge in contradictions(edges)
    )
    text, remedy = "pairs that stand in both orders", "keep the order that most people chose, or neither"
    collect.add("contradictory_pairs", "problem", one.name, text, remedy, against)
    rings = (f"{_ring(one, ring)}: {shown(ring[0][0])}" for ring in cycles(edges))
    text = "preferences that run in a circle (pairs in both orders left aside)"
    collect.add("cycle", "problem", one.name, text, "remove one pair of each circle", rings)
    rates = (
        f"{pair.pair_id}: chosen {pair.chosen_rate:g}, rejected {pair.rejected_rate:g}"
        for pair in one.pairs
        if pair.chosen_rate is not None and pair.rejected_rate is not None and pair.chosen_rate < pair.rejected_rate
    )
    text, remedy = "pairs rated lower on the chosen side", "fine where 1 is the best rate, else swap the sides"
    collect.add("rates_against_order", "note", one.name, text, remedy, rates)


def _ring(one: DataSet, ring: Sequence[Node]) -> str:
    names = [one.contents[content][0] for _, content in ring[:6]]
    return f"{' > '.join(names)} > {'…' if len(ring) > 6 else names[0]}"


def _labels(one: DataSet, collect: _Collector) -> None:
    by_label: dict[str, dict[int, LabelledImage]] = defaultdict(dict)
    for image in one.labelled:
        by_label[one.content(image.image)].setdefault(image.label, image)
    both = (
        f"{found[0].image} ({found[0].image_id}: 0, {found[1].image_id}: 1)"
        for found in by_label.values()
        if len(found) == 2
    )
    text, remedy = "images with both labels", "decide on one, or remove them"
    collect.add("both_labels", "problem", one.name, text, remedy, both)
    counts = Counter(image.label for image in one.labelled)
    if counts and (share := min(counts[0], counts[1]) / counts.total()) < SMALL_SHARE:
        rare = 0 if counts[0] < counts[1] else 1
        level: Level = "note" if share else "problem"
        text = f"label {rare} among {counts.total()} images ({share:.1%})"
        remedy = "add images of that class; few of them are hard to learn from and to measure with"
        collect.findings.append(Finding("class_balance", level, one.name, counts[rare], text, remedy, ()))


def _prompts(one: DataSet, collect: _Collector) -> None:
    empty = (record_id(record) for record in one.data.records if not all(p.strip() for p in prompts_of(record)))
    text, remedy = "records with an empty prompt", "fine for safety; alignment cannot be learnt from them"
    collect.add("empty_prompt", "note", one.name, text, remedy, empty)
    long = (
        f"{record_id(record)}: {size} characters"
        for record in one.data.records
        if (size := max(map(len, prompts_of(record)))) > LONG_PROMPT_CHARS
    )
    text, remedy = f"records with a prompt above {LONG_PROMPT_CHARS} characters", "look whether it is one prompt"
    collect.add("long_prompt", "note", one.name, text, remedy, long)


def _leaks(train: DataSet, test: DataSet, collect: _Collector) -> None:
    where = _both([train, test])
    shared = (
        " = ".join(dict.fromkeys((train.contents[content][0], uris[0])))
        for content, uris in test.contents.items()
        if _is_in(train, content)
    )
    remedy = "remove them from one of the two"
    collect.add("leaked_image", "problem", where, "images in both (the same bytes)", remedy, shared)
    known = {frozenset(train.edge(pair)): pair for pair in train.pairs}
    pairs = (
        f"{known[sides].pair_id} = {pair.pair_id}: {shown(pair.prompt)}"
        for pair in test.pairs
        if (sides := frozenset(test.edge(pair))) in known
    )
    collect.add("leaked_pair", "problem", where, "pairs of the test in both, in whatever order", remedy, pairs)
    prompts = {prompt for record in train.data.records for prompt in prompts_of(record) if prompt.strip()}
    seen = dict.fromkeys(prompt for record in test.data.records for prompt in prompts_of(record) if prompt in prompts)
    text, remedy = "prompts in both", "split by prompt, if the test is to tell about new ones"
    collect.add("leaked_prompt", "note", where, text, remedy, map(shown, seen))


def _is_in(one: DataSet, content: str) -> bool:
    """Whether a readable image of that content is in it: two unreadable ones are not known to be the same."""
    uris = one.contents.get(content, [])
    return any(isinstance(one.images[uri], ImageFacts) for uri in uris)


def _lookalikes(train: DataSet, test: DataSet | None, collect: _Collector) -> None:
    """Images that look alike: within each set, and between the two, where that is a leak.

    Two sides of one pair are left out, since an image and its edit are often made into a pair.
    """
    sets = [train, *([test] if test else [])]
    meant = {frozenset((one.content(pair.chosen), one.content(pair.rejected))) for one in sets for pair in one.pairs}
    within = {one.name: _Examples(collect.max_examples) for one in sets}
    leaks: dict[str, str] = {}  # content in the test -> example
    # One pass that keeps no pair: a thousand images of one look make half a million pairs.
    for a, b in _near(_hashes(sets)):
        if frozenset((a, b)) in meant:
            continue
        for one in sets:
            if a in one.contents and b in one.contents:
                within[one.name].add(f"{one.contents[a][0]} ~ {one.contents[b][0]}")
        for of_train, of_test in ((a, b), (b, a)):
            if test is not None and _only_in(train, test, of_train) and _only_in(test, train, of_test):
                leaks.setdefault(of_test, f"{train.contents[of_train][0]} ~ {test.contents[of_test][0]}")
    for one in sets:
        text, remedy = "pairs of images that look alike and differ in bytes", "look at them; copies count twice"
        collect.put("near_image", "note", one.name, text, remedy, within[one.name])
    text, remedy = (
        "images of the test that look like one of the training",
        "look at them; remove what is the same picture",
    )
    collect.add("leaked_near_image", "problem", _both(sets), text, remedy, leaks.values())


def _only_in(one: DataSet, other: DataSet, content: str) -> bool:
    return content in one.contents and content not in other.contents


def _both(sets: Sequence[DataSet]) -> str:
    return " and ".join(one.name for one in sets)


def _hashes(sets: Iterable[DataSet]) -> dict[str, bytes]:
    facts = (facts for one in sets for facts in one.images.values())
    return {one.sha256: one.near_hash for one in facts if isinstance(one, ImageFacts)}


def _near(hashes: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    contents = list(hashes)
    return ((contents[a], contents[b]) for a, b in near_pairs(list(hashes.values())))
