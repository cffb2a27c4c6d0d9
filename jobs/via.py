"""Chooses between Serve's replicas and the job's own actors, and keeps the choice for a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jobs.backends import serve_identity
from jobs.config import JobConfig
from jobs.staging import Staging
from model.code_version import code_version
from model.errors import ConfigError, InfrastructureError
from model.scorer import ScorerIdentity

Via = Literal["serve", "pool"]


def choose_via(config: JobConfig, staging: Staging, identity: ScorerIdentity, say: Callable[[str], None]) -> Via:
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
            check_same(identity, running)
            via = "serve"
        elif (stored or config.via) == "serve":
            raise InfrastructureError("--via serve: no Serve application 'assay' runs; deploy infra/serve.yaml first")
    staging.store_via(via)
    say(f"scoring via {via}")
    return via


def check_same(identity: ScorerIdentity, running: dict[str, Any]) -> None:
    """Raises ``ConfigError`` naming the first thing in which the running application differs from this job."""
    mine = _facts(identity.checkpoints, identity.preprocessing_hash, identity.dtype, code_version())
    theirs = _facts(running["checkpoints"], running["preprocessing_hash"], running["dtype"], running["code_version"])
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ConfigError(
                f"the running Serve application differs in {name}: it has {theirs.get(name)}, this job "
                f"{mine.get(name)}; deploy it again, or use --via pool"
            )


def _facts(checkpoints: Any, preprocessing_hash: str, dtype: str, code: str) -> dict[str, str]:
    facts = {f"checkpoint {perspective}": str(value) for perspective, value in checkpoints.items()}
    return {**facts, "preprocessing": preprocessing_hash, "dtype": dtype, "code": code}
