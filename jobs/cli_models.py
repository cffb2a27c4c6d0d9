"""Commands of ``assay`` about models and what they learn from and are measured with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jobs import check_data
from jobs.calibrate import add_calibrate_arguments, run_calibrate
from jobs.cli_nights import add_prompts, folder_prompts
from jobs.evaluate import add_evaluate_arguments, run_evaluate
from jobs.evaluation_report import printable_lines
from jobs.score_logs import EXIT_OK, say
from jobs.train_config import add_arguments as add_train_arguments
from model.evaluation.tables import markdown
from model.modes import EXACT, MODES


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommands and their options; ``add`` as in ``jobs/cli.py``."""
    measured = add("precision", _precision, "measure how far a mode's rewards are from the exact ones")
    measured.add_argument("--checkpoint", required=True, metavar="NAME|PATH")
    measured.add_argument("--mode", required=True, help=", ".join(mode for mode in MODES if mode != EXACT))
    measured.add_argument("--policy", required=True, metavar="FILE", help="whose verdicts are counted")
    measured.add_argument("--images", type=Path, metavar="FOLDER", help="real images, at least 200")
    measured.add_argument("--scenes", type=_count, default=1000, metavar="N", help="drawn images (1000)")
    measured.add_argument("--device", default="cpu", help="torch device (cpu)")
    measured.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    add_prompts(measured)
    check_data.add_command(add)
    add_train_arguments(add("train", _train, "train one perspective on preference pairs or labels"))
    add_evaluate_arguments(add("evaluate", _evaluate, "measure scorers against preference pairs, labels or ratings"))
    add_calibrate_arguments(add("calibrate", _calibrate, "find P(safe) and a threshold with a guarantee, from labels"))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return int(text)


def _precision(arguments: argparse.Namespace) -> int:
    from jobs.precision import Job, measure  # torch, which the other commands here need not

    prompts = folder_prompts(arguments)
    names = ("checkpoint", "mode", "policy", "images", "scenes", "device", "dtype")
    measure(Job(**{name: getattr(arguments, name) for name in names}, prompts=prompts), say)
    return EXIT_OK


def _train(arguments: argparse.Namespace) -> int:
    from jobs.train import command  # torch and Ray Train, which no other command here needs

    return command(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    found = run_evaluate(arguments, say)
    for title, measures in (found.tables | {f"{t}: differences": m for t, m in found.compared.items()}).items():
        say(f"\n{title}\n{printable_lines(markdown(measures))}")
    return EXIT_OK


def _calibrate(arguments: argparse.Namespace) -> int:
    run_calibrate(arguments, say)
    return EXIT_OK
