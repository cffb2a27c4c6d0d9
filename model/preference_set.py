"""Preference data together with the facts of its images: what checks and counts work on. Pure.

Images are compared by ``content``: the sha256 of a readable image, and the URI of any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from model.preference_graph import Edge
from model.preferences import LabelledImage, PreferenceData, PreferencePair, Record, image_uris

_SHOWN_CHARS = 60  # of a prompt in an example


@dataclass(frozen=True)
class ImageFacts:
    """Of an image that was decoded; ``near_hash`` as of ``model.image_hash``."""

    sha256: str
    size_bytes: int
    width: int
    height: int
    near_hash: bytes


@dataclass(frozen=True)
class ImageFault:
    """Why an image cannot be read: an ``ErrorCode`` and its message."""

    code: str
    message: str


@dataclass(frozen=True)
class DataSet:
    """Preference data and what became of each of its images, by URI. ``name``: such as train or test."""

    name: str
    data: PreferenceData
    images: Mapping[str, ImageFacts | ImageFault]

    @cached_property
    def contents(self) -> dict[str, list[str]]:
        """Content -> its URIs, in order of first use."""
        found: dict[str, list[str]] = defaultdict(list)
        for uri in dict.fromkeys(uri for record in self.data.records for uri in image_uris(record)):
            found[self.content(uri)].append(uri)
        return dict(found)

    def content(self, uri: str) -> str:
        """What is compared in the place of an image."""
        facts = self.images[uri]
        return facts.sha256 if isinstance(facts, ImageFacts) else uri

    @cached_property
    def pairs(self) -> list[PreferencePair]:
        return [record for record in self.data.records if isinstance(record, PreferencePair)]

    @cached_property
    def labelled(self) -> list[LabelledImage]:
        return [record for record in self.data.records if isinstance(record, LabelledImage)]

    def edge(self, pair: PreferencePair) -> Edge:
        """(prompt, content) of the chosen and of the rejected side."""
        chosen = (pair.prompt, self.content(pair.chosen))
        return chosen, (pair.rejected_prompt, self.content(pair.rejected))


def prompts_of(record: Record) -> tuple[str, ...]:
    """Of both sides of a pair; both are the same unless it is a hard negative."""
    return (record.prompt, record.rejected_prompt) if isinstance(record, PreferencePair) else (record.prompt,)


def shown(prompt: str) -> str:
    """A prompt in quotes, cut, with nothing in it that a terminal would act on."""
    return repr(prompt if len(prompt) <= _SHOWN_CHARS else f"{prompt[:_SHOWN_CHARS]}…")
