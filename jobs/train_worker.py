"""What each Ray Train worker runs: builds the network, goes on from the last saved state, saves, reports. Thin.

The loop itself is ``model/llava_reward/training/loop.py`` and knows no Ray.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from torch import Tensor

from jobs.train_config import TrainConfig
from jobs.train_progress import tell
from model.errors import ConfigError
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.checkpoint import load_untrained
from model.llava_reward.model_config import check_head
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.training.base import Base, read_base
from model.llava_reward.training.inputs import Feeder, Tower
from model.llava_reward.training.loop import Loop, LoopSettings, State
from model.llava_reward.training.lora import LoraSpec
from model.llava_reward.training.objective import Objective, make_objective
from model.llava_reward.training.parallel import Workers
from model.llava_reward.training.trainable import make_trainable
from model.llava_reward.training.writer import group_changes
from model.preferences import Record

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class Task:
    """What the driver hands to every worker. The records are read and checked once, and lie in Ray's object store."""

    config: TrainConfig
    records: Any  # reference to tuple[Record, ...]
    eval_records: Any


def objective_of(config: TrainConfig, family: str) -> Objective:
    """The objective; SkipCA as published unless the configuration says otherwise. Raises ``ConfigError``."""
    has_skip_ca = family == "phi3v" if config.skip_ca is None else config.skip_ca
    objective = make_objective(
        config.loss,
        has_skip_ca=has_skip_ca,
        tau=config.tau,
        value_head_dim=config.value_head_dim,
        has_margin=config.use_margin,
    )
    check_head(family, objective.head, config.folder)
    if config.fit_temperature and objective.head.is_general_preference:
        raise ConfigError(f"fit_temperature=true: {objective.name} has no one value to divide; leave it out")
    return objective


def base_of(config: TrainConfig) -> Base:
    return read_base(config.backbone, num_crops=config.num_crops, licence=config.licence)


def lora_of(config: TrainConfig) -> LoraSpec:
    return LoraSpec(config.lora.rank, config.lora.alpha, config.lora.dropout)


def settings_of(config: TrainConfig) -> LoopSettings:
    names = set(LoopSettings.__dataclass_fields__) - {"learning_rates"}
    given = {name: getattr(config, name) for name in names}
    return LoopSettings(**given, learning_rates=tuple(sorted(config.learning_rates.items())))


def read_state(folder: Path) -> State:
    """A saved state. Plain tensors and numbers only."""
    state: State = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def train_worker(given: dict[str, Task]) -> None:
    """Trains to the last step and saves it. Called by Ray Train in each worker with ``{"task": Task}``."""
    task = given["task"]
    config = task.config
    torch.set_num_threads(config.threads)
    records, eval_records = ray.get([task.records, task.eval_records])
    with _loop(config, records, eval_records) as loop:
        initial = loop.state()["parameters"]
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                loop.load(read_state(Path(folder)))
            _say(config, f"going on from step {loop.step} of {loop.total_steps}")
        elif loop.total_steps:
            _say(config, f"{loop.total_steps} steps of {config.batch_size} records")

        def after_step(line: dict[str, float]) -> None:
            is_last = loop.step == loop.total_steps
            if loop.step % config.log_every == 0 or is_last or "eval_loss" in line:
                _say(config, _line(line, loop.total_steps))
            if loop.step % config.save_every == 0 or is_last:
                _save(loop, initial, line)

        loop.run(after_step)


@contextmanager
def _loop(config: TrainConfig, records: Sequence[Record], eval_records: Sequence[Record]) -> Iterator[Loop]:
    base = base_of(config)
    backbone = read_backbone(base.family, base.folder, **_keys(base))
    objective, dtype = objective_of(config, base.family), getattr(torch, config.dtype)
    device = torch.device("cuda", torch.cuda.current_device()) if config.num_gpus else torch.device("cpu")
    vision, branch = load_untrained(backbone, base.folder, objective.head, device=device, dtype=dtype)
    reward = make_trainable(
        backbone,
        branch,
        objective.build(),
        lora=lora_of(config),
        dtype=dtype,
        seed=config.seed,
        has_checkpointing=config.checkpointing,
    )
    tower = Tower(backbone, vision, device, int(config.cache_gib * 2**30))
    preprocessor = LlavaRewardPreprocessor(base.bundle)
    with Feeder(tower, preprocessor, threads=config.prepare_threads) as feeder:
        workers = Workers(config.strategy)
        yield Loop(reward, objective, feeder, records, settings_of(config), workers, eval_records)


def _keys(base: Base) -> dict[str, str]:
    return {} if base.bundle.skip_ca_keys is None else {"skip_ca_keys": base.bundle.skip_ca_keys}


def _save(loop: Loop, initial: dict[str, Tensor], line: dict[str, float]) -> None:
    """All workers come here; the first one writes. The folder's name is the step, so that no two are the same."""
    state = loop.state()
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(line, checkpoint=None)
        return
    state["groups"] = group_changes(state["parameters"], initial, loop.projector)
    with tempfile.TemporaryDirectory(prefix="assay-state-") as folder:
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(
            line, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=f"step-{loop.step:08d}"
        )


def _line(line: dict[str, float], total: int) -> str:
    held_out = f", held out {line['eval_loss']:.4f} / {line['eval_accuracy']:.3f}" if "eval_loss" in line else ""
    return (
        f"step {int(line['step'])}/{total}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.3f}{held_out}, "
        f"learning rate {line['learning_rate']:.2e}, {line['seconds']:.2f} s"
    )


def _say(config: TrainConfig, text: str) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        tell(config.folder, text)
