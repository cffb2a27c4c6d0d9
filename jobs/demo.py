"""``make demo``: the whole nightly path on this machine, from drawn images to a query over scored Parquet."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa

from jobs import report
from jobs.demo_data import DemoNight, write_demo_night
from jobs.demo_gallery import gallery
from jobs.demo_truth import COLUMNS, agreements, cells, plain_rows
from jobs.local_stack import LocalStack
from jobs.manifest import Manifest
from jobs.query import as_text, run_query
from jobs.score_logs import EXIT_INFRASTRUCTURE, EXIT_INTERRUPTED, EXIT_OK, say
from jobs.verify import VerificationError, verify_night
from model import storage
from model.errors import ConfigError, InfrastructureError, TransientError
from model.perspectives import PERSPECTIVES, Perspective
from model.policy import Policy, explain
from model.policy_file import load_policy

BUCKET = "assay-demo"
NIGHT = date(2026, 11, 20)
POLICY = "infra/policies/default.yaml"
# A twentieth of the demo night is made to fail, on purpose.
MAX_ERROR_RATE = "0.1"
_WORST_ROWS = 3


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; returns its exit code. What it started is stopped, whatever happens."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path(".assay/demo"), help="logs, token and published Parquet")
    parser.add_argument("--rows", type=int, default=600, help="plain rows; hard ones come on top (default: 600)")
    arguments = parser.parse_args(argv)
    try:
        return _demo(arguments.work_dir, arguments.rows)
    except (ConfigError, InfrastructureError, TransientError, VerificationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INFRASTRUCTURE
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _demo(work_dir: Path, rows: int) -> int:
    started = time.monotonic()
    published = (work_dir / "published").absolute()
    with LocalStack(work_dir, say=say) as stack, _environment(stack.env):
        say(f"[{time.monotonic() - started:4.0f} s] Ray, S3 and Serve are up; drawing {rows} generations")
        boto3.Session().client("s3").create_bucket(Bucket=BUCKET)
        night = write_demo_night(f"s3://{BUCKET}/logs", f"s3://{BUCKET}/images", NIGHT, rows)
        hard = len(night.hard_rows)
        say(f"[{time.monotonic() - started:4.0f} s] {night.row_count} rows in s3://{BUCKET}/logs, {hard} of them hard")
        code = stack.submit(_job(night), on_line=say)
        if code != EXIT_OK:
            say(f"the job ended with exit code {code}")
            return code
        output = f"s3://{BUCKET}/scored"
        manifest = verify_night(output, NIGHT)
        say(f"[{time.monotonic() - started:4.0f} s] published and verified")
        _copy(output, published)
        _show(str(published), manifest, night)
    page = (work_dir / "gallery.html").absolute()
    _compare_with_truth(str(published), manifest, night, page)
    # The S3 server holds its objects in memory, so the published night was copied out of it.
    say(f"\nright and wrong cases of each perspective, with their images, to open in a browser: {page}")
    say(f"the Parquet lies in {published}; ask it something:")
    say(f'  .venv/bin/assay query --output {published} "FROM scores SELECT verdict, count(*) GROUP BY 1"')
    say(f"the demonstration took {time.monotonic() - started:.0f} s; everything that it started is stopped")
    return EXIT_OK


def _job(night: DemoNight) -> list[str]:
    return [
        *("python", "jobs/score_logs.py", "--config", "infra/job.yaml", "--date", str(night.date)),
        *("--input", night.logs_uri, "--output", f"s3://{BUCKET}/scored", "--policy", POLICY),
        *("--max-error-rate", MAX_ERROR_RATE),
    ]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The stack's keys and endpoints for this process too, until the block ends."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _copy(output: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("manifests", "scores"):
        for entry in storage.list_objects(storage.join(output, part)):
            target = folder / entry.uri.removeprefix(f"{output}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(entry.uri, target)


def _show(output: str, manifest: Manifest, night: DemoNight) -> None:
    policy = load_policy(POLICY)
    _table(output, "verdicts", "SELECT coalesce(verdict, 'none (dead letter)') AS verdict, severity, count(*) AS rows, "
           "min(reward_overall) AS lowest_overall FROM scores GROUP BY ALL ORDER BY rows DESC")  # fmt: skip
    _table(output, "dead letters: one row in is one row out, whatever is wrong with it",
           "SELECT error_code, error_stage AS stage, count(*) AS rows, min(error_message) AS one_of_them "
           "FROM scores WHERE status = 'error' GROUP BY ALL ORDER BY rows DESC, error_code")  # fmt: skip
    for perspective in PERSPECTIVES:
        _worst(output, perspective, policy)
    _throughput(output, manifest)
    right = _hard_rows_right(output, night)
    say(f"\n{right} of {len(night.hard_rows)} hard rows ended as they should, and none cost another row")
    if not manifest.is_trained:
        say("the rewards come from the shipped checkpoint, which is UNTRAINED: they show the machinery, not quality")


def _compare_with_truth(output: str, manifest: Manifest, night: DemoNight, page: Path) -> None:
    """Prints how the rewards agree with what was drawn, and writes the gallery."""
    policy, rows = load_policy(POLICY), plain_rows(output, night)
    found = agreements(rows, policy)
    table = pa.Table.from_pylist([cells(one) for one in found], pa.schema([(name, pa.string()) for name in COLUMNS]))
    say(f"\nhow the rewards agree with what was drawn: {len(rows)} plain rows\n{as_text(table)}")
    say("ordered rightly: chance that of two scenes the better has the higher reward (area under ROC); 0.5 is guessing")
    lost = night.row_count - len(night.hard_rows) - len(rows)
    left_out = f"Left out are the night's {len(night.hard_rows)} hard rows and {lost} plain rows that are dead letters."
    page.write_text(gallery(found, manifest, policy, left_out), encoding="utf-8")


def _table(output: str, title: str, sql: str) -> None:
    say(f"\n{title}\n{as_text(run_query(output, sql), max_width=90)}")


def _worst(output: str, perspective: Perspective, policy: Policy) -> None:
    sql = (
        f"SELECT reward_{perspective} AS reward, verdict, generation_id, prompt FROM scores "  # noqa: S608
        f"WHERE status = 'scored' ORDER BY reward LIMIT {_WORST_ROWS}"
    )
    table = run_query(output, sql)
    rewards: list[Any] = table["reward"].to_pylist()
    reasons = [explain({perspective: reward}, policy).get(perspective, "below no threshold") for reward in rewards]
    table = table.append_column("reason", [reasons]).select(["reward", "reason", "verdict", "generation_id", "prompt"])
    say(f"\nworst by {perspective}\n{as_text(table)}")


def _throughput(output: str, manifest: Manifest) -> None:
    content = json.loads(storage.get(report.uri_of(output, manifest)))
    run, fetched = content["this_run"], content["bytes_fetched"] / 1e6
    say(f"\nthroughput\n{run['rows']} rows in {run['wall_s']} s: {run['rows_per_s']} rows/s, start of workers included")
    stages = ", ".join(f"{name} {stage['worker_s']} s" for name, stage in run["stages"].items())
    say(f"work by stage, summed over workers that run side by side: {stages}; {fetched:.1f} MB of images fetched")


def _hard_rows_right(output: str, night: DemoNight) -> int:
    """How many hard rows have the outcome that they were made for."""
    table = run_query(output, "SELECT source_file, source_row, error_code FROM scores")
    found = {(row["source_file"], row["source_row"]): row["error_code"] for row in table.to_pylist()}
    return sum(found.get((hard.source_file, hard.source_row)) == hard.expected_error_code for hard in night.hard_rows)


if __name__ == "__main__":
    sys.exit(main())
