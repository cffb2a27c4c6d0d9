"""``assay check-data``: what is wrong with preference data, before any GPU time is spent on it.

Every image is read once, decoded and reduced to a few facts; no pixels are kept. In memory at a time: ``_BATCH``
encoded images and one decoded image per worker, within the limits of ``model/images.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from jobs.check_report import as_lines
from jobs.data_options import add_reading_options, fields_of, labels_of
from jobs.fetch import FetchRules, allowed_buckets, check_image_root, fetch_all
from jobs.query import printable
from model import storage
from model.errors import ConfigError, ErrorCode, InputError, TransientError
from model.image_hash import difference_hash
from model.images import MAX_IMAGE_BYTES, decode_image
from model.preference_checks import find
from model.preference_set import DataSet, ImageFacts, ImageFault
from model.preference_summary import summarize
from model.preferences import PreferenceData, image_uris, read_preferences

EXIT_CLEAN = 0
EXIT_PROBLEMS = 1
EXIT_CONFIG = 2
_BATCH = 4  # images per worker; at most 128 MiB of them
_MAX_WORKERS = 8
_PROGRESS_EVERY = 1000  # images


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand and its options; ``add`` as in ``jobs/cli.py``."""
    check = add("check-data", check_data, "check preference data and its images before training on it")
    check.add_argument("--data", required=True, metavar="URI", help="JSON, JSONL or Parquet, s3:// or local")
    check.add_argument("--test", metavar="URI", help="held-out data that must share nothing with --data")
    check.add_argument("--image-root", metavar="URI", help="where relative image paths start")
    check.add_argument("--test-image-root", metavar="URI", help="the same for --test, where it is another one")
    check.add_argument("--allow-bucket", action="append", metavar="BUCKET", help="bucket of images; repeatable")
    add_reading_options(check)
    check.add_argument("--examples", type=int, default=5, metavar="N", help="of each finding (5)")
    check.add_argument("--format", choices=["table", "json"], default="table")


def check_data(arguments: argparse.Namespace) -> int:
    """Prints the report. Returns 0 (clean, or notes only), 1 (problems) or 2 (the data cannot be used as it is).

    Raises ``TransientError`` when the storage does not answer: no finding would be complete then.
    """
    try:
        train = _read(arguments, "data" if arguments.test is None else "train", arguments.data, arguments.image_root)
        test = None
        if arguments.test is not None:
            test = _read(arguments, "test", arguments.test, arguments.test_image_root or arguments.image_root)
    except ConfigError as error:
        # Malformed records are listed one a line; ``printable`` would make one line of them.
        lines = "\n".join(map(printable, str(error).splitlines()))
        print(f"error: {lines}", file=sys.stderr, flush=True)
        return EXIT_CONFIG
    sets = [_with_images(arguments, one, data, root) for one, data, root in (train, *([test] if test else []))]
    findings = find(*sets, max_examples=arguments.examples)
    summaries = [summarize(one) for one in sets]
    if arguments.format == "json":
        print(json.dumps({"data": [asdict(one) for one in summaries], "findings": [asdict(one) for one in findings]}))
    else:
        print("\n".join(map(printable, as_lines(summaries, findings))))
    return EXIT_PROBLEMS if any(one.level == "problem" for one in findings) else EXIT_CLEAN


_Part = tuple[str, PreferenceData, str | None]  # name, records, image root


def _read(arguments: argparse.Namespace, name: str, uri: str, image_root: str | None) -> _Part:
    check_image_root(image_root)
    data = read_preferences(uri, image_root=image_root, fields=fields_of(arguments), labels=labels_of(arguments))
    if image_root is None:
        for record in data.records:
            for image in image_uris(record):
                if not storage.is_s3(image):
                    raise ConfigError(f"{uri} names the image {image[:200]!r}; say where it is with --image-root")
    return name, data, image_root


def _with_images(arguments: argparse.Namespace, name: str, data: PreferenceData, image_root: str | None) -> DataSet:
    uris = list(dict.fromkeys(uri for record in data.records for uri in image_uris(record)))
    buckets = allowed_buckets(data.source, image_root, arguments.allow_bucket or ())
    rules = FetchRules(image_root, buckets, MAX_IMAGE_BYTES, concurrency=_BATCH)

    def say(done: int) -> None:
        # On stderr, so that a report that is piped on stays one.
        print(f"{name}: {done} of {len(uris)} images read", file=sys.stderr, flush=True)

    return DataSet(name, data, read_images(uris, rules, say))


def read_images(
    uris: Sequence[str], rules: FetchRules, say: Callable[[int], None]
) -> Mapping[str, ImageFacts | ImageFault]:
    """The facts of each image, or why it cannot be read. ``say`` hears the number read, every thousand.

    Raises ``TransientError`` at the first read that still fails after the client's retries.
    """
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    batches = [uris[start : start + _BATCH] for start in range(0, len(uris), _BATCH)]
    found: dict[str, ImageFacts | ImageFault] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch, facts in zip(batches, pool.map(lambda batch: _facts(batch, rules), batches), strict=True):
                found.update(zip(batch, facts, strict=True))
                if len(found) // _PROGRESS_EVERY > (len(found) - len(batch)) // _PROGRESS_EVERY:
                    say(len(found))
        finally:
            # After an error, or Ctrl-C, what has not begun is left undone.
            pool.shutdown(cancel_futures=True)
    return found


def _facts(uris: Sequence[str], rules: FetchRules) -> list[ImageFacts | ImageFault]:
    return [_fact(data) for data in asyncio.run(fetch_all(uris, rules))]


def _fact(data: bytes | InputError) -> ImageFacts | ImageFault:
    try:
        if isinstance(data, InputError):
            raise data
        image, info = decode_image(data)
    except InputError as error:
        if error.code == ErrorCode.STORAGE_UNAVAILABLE:
            raise TransientError(f"{error.message}; check again when the storage answers") from error
        return ImageFault(error.code.value, error.message)
    return ImageFacts(info.sha256, info.size_bytes, image.width, image.height, difference_hash(image))
