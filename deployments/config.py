"""``ServeArgs``: everything that can be set about the Serve application, from ``args`` in infra/serve.yaml.

Unknown keys are refused here, because Ray accepts misspelt ones at every level of its own configuration.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model.errors import ConfigError
from model.modes import EXACT, checked_settings
from model.scorer import DTYPES

PositiveInt = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaArgs(_Strict):
    """How many replicas run, on what, and when Serve replaces one."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    resources: dict[str, float] = {}
    # One thread: with more, replicas on one machine fight for its cores.
    torch_threads: PositiveInt = 1
    # Threads that decode and tokenize online images while the forward pass runs.
    preprocess_threads: PositiveInt = 2
    min_replicas: PositiveInt = 1  # never 0: a cold start takes seconds, and /readyz would be red meanwhile
    max_replicas: PositiveInt = 1
    # Calls in flight per replica that autoscaling aims at: one running, and one waiting behind it.
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 2
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    # Ray's own default is 5, fewer than one batch of online requests: the batcher would never see a full one.
    max_ongoing_requests: PositiveInt = 128
    # Calls that wait in one caller for a free replica; more get BackPressureError, which becomes 429.
    max_queued_requests: PositiveInt = 256
    # Each check scores the golden image; Serve replaces a replica after three failed ones.
    health_check_period_s: Seconds = 10
    health_check_timeout_s: Seconds = 30
    graceful_shutdown_timeout_s: Seconds = 20

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


class BatchingArgs(_Strict):
    """How forward passes are formed (deployments/batching.py)."""

    # An online request waits for at most one pass of this size.
    max_batch_size: PositiveInt = 8
    batch_wait_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005
    # Online images that may wait in one replica; more are answered 429.
    max_queued_items: PositiveInt = 64


class IngressArgs(_Strict):
    """The HTTP side and its limits."""

    num_replicas: PositiveInt = 1
    # Each may hold a whole body: 64 of 64 MiB are 4 GiB in the worst case.
    max_ongoing_requests: PositiveInt = 64
    max_body_bytes: PositiveInt = 64 * 1024 * 1024
    max_items: PositiveInt = 32
    max_image_bytes: PositiveInt = 32 * 1024 * 1024
    body_timeout_s: Seconds = 20  # for the whole body: a client that dribbles holds a connection no longer
    request_timeout_s: Seconds = 30
    ready_timeout_s: Seconds = 5


class ServeArgs(_Strict):
    """All arguments of ``deployments.app.build``."""

    checkpoint: str
    policy: str
    device: str = "cpu"
    dtype: str = "float32"
    # Memory: LoRA merged into a language model per perspective where that fits, else beside a shared one.
    adapters: Literal["auto", "merged", "low_rank"] = "auto"
    mode: str = EXACT  # anything else gives other rewards; see model/modes.py
    replica: ReplicaArgs = ReplicaArgs()
    batching: BatchingArgs = BatchingArgs()
    ingress: IngressArgs = IngressArgs()

    @field_validator("dtype")
    @classmethod
    def _dtype_that_scorers_load(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"{value!r} is not one of {', '.join(DTYPES)}")
        return value

    _mode_goes_with_dtype = model_validator(mode="after")(checked_settings)

    @model_validator(mode="after")
    def _a_full_request_fits_the_queue(self) -> Self:
        if self.ingress.max_items > self.batching.max_queued_items:
            raise ValueError(
                f"ingress.max_items={self.ingress.max_items} is above batching.max_queued_items="
                f"{self.batching.max_queued_items}: a full request could never be accepted"
            )
        return self


def parse_args(args: dict[str, object]) -> ServeArgs:
    """``args`` checked. Raises ConfigError that names the first wrong key and how many more there are."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        place = ".".join(str(part) for part in problems[0]["loc"]) or "args"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"Serve args: {place}: {problems[0]['msg']}{more}") from error
