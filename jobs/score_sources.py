"""The flags that say whose rewards are measured, shared by ``assay evaluate`` and ``assay calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date

from jobs.data_options import add_reading_options
from jobs.fetch import FetchRules, allowed_buckets, check_image_root
from jobs.people import MAPPED_FIELDS, Item, OpinionKind, People, folder_of
from jobs.scored import Reading, Scored, from_file, from_night, from_scorer
from model.errors import ConfigError
from model.images import MAX_IMAGE_BYTES
from model.perspectives import PERSPECTIVES, Perspective
from model.scorer import DTYPES, load

_CONCURRENCY = 16  # image reads in flight


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; at least one of ``--scorer``, ``--scores`` and ``--night`` must be given."""
    named = "[NAME=]"
    parser.add_argument(
        "--scorer", action="append", default=[], metavar=f"{named}CHECKPOINT", help="score the images now; repeatable"
    )
    parser.add_argument(
        "--scores",
        action="append",
        default=[],
        metavar=f"{named}FILE",
        help="scores that exist: Parquet, JSONL or JSON with reward_<perspective> or reward, joined by prompt and "
        "image, or by id; repeatable",
    )
    parser.add_argument(
        "--night", action="append", default=[], metavar=f"{named}OUTPUT", help="a published night, with --date"
    )
    parser.add_argument("--date", type=date.fromisoformat, metavar="YYYY-MM-DD", help="which night")
    parser.add_argument("--image-root", metavar="URI", help="where relative images start (the folder of the data)")
    parser.add_argument("--allow-bucket", action="append", default=[], metavar="BUCKET", help="bucket of images")
    add_reading_options(parser, MAPPED_FIELDS)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (8)")
    parser.add_argument("--device", default="cpu", help="of the scorers: cpu, cuda:0, … (cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random draw (0)")


def read_sources(
    arguments: argparse.Namespace, people: People, perspectives: Sequence[Perspective], say: Callable[[str], None]
) -> list[Scored]:
    """Every column of every source, for the items of all opinions in their order. Raises ``ConfigError``."""
    items = [item for one in people.opinions for item in one.items]
    columns: list[Scored] = []
    root = arguments.image_root or folder_of(people.source)
    for text in arguments.scorer:
        name, checkpoint = _named(text)
        scorer = load(checkpoint, device=arguments.device, dtype=arguments.dtype)
        columns += from_scorer(name, scorer, items, perspectives, _reading(arguments, root, people), say)
    for text in arguments.scores:
        name, uri = _named(text)
        columns += from_file(name, uri, items, perspectives, root)
    for text in arguments.night:
        if arguments.date is None:
            raise ConfigError("--night needs --date")
        name, output = _named(text)
        columns += from_night(name, output, arguments.date, items, perspectives, root)
    return _checked(columns, items)


def _named(text: str) -> tuple[str, str]:
    """``NAME=WHERE``, or ``WHERE`` whose last part is then the name."""
    name, separator, where = text.partition("=")
    if not separator:
        name, where = text.rstrip("/").rpartition("/")[2], text
    if not name or not where:
        raise ConfigError(f"{text!r}: expected NAME=WHERE")
    return name, where


def _reading(arguments: argparse.Namespace, root: str, people: People) -> Reading:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: at least 1")
    check_image_root(root)
    buckets = allowed_buckets(people.source, root, arguments.allow_bucket)
    return Reading(
        FetchRules(root, buckets, MAX_IMAGE_BYTES, _CONCURRENCY),
        arguments.batch_size,
        people.kind is not OpinionKind.PAIRS,
    )


def _checked(columns: list[Scored], items: Sequence[Item]) -> list[Scored]:
    if not columns:
        raise ConfigError("nothing to measure: give --scorer, --scores or --night")
    names = [one.column for one in columns]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two sources are called {repeated[0].title}; name them apart with NAME=…")
    for one in columns:
        if all(value is None for value in one.values):
            code, count = one.failures().most_common(1)[0]
            raise ConfigError(f"{one.column.title} has no reward for any of {len(items)} images ({count}: {code})")
    return columns


def perspective(text: str) -> Perspective:
    """One of the perspectives, for argparse."""
    if text not in PERSPECTIVES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PERSPECTIVES)}")
    return Perspective(text)
