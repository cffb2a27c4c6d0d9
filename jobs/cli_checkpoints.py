"""The commands of ``assay`` about checkpoints: writing, converting and listing them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from jobs.query import as_text
from jobs.score_logs import EXIT_OK, say
from model.checkpoint_list import list_checkpoints, notes
from model.errors import ConfigError
from model.scorer import resolve, system_of


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """``add``: makes the parser of one command, from its name, function and help."""
    converted = add("convert", _convert, "write a checkpoint with one safetensors file per perspective")
    converted.add_argument("checkpoint", help="folder, shipped name, s3:// URI or pinned hub name")
    converted.add_argument("out", type=Path, help="folder to make")
    _bundle_arguments(add("bundle", _bundle, "write scorer.json for a published backbone and published adapters"))
    listed = add("checkpoints", _checkpoints, "list the shipped and the published checkpoints")
    listed.add_argument("--format", choices=["table", "json"], default="table")


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder of the checkpoint; made if it does not exist")
    parser.add_argument("--backbone", required=True, metavar="PATH|URI", help="folder, s3:// URI or pinned hub name")
    adapter = "as --backbone; one for each perspective"
    parser.add_argument(
        "--adapter", action="append", required=True, type=_pair, metavar="PERSPECTIVE=PATH|URI", help=adapter
    )
    parser.add_argument("--family", default="phi3v", help="phi3v (default), qwen or llava")
    parser.add_argument("--name", help="what its rewards are published under (the name of the folder)")
    parser.add_argument("--licence", default="not known", metavar="TEXT", help="of the weights")
    parser.add_argument("--num-crops", type=int, metavar="N", help="phi3v: most crops of a picture (16)")
    parser.add_argument(
        "--head-training", action="append", type=_pair, metavar="PERSPECTIVE=bt|cls", help="what a head was trained on"
    )


def _convert(arguments: argparse.Namespace) -> int:
    folder = resolve(arguments.checkpoint)
    if (system := system_of(folder)) != "llava_reward":
        raise ConfigError(f"checkpoints of {system} have no adapters to convert")
    from model.llava_reward.convert import convert  # torch, which no other command here needs

    done = convert(folder, arguments.out)
    for perspective, checkpoint in done.after.checkpoints.items():
        print(f"{perspective}: {done.before.checkpoints[perspective]} is now {checkpoint}")
    say(
        f"wrote {arguments.out}: the same rewards under new hashes; policies and stored nights name the old ones, so a "
        "policy for it must name the new"
    )
    return EXIT_OK


def _bundle(arguments: argparse.Namespace) -> int:
    from model.llava_reward.bundle_file import Parts, write_bundle

    parts = Parts(
        backbone=arguments.backbone,
        adapters=_by_perspective("--adapter", arguments.adapter),
        family=arguments.family,
        name=arguments.name or arguments.out.resolve().name,
        licence=arguments.licence,
        num_crops=arguments.num_crops,
        head_training=_by_perspective("--head-training", arguments.head_training or []),
    )
    identity = write_bundle(arguments.out, parts)
    if identity is None:
        say(f"wrote {arguments.out}/scorer.json; what lies elsewhere was listed, and is read at the first load")
        return EXIT_OK
    for perspective, checkpoint in identity.checkpoints.items():
        print(f"{perspective}: {checkpoint}")
    say(f"wrote {arguments.out}/scorer.json; policies name the hashes of its perspectives")
    return EXIT_OK


def _by_perspective(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError(f"{option}: a perspective stands there twice; give each once")
    return found


def _checkpoints(arguments: argparse.Namespace) -> int:
    found = [asdict(one) for one in list_checkpoints()]
    if arguments.format == "json":
        print(json.dumps({"checkpoints": found, "notes": notes()}, ensure_ascii=False))
        return EXIT_OK
    rows = [
        {
            "name": one["name"],
            "perspectives": ", ".join(one["perspectives"]),
            "backbone": one["backbone"],
            "licence": one["licence"] or "not known",
            "backbone licence": one["backbone_licence"],
            "location": one["location"],
            "verified": "yes" if one["is_verified"] else "no",
        }
        for one in found
    ]
    print(as_text(pa.Table.from_pylist(rows)))
    print("\n".join(["", *notes()]))
    return EXIT_OK


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not PERSPECTIVE=VALUE")
    return name, value
