"""Entry point of the nightly job: ``ray job submit --working-dir . -- python jobs/score_logs.py --date …``.

Exit codes: 0 all scored; 2 bad input or configuration, before any work; 3 published, with a share of dead
letters above ``--max-error-rate``; 4 infrastructure, nothing published.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback

import ray

from jobs import report
from jobs.config import parse_arguments
from jobs.manifest import Manifest
from jobs.progress import SystemicFailureError
from jobs.run import run_night
from model.errors import ConfigError, InfrastructureError, TransientError

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_ERRORS = 3
EXIT_INFRASTRUCTURE = 4
EXIT_INTERRUPTED = 130
_REACH_TIMEOUT_S = 5.0


def main(argv: list[str]) -> int:
    """Runs one night and returns the exit code. Errors of the closed list are one line; others propagate."""
    try:
        config = parse_arguments(argv)
        manifest = run_night(config, connect, say)
    except KeyboardInterrupt:
        return fail(EXIT_INTERRUPTED, "interrupted; run the night again: it resumes, or says that it is published")
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, (ConfigError, PermissionError)):
            return fail(EXIT_CONFIG, str(cause))
        if isinstance(cause, (InfrastructureError, SystemicFailureError, TransientError)):
            return fail(EXIT_INFRASTRUCTURE, str(cause))
        if isinstance(error, ray.exceptions.RayError):
            # A worker, node or stage died. The cause is not always known here, so all of it is shown.
            traceback.print_exc()
            return fail(
                EXIT_INFRASTRUCTURE, f"the cluster failed ({type(cause).__name__}); run the night again to resume"
            )
        raise
    _print_outcome(config.output, manifest)
    if manifest.error_share > config.max_error_rate:
        share = f"{manifest.error_share:.2%} of the rows are dead letters"
        return fail(EXIT_ERRORS, f"published, but {share}, above --max-error-rate {config.max_error_rate:.2%}")
    return EXIT_OK


def root_cause(error: BaseException) -> BaseException:
    """What a worker raised, out of the wrappers in which Ray and Ray Data hand it over."""
    inner: BaseException | None = None
    if isinstance(error, ray.exceptions.RayTaskError):
        inner = error.cause
    elif isinstance(error, ray.exceptions.UserCodeException):
        inner = error.__cause__
    return error if inner is None else root_cause(inner)


def connect() -> None:
    """Joins the running Ray cluster. Raises ``InfrastructureError`` when there is none."""
    if ray.is_initialized():
        return
    # Their plans and long-poll notes say less than our own lines.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _check_reachable(os.environ.get("RAY_ADDRESS", ""))
    try:
        # The project root is on the workers' path through --working-dir, or PYTHONPATH where Ray was started.
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise InfrastructureError("no Ray cluster found; start one, or set RAY_ADDRESS") from error


def _check_reachable(address: str) -> None:
    # Ray tries an address that nobody listens on for minutes, without an option to stop it.
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        raise InfrastructureError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error


def say(line: str) -> None:
    """One line of progress, seen at once even through a pipe."""
    print(line, flush=True)


def _print_outcome(output: str, manifest: Manifest) -> None:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(manifest.rows_by_verdict.items()))
    say(f"night {manifest.date}, version {manifest.version}: {manifest.rows} rows; verdicts: {counts}")
    for code, count in sorted(manifest.rows_by_code.items(), key=lambda item: -item[1]):
        say(f"  {count} {code}")
    if not manifest.is_trained:
        say("  note: these rewards come from an untrained demonstration checkpoint and mean nothing")
    say(f"report: {report.uri_of(output, manifest)}")


def fail(code: int, message: str) -> int:
    """Says why in one line on stderr; returns the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
