"""What goes in, what comes out: generations, score records, and every column of the published Parquet.

Standard library only: Parquet itself is written in ``jobs/``, from ``COLUMNS`` below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.errors import ErrorCode, Stage
from model.perspectives import PERSPECTIVES, Perspective

# A new nullable column raises the second number; a rename or a removal raises the first.
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Generation:
    """One logged (prompt, image). ``image`` holds the encoded file (JPEG, PNG, ...), not pixels."""

    generation_id: str
    prompt: str
    image: bytes


@dataclass(frozen=True)
class ImageInfo:
    """Facts about an encoded image. Width and height are upright (EXIF orientation applied), in pixels."""

    sha256: str
    size_bytes: int
    width: int | None = None
    height: int | None = None
    format: str | None = None


@dataclass(frozen=True)
class RowError:
    """Why one row has no reward."""

    code: ErrorCode
    stage: Stage
    message: str


@dataclass(frozen=True)
class ScoreRecord:
    """What a scorer says of one generation.

    ``rewards``: unbounded, higher is better, float32 precision; only the perspectives that were scored.
    ``reward_vectors``: for checkpoints with a general-preference head, which have no scalar reward.
    Exactly one of (``error``) and (``rewards`` or ``reward_vectors``) is filled.
    """

    generation_id: str
    rewards: Mapping[Perspective, float] = field(default_factory=dict)
    reward_vectors: Mapping[Perspective, tuple[float, ...]] = field(default_factory=dict)
    image: ImageInfo | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class Column:
    """One published column. ``type`` is an Arrow type name, with ``list<...>`` for lists."""

    name: str
    type: str
    meaning: str
    unit: str = ""
    nullable: bool = True


STATUS_SCORED = "scored"
STATUS_ERROR = "error"


def _log_columns() -> list[Column]:
    return [
        Column("row_key", "string", "sha256 of (input object, its version, row number), hex", nullable=False),
        Column(
            "generation_id", "string", "id from the log; null only where error_code is missing_id or the row had none"
        ),
        Column("created_at", "timestamp[us, UTC]", "when the image was made, from the log", "UTC"),
        Column("prompt", "string", "text given to the image generator; absent with --drop-columns prompt"),
        Column("image_uri", "string", "where the image lies, from the log; null where the log held the bytes"),
        Column("generator", "string", "name of the image generator"),
        Column("generator_version", "string", "its version"),
        Column("extras", "string", "all other columns of the log row, untouched, as one JSON object"),
        Column("source_file", "string", "URI of the log file", nullable=False),
        Column("source_version", "string", "version or ETag of the log file when it was read", nullable=False),
        Column("source_row", "int64", "row number in the log file; -1 stands for the whole file", "0-based", False),
    ]


def _result_columns() -> list[Column]:
    return [
        Column("status", "string", "scored, or error (a dead letter)", nullable=False),
        Column("error_code", "string", "one of model/errors.py ErrorCode; null where scored"),
        Column("error_stage", "string", "read, fetch, decode, preprocess or score; null where scored"),
        Column("error_message", "string", "names the value and the remedy; null where scored"),
        Column("image_sha256", "string", "sha256 of the encoded image, hex; null where it was never fetched"),
        Column("image_size", "int64", "size of the encoded image", "bytes"),
        Column("image_width", "int32", "width after EXIF orientation", "pixels"),
        Column("image_height", "int32", "height after EXIF orientation", "pixels"),
        Column("image_format", "string", "JPEG, PNG, WEBP, ... as found in the bytes, not in the name"),
    ]


def _reward_columns() -> list[Column]:
    columns = []
    for perspective in PERSPECTIVES:
        columns += [
            Column(
                f"reward_{perspective}", "float", f"{perspective} reward; null where not scored", "reward, unbounded"
            ),
            Column(f"reward_{perspective}_vector", "list<float>", f"{perspective} vector of a general-preference head"),
            Column(f"checkpoint_{perspective}", "string", f"checkpoint asked for {perspective}, as id@sha256:hash"),
        ]
    return columns


def _judgement_columns() -> list[Column]:
    return [
        Column("verdict", "string", "allow, review or block; null where the policy lacks a reward that it needs"),
        Column("severity", "string", "none, low, medium or high; null where verdict is null"),
        Column("flags", "list<string>", "perspectives that crossed a threshold"),
        Column("not_scored", "list<string>", "perspectives without a reward in this row"),
        Column("policy_id", "string", "id of the policy that gave the verdict", nullable=False),
        Column("policy_hash", "string", "sha256 of its content, hex", nullable=False),
        Column(
            "preprocessing_hash", "string", "sha256 of everything that decides pixels and tokens, hex", nullable=False
        ),
        Column(
            "code_version",
            "string",
            "package version + hash of all *.py of model/, jobs/, deployments/",
            nullable=False,
        ),
        Column("run_id", "string", "the run that scored this row", nullable=False),
        Column("scored_at", "timestamp[us, UTC]", "when the row was finished", "UTC", False),
    ]


COLUMNS: tuple[Column, ...] = tuple(_log_columns() + _result_columns() + _reward_columns() + _judgement_columns())

# Equal rows of two runs may differ in these alone.
RUN_COLUMNS = ("run_id", "scored_at")
# Pure functions of the rewards and a policy; a night is re-judged by rewriting these.
JUDGEMENT_COLUMNS = ("verdict", "severity", "flags", "policy_id", "policy_hash")
