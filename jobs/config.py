"""``JobConfig``: everything that decides a nightly run, from ``--config`` and flags; a typo fails before any work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model import storage
from model.errors import ConfigError
from model.modes import EXACT, MODES, checked_settings
from model.scorer import SHIPPED

# Fields of a generation that a log column can be mapped to.
FIELDS = ("generation_id", "created_at", "prompt", "image_uri", "image", "generator", "generator_version")
# Columns that --drop-columns and --hash-columns may touch: what the log brought, not what Assay found.
PRIVATE_COLUMNS = ("prompt", "image_uri", "generator", "generator_version", "extras")

_MIB = 2**20


class Limits(BaseModel):
    """Bounds on input that nobody has checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The largest PNGs of current generators (2048 x 2048) are about 12 MiB.
    max_image_bytes: int = Field(default=32 * _MIB, gt=0)
    # A JSONL line may hold an inline image in base64, a third larger than its bytes.
    max_line_bytes: int = Field(default=64 * _MIB, gt=0)
    # Object-store reads in flight per worker: 16 gave 2,300 images/s from one machine.
    fetch_concurrency: int = Field(default=16, gt=0)


class JobConfig(BaseModel):
    """One nightly run. See ``infra/job.yaml`` for the defaults that ship, each with its reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: date
    input: str
    output: str
    checkpoint: str = "demo"
    scorer: str = "llava_reward"
    policy: str = "infra/policies/default.yaml"
    via: Literal["auto", "serve", "pool"] = "auto"
    map: dict[str, str] = Field(default_factory=dict)
    image_root: str | None = None
    allow_bucket: tuple[str, ...] = ()
    drop_columns: tuple[str, ...] = ()
    hash_columns: tuple[str, ...] = ()
    retry_errors: bool = False
    max_error_rate: float = Field(default=0.01, ge=0, le=1)

    limits: Limits = Limits()
    # Rows per block: what a kill can cost, and the unit of parallel work.
    rows_per_block: int = Field(default=64, gt=0)
    # Rows per shard. Ray holds a checkpoint's ids in memory whole: about 120 MB for a million.
    rows_per_shard: int = Field(default=1_000_000, gt=0)
    # Rows per published file: about 250 MB at a 100-word prompt.
    rows_per_part: int = Field(default=1_000_000, gt=0)
    # Rows per forward pass asked for; a replica may cut it further.
    batch_size: int = Field(default=32, gt=0)
    # Upper ends of the pools that fetch and decode while others are on the device.
    fetch_workers: int = Field(default=2, gt=0)
    prepare_workers: int = Field(default=2, gt=0)
    # Calls in flight to Serve; two per replica keep its queue filled while one batch is on the device.
    score_workers: int = Field(default=2, gt=0)
    score_timeout_s: float = Field(default=300, gt=0)
    # --via pool: own replicas of the scorer, and where they may run.
    pool_size: int = Field(default=1, gt=0)
    pool_num_gpus: float = Field(default=0, ge=0)
    pool_num_cpus: float = Field(default=1, gt=0)
    pool_labels: dict[str, str] = Field(default_factory=dict)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Memory: LoRA merged into a language model per perspective where that fits, else beside a shared one.
    adapters: Literal["auto", "merged", "low_rank"] = "auto"
    # Anything but exact gives other rewards, and so another night; see model/modes.py.
    mode: str = EXACT
    # The first rows of a night decide whether it is an outage; fewer than the minimum decide nothing.
    outage_window_rows: int = Field(default=1_000, gt=0)
    outage_min_rows: int = Field(default=20, gt=0)
    outage_share: float = Field(default=0.5, gt=0, le=1)

    @field_validator("map")
    @classmethod
    def _known_fields(cls, value: dict[str, str]) -> dict[str, str]:
        for name, column in value.items():
            if name not in FIELDS:
                raise ValueError(f"{name!r} is not a field; use one of {', '.join(FIELDS)}")
            if not column:
                raise ValueError(f"{name}= names no column")
        return value

    @field_validator("input", "output", "image_root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Workers open these too, each in a folder of its own.
        if value is None or storage.is_s3(value):
            return value
        return str(storage.local_path(value).absolute())

    @field_validator("checkpoint")
    @classmethod
    def _absolute_folder(cls, value: str) -> str:
        # As ``model.scorer.resolve`` has it: a shipped name goes before a folder of that name.
        is_shipped = value in [path.name for path in SHIPPED.iterdir()]
        return str(Path(value).absolute()) if value and not is_shipped and Path(value).is_dir() else value

    @field_validator("drop_columns", "hash_columns")
    @classmethod
    def _private_columns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in PRIVATE_COLUMNS:
                raise ValueError(f"{name!r} cannot be dropped or hashed; use {', '.join(PRIVATE_COLUMNS)}")
        return value

    _mode_goes_with_dtype = model_validator(mode="after")(checked_settings)

    def column_of(self, field: str) -> str:
        """Name of the log column that holds ``field``."""
        return self.map.get(field, field)


def parse_arguments(argv: list[str]) -> JobConfig:
    """Flags over ``--config`` over defaults. Raises ``ConfigError`` in one line; ``--help`` exits as usual."""
    arguments = vars(_parser().parse_args(argv))
    path = arguments.pop("config")
    values = read_yaml(path) if path else {}
    flags = {name: value for name, value in arguments.items() if value is not None}
    if "map" in flags:
        in_file = values.get("map") or {}
        if not isinstance(in_file, dict):
            raise ConfigError(f"map: must be a mapping of fields to columns (got {in_file!r})")
        flags["map"] = {**in_file, **parse_map(flags["map"])}
    for name in ("drop_columns", "hash_columns"):
        if name in flags:
            flags[name] = [part for part in flags[name].split(",") if part]
    return build({**values, **flags})


def build(values: dict[str, Any]) -> JobConfig:
    """Validated configuration. Raises ``ConfigError`` in one line that names the first fault and its place."""
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            raise ConfigError(f"--{place.replace('_', '-')} is required") from error
        if not place:  # about several settings: all of them would be too long for one line
            raise ConfigError(str(fault["msg"])) from error
        raise ConfigError(f"{place}: {fault['msg']} (got {fault['input']!r})") from error


class _Parser(argparse.ArgumentParser):
    """Wrong flags are a ``ConfigError`` like any other, so that there is one exit for them."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jobs/score_logs.py", description="Score one night of generation logs.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML with defaults (infra/job.yaml); flags win")
    add("--date", metavar="YYYY-MM-DD", help="the night: dt=DATE, or created_at in [DATE, DATE+1) UTC")
    add("--input", metavar="URI", help="folder of logs (Parquet, JSONL, JSONL.gz), s3:// or local")
    add("--output", metavar="URI", help="root of the scored Parquet, s3:// or local")
    add("--checkpoint", metavar="NAME|PATH", help="reward model")
    add("--scorer", metavar="NAME", help="system that the checkpoint belongs to")
    add("--mode", choices=MODES, help="exact (default), or faster with other rewards: see assay precision")
    add("--policy", metavar="FILE", help="thresholds that turn rewards into verdicts")
    add("--via", choices=["auto", "serve", "pool"], help="Serve replicas, own actors, or whichever fits")
    add("--map", action="append", metavar="FIELD=COLUMN", help=f"column of a field ({', '.join(FIELDS)}); repeatable")
    add("--image-root", metavar="URI", help="where relative image paths start")
    add("--allow-bucket", action="append", metavar="BUCKET", help="bucket that image URIs may name; repeatable")
    add("--drop-columns", metavar="A,B", help=f"keep these out of the output: {', '.join(PRIVATE_COLUMNS)}")
    add("--hash-columns", metavar="A,B", help="publish a keyed hash instead (key: ASSAY_HASH_KEY)")
    add("--max-error-rate", type=float, metavar="SHARE", help="above it the night is published with exit code 3")
    add("--rows-per-block", type=int, metavar="N", help="unit of work, and of what a kill can cost")
    add("--retry-errors", action="store_true", default=None, help="score the dead letters of a published night again")
    return parser


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """``field=column`` of each ``--map``. Raises ``ConfigError`` for one without ``=``."""
    mapping = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator:
            raise ConfigError(f"--map {pair!r} has no '='; write --map field=column")
        mapping[field] = column
    return mapping


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a file that ``--config`` names. Raises ``ConfigError``."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must be a mapping of settings")
    return values
