"""Where scoring happens: the replicas of the Serve application, or scorers of the job's own."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray import exceptions as ray_errors
from ray import serve
from ray.serve import exceptions as serve_errors

from jobs.config import JobConfig
from model.code_version import code_version
from model.errors import ConfigError, InfrastructureError, OverloadedError, TransientError
from model.identity import first_difference, reward_facts
from model.prepared_bytes import unpack_arrays
from model.schema import ScoreRecord
from model.scorer import Prepared, load

APPLICATION = "assay"
DEPLOYMENT = "Replica"

_ATTEMPTS = 8
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# What a dying, restarting or full replica looks like from outside. Everything else is fatal.
_RECOVERABLE = (
    ray_errors.ActorDiedError,
    ray_errors.ActorUnavailableError,
    ray_errors.OwnerDiedError,
    ray_errors.ObjectLostError,
    serve_errors.BackPressureError,
    serve_errors.DeploymentUnavailableError,
    OverloadedError,
    TransientError,  # a replica that failed its golden check, and is being replaced
    TimeoutError,
)


class Backend(Protocol):
    """Scores prepared rows, given as (generation_id, packed arrays)."""

    def score(self, rows: Sequence[tuple[str, bytes]]) -> list[ScoreRecord]:
        """One record per row, in order."""
        ...


@dataclass(frozen=True)
class ScoringPlan:
    """How the score step reaches its scorer; travels to the workers, where ``connect`` is called."""

    via: Literal["serve", "pool"]
    checkpoint: str
    device: str
    dtype: str
    mode: str
    adapters: str
    facts: dict[str, str]  # model.identity.reward_facts: what the rewards will be stored under
    batch_size: int
    timeout_s: float

    @classmethod
    def of(cls, config: JobConfig, via: Literal["serve", "pool"], facts: dict[str, str]) -> ScoringPlan:
        """The plan of a run."""
        return cls(
            via=via,
            checkpoint=config.checkpoint,
            device=config.device,
            dtype=config.dtype,
            mode=config.mode,
            adapters=config.adapters,
            facts=facts,
            batch_size=config.batch_size,
            timeout_s=config.score_timeout_s,
        )

    def connect(self) -> Backend:
        """Opens the backend in this process."""
        return _ServeBackend(self) if self.via == "serve" else _PoolBackend(self)


class _PoolBackend:
    def __init__(self, plan: ScoringPlan) -> None:
        import torch

        # One thread a replica: more than that and replicas on one machine fight for its cores.
        torch.set_num_threads(1)
        self._scorer = load(
            plan.checkpoint, device=plan.device, dtype=plan.dtype, mode=plan.mode, adapters=plan.adapters
        )
        print(f"scorer on {plan.device}: LoRA {self._scorer.placement}", flush=True)  # into this worker's log
        difference = first_difference(reward_facts(self._scorer.identity, code_version()), plan.facts)
        if difference is not None:
            raise ConfigError(f"this node differs from the driver in {difference}; give all nodes the same files")
        self._batch_size = plan.batch_size

    def score(self, rows: Sequence[tuple[str, bytes]]) -> list[ScoreRecord]:
        records: list[ScoreRecord] = []
        for start in range(0, len(rows), self._batch_size):
            batch = [Prepared(name, unpack_arrays(data)) for name, data in rows[start : start + self._batch_size]]
            records += self._scorer.postprocess(self._scorer.forward(batch))
        return records


class _ServeBackend:
    def __init__(self, plan: ScoringPlan) -> None:
        self._handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        self._plan = plan

    def score(self, rows: Sequence[tuple[str, bytes]]) -> list[ScoreRecord]:
        size = self._plan.batch_size
        records: list[ScoreRecord] = []
        for start in range(0, len(rows), size):
            records += self._call(list(rows[start : start + size]))
        return records

    def _call(self, batch: list[tuple[str, bytes]]) -> list[ScoreRecord]:
        wait_s = _FIRST_WAIT_S
        for attempt in range(1, _ATTEMPTS + 1):
            reply = None
            try:
                reply = self._handle.score_prepared.remote(batch, self._plan.facts)
                result: list[ScoreRecord] = reply.result(timeout_s=self._plan.timeout_s)
            except _RECOVERABLE as error:
                if reply is not None:
                    reply.cancel()  # or an overloaded replica would score it for nobody
                if attempt == _ATTEMPTS:
                    message = f"Serve did not score a batch in {_ATTEMPTS} attempts: {type(error).__name__}"
                    raise InfrastructureError(message) from error
                time.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                return result
        raise AssertionError("unreachable: the last attempt returns or raises")


def serve_identity() -> dict[str, Any] | None:
    """What the running application says of itself; None when there is none.

    Raises ``InfrastructureError`` when the application exists but does not answer.
    """
    try:
        status = serve.status().applications.get(APPLICATION)
    except ray_errors.RayActorError as error:
        raise InfrastructureError(f"the Serve controller does not answer: {error}") from error
    if status is None:
        return None
    if status.status != "RUNNING":
        raise InfrastructureError(
            f"Serve application {APPLICATION!r} is {status.status}: {status.message or 'not ready'}"
        )
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    try:
        identity: dict[str, Any] = handle.identity.remote().result(timeout_s=60)
    except (TimeoutError, *_RECOVERABLE) as error:
        raise InfrastructureError(f"Serve application {APPLICATION!r} does not answer: {error}") from error
    return identity
