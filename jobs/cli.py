"""The ``assay`` command: everything beside the nightly run itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa

from jobs import manifest as manifests
from jobs.cli_checkpoints import add_checkpoint_commands
from jobs.folder_log import Prompts, log_from_folder
from jobs.garbage import collect
from jobs.lock import NightLock
from jobs.parity import ParityError, Replay, replay
from jobs.query import as_text, printable, run_query
from jobs.rejudge import rejudge
from jobs.run import new_run_id
from jobs.score_logs import EXIT_CONFIG, EXIT_INFRASTRUCTURE, EXIT_OK, fail, say
from jobs.verify import VerificationError, verify_night
from model.errors import ConfigError, InfrastructureError, TransientError
from model.modes import EXACT, MODES
from model.policy_file import load_policy

EXIT_NOT_VERIFIED = 1


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Exit codes: 0; 1 not verified, no parity; 2 bad arguments or input; 4 infrastructure."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except VerificationError as error:
        # It may quote a row, and so whatever stood in the log.
        return fail(EXIT_NOT_VERIFIED, printable(f"not verified: {error}"))
    except ParityError as error:
        return fail(EXIT_NOT_VERIFIED, printable(f"no parity: {error}"))
    except (ConfigError, PermissionError) as error:
        return fail(EXIT_CONFIG, str(error))
    except (InfrastructureError, TransientError, FileNotFoundError) as error:
        return fail(EXIT_INFRASTRUCTURE, str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="assay", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    query = add("query", _query, "run SQL over the published nights (view: scores)")
    query.add_argument("sql", help="for example: SELECT verdict, count(*) FROM scores GROUP BY 1")
    raw = "csv holds text as it was logged: for a file, not for a terminal"
    query.add_argument("--format", choices=["table", "json", "csv"], default="table", help=raw)
    _output(query, needs_date=False)
    verify = add("verify", _verify, "check a published night against its manifest and its logs")
    verify.add_argument("--skip-inputs", action="store_true", help="do not compare the logs (they may have expired)")
    verify.add_argument("--policy", metavar="FILE", help="the policy of the night: gives every verdict again")
    _output(verify)
    again = add("rejudge", _rejudge, "judge the stored rewards of a night with another policy")
    again.add_argument("--policy", required=True, metavar="FILE")
    _output(again)
    collected = add("gc", _gc, "remove files that no manifest names")
    collected.add_argument("--older-than-days", type=float, default=7.0, metavar="DAYS")
    collected.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    _output(collected, has_date=False)
    _add_folder_commands(add)
    _add_replay(add)
    add_checkpoint_commands(add)
    return parser


def _add_folder_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    folder = add("log-folder", _log_folder, "make a log from a folder of images")
    folder.add_argument("folder", type=Path, help="local folder of images")
    folder.add_argument(
        "--images", metavar="URI", help="upload the images to here; without it the log names local files"
    )
    _prompts(folder)
    folder.add_argument("--generator", default="unknown", metavar="NAME", help="what made the images")
    _output(folder)
    measured = add("precision", _precision, "measure how far a mode's rewards are from the exact ones")
    measured.add_argument("--checkpoint", required=True, metavar="NAME|PATH")
    measured.add_argument("--mode", required=True, help=", ".join(mode for mode in MODES if mode != EXACT))
    measured.add_argument("--policy", required=True, metavar="FILE", help="whose verdicts are counted")
    measured.add_argument("--images", type=Path, metavar="FOLDER", help="real images, at least 200")
    measured.add_argument("--scenes", type=_count, default=1000, metavar="N", help="drawn images (1000)")
    measured.add_argument("--device", default="cpu", help="torch device (cpu)")
    measured.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    _prompts(measured)


def _prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL with an image name and a prompt per line")
    parser.add_argument("--image-field", action="append", metavar="NAME", help="field of the name (image); repeatable")
    parser.add_argument("--prompt-field", default="prompt", metavar="NAME", help="field of the prompt (prompt)")


def _prompts_of(arguments: argparse.Namespace) -> Prompts | None:
    fields = tuple(arguments.image_field or ["image"])
    return Prompts(arguments.prompts, fields, arguments.prompt_field) if arguments.prompts else None


def _add_replay(add: Callable[..., argparse.ArgumentParser]) -> None:
    parity = add("parity", _parity, "replay rows of a published night through the endpoint and compare the rewards")
    parity.add_argument("--url", required=True, metavar="URL", help="of the endpoint, such as http://127.0.0.1:8000")
    parity.add_argument("--rows", type=_positive, default=100, metavar="N", help="how many to draw (100)")
    parity.add_argument("--seed", type=int, default=0, metavar="N", help="another one draws other rows and batches (0)")
    parity.add_argument("--image-root", metavar="URI", help="where relative image paths start")
    parity.add_argument("--allow-bucket", action="append", metavar="BUCKET", help="bucket of images; repeatable")
    _output(parity)


def _output(parser: argparse.ArgumentParser, *, has_date: bool = True, needs_date: bool = True) -> None:
    parser.add_argument("--output", required=True, metavar="URI", help="root of the published nights, or of the log")
    if has_date:
        parser.add_argument("--date", type=_date, required=needs_date, metavar="YYYY-MM-DD")


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date; write YYYY-MM-DD") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return int(text)


def _query(arguments: argparse.Namespace) -> int:
    table = run_query(arguments.output, arguments.sql, arguments.date)
    print(_formatted(table, arguments.format))
    return EXIT_OK


def _formatted(table: pa.Table, style: str) -> str:
    if style == "json":
        return _json(table)
    if style == "csv":
        import pyarrow.csv as csv

        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink)
        return str(sink.getvalue().to_pybytes().decode().rstrip("\n"))
    return as_text(table)


def _json(table: pa.Table) -> str:
    """Characters that a terminal would act on stay escaped; all others are as they were logged."""
    names = table.column_names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two columns are named {printable(repeated[0])!r}; give one another name with AS")
    text = json.dumps(table.to_pylist(), default=str, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _verify(arguments: argparse.Namespace) -> int:
    policy = load_policy(arguments.policy) if arguments.policy else None
    manifest = verify_night(arguments.output, arguments.date, check_inputs=not arguments.skip_inputs, policy=policy)
    say(f"verified: {manifest.date} version {manifest.version}, {manifest.rows} rows in {len(manifest.files)} files")
    return EXIT_OK


def _rejudge(arguments: argparse.Namespace) -> int:
    policy = load_policy(arguments.policy)
    _published(arguments)
    run_id = new_run_id()

    def lost() -> None:
        say("another run has taken over this night; nothing will be published here")

    with NightLock(arguments.output, arguments.date, run_id, say, on_lost=lost) as lock:
        published = _published(arguments)  # again: another run may have just finished
        rows_per_part = max(file.rows for file in published.files)
        manifest = rejudge(arguments.output, published, policy, run_id, rows_per_part, lock, say)
    if manifest.version != published.version:
        say(f"published version {manifest.version}: {manifest.rows_by_verdict}")
    return EXIT_OK


def _published(arguments: argparse.Namespace) -> manifests.Manifest:
    manifest = manifests.latest(arguments.output, arguments.date)
    if manifest is None:
        raise ConfigError(f"the night {arguments.date} is not published under {arguments.output}")
    return manifest


def _gc(arguments: argparse.Namespace) -> int:
    done = collect(arguments.output, say, older_than_days=arguments.older_than_days, dry_run=arguments.dry_run)
    say(f"{done.objects} objects, {done.size_bytes} bytes{' (dry run)' if arguments.dry_run else ''}")
    return EXIT_OK


def _log_folder(arguments: argparse.Namespace) -> int:
    log = log_from_folder(
        arguments.folder,
        arguments.output,
        arguments.date,
        images_uri=arguments.images,
        prompts=_prompts_of(arguments),
        generator=arguments.generator,
    )
    say(f"{log.row_count} rows in {log.log_uri}, {log.without_prompt} of them without a prompt")
    return EXIT_OK


def _parity(arguments: argparse.Namespace) -> int:
    buckets = tuple(arguments.allow_bucket or ())
    replay(
        Replay(
            arguments.output,
            arguments.date,
            arguments.url,
            rows=arguments.rows,
            seed=arguments.seed,
            image_root=arguments.image_root,
            allow_bucket=buckets,
        ),
        say,
    )
    return EXIT_OK


def _precision(arguments: argparse.Namespace) -> int:
    from jobs.precision import Job, measure  # scipy, which no other command here needs

    prompts = _prompts_of(arguments)
    names = ("checkpoint", "mode", "policy", "images", "scenes", "device", "dtype")
    measure(Job(**{name: getattr(arguments, name) for name in names}, prompts=prompts), say)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
