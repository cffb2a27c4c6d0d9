"""The report of ``assay check-data`` as text: counts first, then what was found, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.preference_checks import Finding
from model.preference_summary import Summary

_MAX_CHARS = 160  # of an example; a message names a URI, which may be long


def as_lines(summaries: Sequence[Summary], findings: Sequence[Finding]) -> Iterator[str]:
    """The lines of the report; they may hold what stood in the data, and are to be made printable."""
    for one in summaries:
        yield from _counts(one)
    yield ""
    problems = [one for one in findings if one.level == "problem"]
    notes = [one for one in findings if one.level == "note"]
    for title, some in (("problems", problems), ("notes (perhaps meant so; look at them)", notes)):
        if some:
            yield title
            for finding in some:
                yield from _finding(finding, with_place=len(summaries) > 1)
            yield ""
    found = f"kinds of problem: {len(problems)}" if problems else "no problems"
    yield f"{found}, kinds of note: {len(notes)}" if notes else found


def _counts(one: Summary) -> Iterator[str]:
    records = f"{one.records} pairs" if one.kind == "paired" else f"{one.records} labelled images"
    middle, longest = one.prompt_chars
    prompts = f"{one.prompts} prompts (characters: median {middle:g}, longest {longest})"
    yield f"{one.name}: {one.source}"
    yield f"  {records}, {prompts}"
    sides = f", sides of {one.sides[0]} to {one.sides[1]} pixels" if one.sides else ""
    yield f"  {one.images} images, {one.unreadable} of them unreadable; {one.image_bytes / 2**20:.1f} MiB{sides}"
    if one.hard_negatives:
        yield f"  {one.hard_negatives} pairs with a caption of its own on the rejected side"
    if one.alike_sides:
        yield f"  {one.alike_sides} pairs whose two images look alike, as an image and its edit do"
    if one.ties:
        yield f"  {one.ties} rankings without two different ranks, which give no pair"
    if one.labels:
        yield f"  {_shares(one.labels, 'label ')}"
    for name, values in one.groups.items():
        yield f"  by {name}"
        for value, classes in values.items():
            counts = _shares(classes, "label ") if one.labels else f"{classes['pairs']} pairs"
            yield f"    {value}: {counts}"
    yield f"  content {one.sha256}"


def _shares(counts: dict[str, int], prefix: str) -> str:
    total = sum(counts.values())
    return ", ".join(f"{prefix}{name}: {count} ({count / total:.1%})" for name, count in counts.items())


def _finding(one: Finding, *, with_place: bool) -> Iterator[str]:
    place = f"{one.where}: " if with_place else ""
    yield f"  {place}{one.text}: {one.count}"
    yield f"      {one.remedy}"
    for example in one.examples:
        yield f"    - {example if len(example) <= _MAX_CHARS else example[: _MAX_CHARS - 1] + '…'}"
    if one.examples and one.count > len(one.examples):
        yield f"    - and {one.count - len(one.examples)} more"
