"""The flags that say how a file of pairs, labels or ratings is to be read, the same in every command that reads one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jobs.config import parse_map
from model.errors import ConfigError
from model.preference_records import FIELDS


def add_reading_options(parser: argparse.ArgumentParser, fields: Sequence[str] = FIELDS) -> None:
    """``--map`` and ``--label``; ``fields``: what may be mapped."""
    names = ", ".join(fields)
    parser.add_argument("--map", action="append", metavar="FIELD=KEY", help=f"key of a field ({names}); repeatable")
    parser.add_argument("--label", action="append", metavar="TEXT=0|1", help="what a label means; repeatable")


def fields_of(arguments: argparse.Namespace) -> dict[str, str]:
    """``--map``: field -> key. Raises ``ConfigError``."""
    return parse_map(arguments.map or ())


def labels_of(arguments: argparse.Namespace) -> dict[str, int]:
    """``--label``: text -> 0 or 1. Raises ``ConfigError``."""
    labels = {}
    for pair in arguments.label or ():
        text, _, label = pair.rpartition("=")
        if not text or label not in ("0", "1"):
            raise ConfigError(f"--label {pair!r}: write --label safe=1")
        labels[text] = int(label)
    return labels
