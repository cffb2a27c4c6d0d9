"""``build(args)``: wires the Serve application together. Nothing else does."""

from __future__ import annotations

from ray import serve
from ray.serve import Application

from deployments.config import ServeArgs, parse_args
from deployments.ingress import Ingress
from deployments.replica import Replica


def build(args: dict[str, object]) -> Application:
    """The application of infra/serve.yaml: ``Ingress`` in front of autoscaled ``Replica``.

    Raises: ConfigError for any key or value that ``ServeArgs`` does not know.
    """
    settings = parse_args(args)
    replica = serve.deployment(Replica).options(**_replica_options(settings)).bind(settings.model_dump())
    ingress = serve.deployment(serve.ingress()(Ingress)).options(**_ingress_options(settings))
    return ingress.bind(settings.model_dump(), replica)


def _replica_options(settings: ServeArgs) -> dict[str, object]:
    replica = settings.replica
    return {
        "ray_actor_options": {
            "num_cpus": replica.num_cpus,
            "num_gpus": replica.num_gpus,
            "resources": replica.resources,
        },
        "autoscaling_config": {
            "min_replicas": replica.min_replicas,
            "max_replicas": replica.max_replicas,
            "target_ongoing_requests": replica.target_ongoing_requests,
            "upscale_delay_s": replica.upscale_delay_s,
            "downscale_delay_s": replica.downscale_delay_s,
        },
        "max_ongoing_requests": replica.max_ongoing_requests,
        "max_queued_requests": replica.max_queued_requests,
        "health_check_period_s": replica.health_check_period_s,
        "health_check_timeout_s": replica.health_check_timeout_s,
        "graceful_shutdown_timeout_s": replica.graceful_shutdown_timeout_s,
    }


def _ingress_options(settings: ServeArgs) -> dict[str, object]:
    return {
        "num_replicas": settings.ingress.num_replicas,
        "max_ongoing_requests": settings.ingress.max_ongoing_requests,
        # It waits far more than it works, and must start on a cluster whose CPUs the replicas take.
        "ray_actor_options": {"num_cpus": 0},
    }
