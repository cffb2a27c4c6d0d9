"""The Ray Data graph of one shard: read -> repartition -> fetch -> prepare -> score -> staged Parquet.

The stages run at the same time, each on other blocks, so that images are fetched and decoded while others are
on the device. Ray commits each written block to the shard's checkpoint; a resumed shard reads its logs again
and drops committed rows right after the read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from jobs.backends import ScoringPlan
from jobs.config import JobConfig
from jobs.fetch import FetchRules, allowed_buckets
from jobs.rows import RowReader
from jobs.scan import Slice
from jobs.source import LogSource
from jobs.stages import FetchImages, Prepare, RunFacts, ScoreBatch
from jobs.staging import Staging
from model import storage
from model.errors import InfrastructureError

# Logical CPUs. Fetching waits for the network, and a Serve caller for its replica: neither computes.
_FETCH_CPUS = 0.25
_CALLER_CPUS = 0.1
_WRITE_CPUS = 0.5
_READ_CPUS = 0.5
_RESOURCE_WAIT_S = 20.0


def run_shard(
    config: JobConfig,
    slices: list[Slice],
    reader: RowReader,
    plan: ScoringPlan,
    facts: RunFacts,
    staging: Staging,
    shard: int,
    progress: Any,
) -> None:
    """Stages every row of the slices that the checkpoint does not hold yet. Raises what a stage raised."""
    staging.settle(shard)
    filesystem, staging_path = storage.arrow_filesystem(staging.rows_uri(shard))
    _, checkpoint_path = storage.arrow_filesystem(staging.checkpoint_uri(shard))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="row_key",
        checkpoint_path=checkpoint_path,
        override_filesystem=filesystem,
        # With the default a second run of a finished night would score it again and double it.
        delete_checkpoint_on_success=False,
    )
    try:
        dataset = _graph(config, slices, reader, plan, facts, progress)
        # Appending (the default): with mode="overwrite" a resumed run would report success and empty the output.
        dataset.write_parquet(staging_path, filesystem=filesystem, ray_remote_args={"num_cpus": _WRITE_CPUS})
    finally:
        context.checkpoint_config = None


def _graph(
    config: JobConfig, slices: list[Slice], reader: RowReader, plan: ScoringPlan, facts: RunFacts, progress: Any
) -> ray.data.Dataset:
    rules = FetchRules(
        config.image_root,
        allowed_buckets(config.input, config.image_root, config.allow_bucket),
        config.limits.max_image_bytes,
        config.limits.fetch_concurrency,
    )
    source = LogSource(slices, reader, config.limits.max_line_bytes)
    dataset = ray.data.read_datasource(source, override_num_blocks=len(slices), num_cpus=_READ_CPUS)
    # A log is one block as read: without this there is no parallelism, and a checkpoint saves nothing.
    dataset = dataset.repartition(target_num_rows_per_block=config.rows_per_block)
    common: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None}
    dataset = dataset.map_batches(
        FetchImages,
        fn_constructor_args=(rules, progress),
        compute=ActorPoolStrategy(min_size=1, max_size=config.fetch_workers),
        num_cpus=_FETCH_CPUS,
        **common,
    )
    dataset = dataset.map_batches(
        Prepare,
        fn_constructor_args=(config.checkpoint, config.mode, progress),
        compute=ActorPoolStrategy(min_size=1, max_size=config.prepare_workers),
        num_cpus=1,
        **common,
    )
    return dataset.map_batches(
        ScoreBatch,
        fn_constructor_args=(plan, facts, progress),
        compute=ActorPoolStrategy(size=_score_actors(config, plan.via)),
        **_score_resources(config, plan.via),
        **common,
    )


def _score_actors(config: JobConfig, via: str) -> int:
    return config.score_workers if via == "serve" else config.pool_size


def _score_resources(config: JobConfig, via: str) -> dict[str, Any]:
    if via == "serve":
        return {"num_cpus": _CALLER_CPUS}
    labels = {"label_selector": config.pool_labels} if config.pool_labels else {}
    return {"num_cpus": config.pool_num_cpus, "num_gpus": config.pool_num_gpus, **labels}


def check_scan_resources(say: Callable[[str], None]) -> None:
    """Raises ``InfrastructureError`` when no CPU is free for reading the logs: Ray would wait without a word."""
    _wait_for({"CPU": 1}, say)


def check_resources(config: JobConfig, via: str, say: Callable[[str], None]) -> None:
    """Raises ``InfrastructureError`` when the cluster cannot run one of each stage, or no node fits a pool actor."""
    actors = _score_actors(config, via)
    score = _score_resources(config, via)
    if via == "pool":
        _check_nodes(config, actors)
    _wait_for(
        {
            "CPU": _READ_CPUS + _FETCH_CPUS + 1 + _WRITE_CPUS + actors * score["num_cpus"],
            "GPU": actors * score.get("num_gpus", 0),
        },
        say,
    )


def _check_nodes(config: JobConfig, actors: int) -> None:
    """The sum over the cluster says nothing of a node: two GPUs an actor never fit nodes of one."""
    need = {"CPU": config.pool_num_cpus, "GPU": config.pool_num_gpus}
    places = 0
    for node in ray.nodes():
        has_labels = all(node.get("Labels", {}).get(name) == value for name, value in config.pool_labels.items())
        if node["Alive"] and has_labels:
            rooms = [int(node["Resources"].get(name, 0) // amount) for name, amount in need.items() if amount]
            places += min(rooms)
    if places < actors:
        where = f" with labels {config.pool_labels}" if config.pool_labels else ""
        raise InfrastructureError(
            f"pool_size={actors} actors of {need['CPU']:g} CPU and {need['GPU']:g} GPU do not fit: nodes{where} have "
            f"room for {places}; add nodes, or lower pool_size or pool_num_gpus"
        )


def _wait_for(need: dict[str, float], say: Callable[[str], None]) -> None:
    """Returns when the cluster has that much free; raises ``InfrastructureError`` when it will not or does not."""
    deadline = time.monotonic() + _RESOURCE_WAIT_S
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        short = {name: amount for name, amount in need.items() if free.get(name, 0) < amount}
        if not short:
            return
        wanted = ", ".join(
            f"{amount:g} {name} ({free.get(name, 0):g} free of {total.get(name, 0):g})"
            for name, amount in short.items()
        )
        is_hopeless = any(total.get(name, 0) < amount for name, amount in short.items())
        if is_hopeless or time.monotonic() > deadline:
            raise InfrastructureError(f"the cluster is short of {wanted}; add nodes, or wait for other work to end")
        say(f"waiting for {wanted}")
        time.sleep(5)
