"""Chooses between Serve's replicas and the job's own actors, and keeps the choice for a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jobs.backends import serve_identity
from jobs.config import JobConfig
from jobs.staging import Staging, Via
from model.errors import ConfigError, InfrastructureError
from model.identity import first_difference


def choose_via(config: JobConfig, staging: Staging, facts: Mapping[str, str], say: Callable[[str], None]) -> Via:
    """``--via``, or with ``auto`` Serve where the same application runs and the pool where none does.

    Raises ``ConfigError`` when an application runs that would give other rewards, saying which hash differs;
    ``InfrastructureError`` when ``--via serve`` finds none.
    """
    stored = staging.stored_via()
    if stored and config.via not in ("auto", stored):
        raise ConfigError(f"this night was begun with --via {stored}; resume it with that, or with --via auto")
    via: Via = "pool"
    if (stored or config.via) != "pool":
        running = serve_identity()
        if running is not None:
            check_same(facts, running)
            via = "serve"
        elif (stored or config.via) == "serve":
            raise InfrastructureError("--via serve: no Serve application 'assay' runs; deploy infra/serve.yaml first")
    staging.store_via(via)
    say(f"scoring via {via}")
    return via


def check_same(facts: Mapping[str, str], running: dict[str, Any]) -> None:
    """Raises ``ConfigError`` naming the first thing in which the running application differs from this job."""
    difference = first_difference(facts, running["facts"])
    if difference is not None:
        raise ConfigError(f"the running Serve application differs in {difference}; deploy it again, or use --via pool")
