"""``assay train``: one perspective from preference pairs or labels, on Ray Train, into a checkpoint that loads.

The same command after a kill goes on from the last saved state; on a finished run it changes nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from jobs.data_options import fields_of, labels_of
from jobs.local_servers import write_token
from jobs.score_logs import EXIT_CONFIG, EXIT_OK, connect, fail, say
from jobs.train_config import FLAGS, TrainConfig, build
from jobs.train_curves import write_curves
from jobs.train_data import TrainingData, read_training_data
from jobs.train_output import STATE_FOLDER, claim, is_finished, upload
from jobs.train_progress import Follow
from jobs.train_worker import Task, base_of, lora_of, objective_of, read_state, train_worker
from model import storage
from model.code_version import code_version
from model.errors import AssayError, ConfigError, DivergedError, InfrastructureError, InputError
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.training import writer
from model.llava_reward.training.card import model_card
from model.llava_reward.training.loop import State

EXIT_DIVERGED = 1
_POLL_S = "0.5"
_LOCAL_CPUS = 8  # logical: Ray Train asks for places, not for cores


def command(arguments: argparse.Namespace) -> int:
    """Trains; exit codes: 0 done, or done before; 1 diverged; 2 data or settings; 4 infrastructure (by the caller)."""
    flags = {name: getattr(arguments, name) for name in (*FLAGS, "workers")}
    flags |= {"map": fields_of(arguments) or None, "labels": labels_of(arguments) or None}
    cluster = _local_ray if arguments.local else _joined_ray
    try:
        train(build(arguments.config, flags), cluster, say)
    except DivergedError as error:
        return fail(EXIT_DIVERGED, f"diverged: {error}")
    except InputError as error:
        return fail(EXIT_CONFIG, error.message)
    return EXIT_OK


@contextmanager
def _joined_ray() -> Iterator[None]:
    connect()
    yield


@contextmanager
def _local_ray() -> Iterator[None]:
    """A Ray on this machine with a token of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        token = Path(folder) / "ray-token"
        write_token(token)
        # Or Ray would write one into the home folder. The mode stays unset: Ray then turns tokens on by itself.
        os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        ray.init(
            address="local",
            num_cpus=_LOCAL_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=f"{folder}/ray",
        )
        try:
            yield
        finally:
            ray.shutdown()


def train(config: TrainConfig, cluster: Callable[[], AbstractContextManager[None]], say: Callable[[str], None]) -> None:
    """One run to its end. ``cluster``: a Ray, entered after everything that can be checked without one.

    - raises: ``ConfigError``, ``DivergedError``, ``InputError``, ``InfrastructureError``
    """
    out, base = config.folder, base_of(config)
    objective = objective_of(config, base.family)
    data, held_out = read_training_data(config, base, objective, say)
    is_uploaded = storage.is_s3(config.output)
    if is_uploaded:
        claim(config)
    if is_finished(config):
        say(f"{config.output} is trained already; nothing to do")
        return
    with _held(out):
        if not (out / writer.SCORER_FILE).exists():  # or it was trained before, and its upload broke off
            with cluster():
                with Follow(out, say):
                    state = _fit(config, data, held_out, say)
                _write(config, state, data, held_out, say)
        if is_uploaded:
            upload(config, say)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """One run a folder. Raises ``ConfigError`` where another one is at it; a killed run holds nothing."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run trains into {out}; wait for it, or give another --output") from error
        yield


def _fit(config: TrainConfig, data: TrainingData, held_out: TrainingData | None, say: Callable[[str], None]) -> State:
    """The state after the last step. A run whose worker died is gone on with, at most ``max_restarts`` times."""
    # Ray Train takes note of a saved state when it next asks its workers: what is saved in between, a kill costs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    task = Task(config, ray.put(data.records), ray.put(held_out.records if held_out else ()))
    for restarts in range(config.max_restarts + 1):
        try:
            result = _trainer(config, task).fit()
        except ray.train.WorkerGroupError as error:
            _raise_ours(error)
            if not _has_death(error) or restarts == config.max_restarts:
                raise InfrastructureError(_explained(config, error)) from error
            say(f"a worker died; going on from the last saved state (restart {restarts + 1} of {config.max_restarts})")
        except ray.train.ControllerError as error:
            raise InfrastructureError(f"Ray Train failed: {error}; run the command again to go on") from error
        else:
            if result.checkpoint is None:
                raise InfrastructureError(f"no state was saved in {config.folder}/{STATE_FOLDER}; run it again")
            with result.checkpoint.as_directory() as folder:
                return read_state(Path(folder))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _trainer(config: TrainConfig, task: Task) -> TorchTrainer:
    resources = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=config.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=STATE_FOLDER,
            storage_path=str(config.folder),
            # Two: while one is being written, the other is whole.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _raise_ours(error: ray.train.WorkerGroupError) -> None:
    """Errors of the closed list are the answer: to try again would end the same way."""
    for cause in error.worker_failures.values():
        if isinstance(cause, AssayError):
            raise cause from error


def _has_death(error: ray.train.WorkerGroupError) -> bool:
    """Whether a worker's process ended; the others then fail as well, in their own ways."""
    failures = (getattr(cause, "health_check_failure", cause) for cause in error.worker_failures.values())
    return any(isinstance(cause, ray.exceptions.RayError) for cause in failures)


def _explained(config: TrainConfig, error: ray.train.WorkerGroupError) -> str:
    causes = "; ".join(f"worker {rank}: {type(e).__name__}: {e}" for rank, e in sorted(error.worker_failures.items()))
    is_memory = "out of memory" in causes.lower() or "OutOfMemory" in causes
    size = f"micro_batch={config.micro_batch}, checkpointing={config.checkpointing}, cache_gib={config.cache_gib:g}"
    remedy = (
        f" Out of memory with {size}: lower micro_batch or cache_gib, or set checkpointing: true." if is_memory else ""
    )
    return f"training failed: {causes[:1500]}.{remedy} Run the command again to go on from the last saved state"


def _write(
    config: TrainConfig, state: State, data: TrainingData, held_out: TrainingData | None, say: Callable[[str], None]
) -> None:
    """Everything but the state itself; ``scorer.json`` last."""
    out, base = config.folder, base_of(config)
    keys = {} if base.bundle.skip_ca_keys is None else {"skip_ca_keys": base.bundle.skip_ca_keys}
    backbone = read_backbone(base.family, base.folder, **keys)
    objective = objective_of(config, base.family)
    temperature = state["history"][-1]["eval_temperature"] if config.fit_temperature else None
    parameters = state["parameters"]
    if temperature is not None:
        parameters = writer.at_temperature(parameters, temperature)
        say(f"rewards are divided by {temperature:.4g}, the temperature that fits the held-out records")
    trained = writer.Trained(config.perspective, base, objective, lora_of(config), parameters)
    name = config.checkpoint_name
    writer.write_adapter(out / config.perspective, trained, backbone, getattr(torch, config.dtype))
    write_curves(out, state["history"])
    scorer = writer.scorer_values(trained, name)
    _on_a_worker(config, out, scorer)
    card = model_card(
        name,
        trained,
        data=data.facts,
        held_out=held_out.facts if held_out else None,
        config=config.model_dump(mode="json"),
        history=state["history"],
        temperature=temperature,
        groups=state["groups"],
        versions={"assay": code_version(), "torch": torch.__version__, "ray": ray.__version__},
    )
    (out / writer.CARD_FILE).write_text(card, encoding="utf-8")
    metrics = {
        "steps": state["step"],
        "rewards_divided_by": temperature or 1.0,
        "last": state["history"][-1],
        "groups": state["groups"],
    }
    metrics |= {"data": asdict(data.facts), "held_out": asdict(held_out.facts) if held_out else None}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    writer.write_scorer(out, scorer)
    _say_outcome(say, out, state["history"], scorer)


def _on_a_worker(config: TrainConfig, out: Path, scorer: Mapping[str, Any]) -> None:
    """Golden rewards are computed where there is a device; the driver's node may have none."""
    device = "cuda" if config.num_gpus else "cpu"
    task = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(writer.write_golden)
    ray.get(task.remote(out, scorer, device))


def _say_outcome(
    say: Callable[[str], None], out: Path, history: Sequence[Mapping[str, float]], scorer: Mapping[str, Any]
) -> None:
    last = history[-1]
    held_out = f"; held out: accuracy {last['eval_accuracy']:.3f}" if "eval_accuracy" in last else ""
    say(f"trained {', '.join(scorer['adapters'])} in {int(last['step'])} steps: loss {last['loss']:.4f}{held_out}")
    say(f"the checkpoint is {out}; curves.png, {writer.CARD_FILE} and tensorboard/ are in it")
