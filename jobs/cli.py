"""The ``assay`` command: everything beside the nightly run itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from jobs import cli_checkpoints, cli_models, cli_nights
from jobs.parity import ParityError
from jobs.query import printable
from jobs.score_logs import EXIT_CONFIG, EXIT_INFRASTRUCTURE, fail
from jobs.verify import VerificationError
from model.errors import ConfigError, InfrastructureError, TransientError

EXIT_NOT_VERIFIED = 1


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Exit codes: 0; 1 not verified, no parity, data problems; 2 bad input; 4 infrastructure."""
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

    cli_nights.add_commands(add)
    cli_models.add_commands(add)
    cli_checkpoints.add_commands(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
