"""The closed list of errors, and of the codes that a dead letter can carry. Standard library only.

Anything that is not one of these errors is unknown, and unknown means fatal: it propagates, the task or
request fails, and nothing is published. How each side answers is decided in one place there:
``jobs/stages.py`` (dead letter or retry) and ``deployments/ingress.py`` (HTTP status).
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """Where a row failed."""

    READ = "read"
    FETCH = "fetch"
    DECODE = "decode"
    PREPROCESS = "preprocess"
    SCORE = "score"


class ErrorCode(StrEnum):
    """Why a row has no reward. One code, one cause; the message names the value and the remedy."""

    # read: the log itself
    LOG_UNREADABLE = "log_unreadable"  # a whole log file; one dead letter stands for it
    ROW_UNREADABLE = "row_unreadable"  # not a JSON object, nested too deep, or in a damaged part of a Parquet file
    MISSING_ID = "missing_id"
    DUPLICATE_ID = "duplicate_id"
    BAD_TIMESTAMP = "bad_timestamp"
    MISSING_PROMPT = "missing_prompt"
    BAD_PROMPT = "bad_prompt"  # not text, or text that no UTF-8 file can hold
    MISSING_IMAGE = "missing_image"  # neither image nor image_uri
    # fetch: from the row to bytes
    BAD_IMAGE_URI = "bad_image_uri"
    URI_SCHEME_NOT_ALLOWED = "uri_scheme_not_allowed"
    BUCKET_NOT_ALLOWED = "bucket_not_allowed"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_TOO_MANY_BYTES = "image_too_many_bytes"
    STORAGE_UNAVAILABLE = "storage_unavailable"  # after every retry
    # decode: from bytes to pixels
    IMAGE_EMPTY = "image_empty"
    IMAGE_NOT_AN_IMAGE = "image_not_an_image"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_CORRUPT = "image_corrupt"
    IMAGE_TOO_MANY_PIXELS = "image_too_many_pixels"
    IMAGE_ANIMATED = "image_animated"  # later frames would go unseen, and unseen is not safe
    IMAGE_TOO_NARROW = "image_too_narrow"  # so long and thin that no row of pixels would be left
    # preprocess: from pixels and prompt to model input
    PROMPT_TOO_LONG = "prompt_too_long"
    # score
    NON_FINITE_REWARD = "non_finite_reward"


class AssayError(Exception):
    """Base of the list below; never raised itself."""


class InputError(AssayError):
    """This row or request cannot be scored, now or later. jobs: dead letter; deployments: 422."""

    def __init__(self, code: ErrorCode, stage: Stage, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.stage = stage
        self.message = message

    def __reduce__(self) -> tuple[type[InputError], tuple[ErrorCode, Stage, str]]:
        # The default rebuilds from ``args`` alone, and would lose code and stage between processes.
        return type(self), (self.code, self.stage, self.message)


class TransientError(AssayError):
    """Storage or network failed after its retries; may work later. jobs: dead letter; deployments: 503."""


class OverloadedError(AssayError):
    """No room for this request now. deployments: 429."""


class ConfigError(AssayError):
    """Arguments, files or credentials are wrong; found before any work. jobs: exit 2."""


class InfrastructureError(AssayError):
    """The cluster or storage cannot do the work that was asked. jobs: exit 4."""


class DivergedError(AssayError):
    """A loss or gradient of training is no finite number; another try would end alike. jobs: exit 1."""
