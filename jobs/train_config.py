"""``TrainConfig``: everything that decides a training run, from ``--config`` and flags; a typo fails at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_jsonable_python

from jobs.config import read_yaml
from jobs.data_options import add_reading_options
from model import storage
from model.errors import ConfigError
from model.perspectives import Perspective

# What may change between a run and its continuation: where and how fast, never what is computed.
FREE = frozenset(
    {"workers", "num_cpus", "num_gpus", "threads", "strategy", "micro_batch", "checkpointing", "cache_gib"}
    | {"prepare_threads", "save_every", "log_every", "max_restarts", "output", "work", "name"}
)

# Flags and what they say; everything else stands in --config.
FLAGS = {
    "perspective": "alignment, fidelity, safety or overall",
    "data": "pairs or labels: JSON, JSONL or Parquet",
    "eval_data": "held-out records of the same kind",
    "output": "folder of the new checkpoint, seen by all workers; or in S3, with --work",
    "work": "folder of the run, seen by all workers, where --output is in S3",
    "backbone": "checkpoint or backbone folder to train on top of",
    "image_root": "where relative image paths start",
    "loss": "bt, gpm, cls, or a released loss's name",
    "name": "of the new checkpoint; the folder's by default",
}


class LoraSettings(BaseModel):
    """The published adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class TrainConfig(BaseModel):
    """One perspective. Defaults are the published recipe of the phi3v family where there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perspective: Perspective
    data: str
    output: str
    work: str | None = None  # folder of the run where the output is in S3; a killed run goes on from it
    backbone: str  # a checkpoint, whose backbone is taken, or a backbone folder
    eval_data: str | None = None
    image_root: str | None = None
    map: dict[str, str] = Field(default_factory=dict)  # field -> key that holds it
    labels: dict[str, int] = Field(default_factory=dict)  # what labels other than 0 and 1 mean
    skip_unusable: bool = False  # leave records out whose image cannot be used, instead of refusing the data

    name: str | None = None  # of the new checkpoint; the output folder's by default
    num_crops: int | None = Field(default=None, gt=0)  # phi3v, for a backbone folder: 16 as published
    licence: str = "not stated"  # of a backbone folder

    loss: str = "bt"
    tau: float = Field(default=0.1, gt=0)
    value_head_dim: int | None = Field(default=None, gt=0)
    use_margin: bool = False
    skip_ca: bool | None = None  # phi3v: yes, as published; qwen and llava: no
    lora: LoraSettings = LoraSettings()
    # After the last step rewards are divided by the temperature with which eval_data are likeliest: a reward is then as
    # sure as it is right. No order of rewards changes. For losses with one value a reward.
    fit_temperature: bool = False

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=16, gt=0)  # records of a step, over all workers
    micro_batch: int = Field(default=4, gt=0)  # records of one forward pass of a worker
    learning_rate: float = Field(default=2e-4, gt=0)
    learning_rates: dict[str, float] = Field(default_factory=dict)  # by group, where it differs
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0, ge=0)
    warmup_share: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=42, ge=0)
    eval_every: int = Field(default=0, ge=0)  # steps; 0: at the end only

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: bool = True  # layers are computed again in the backward pass: a third more work, far less memory
    workers: int = Field(default=1, gt=0)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    num_cpus: float = Field(default=1, gt=0)  # per worker, for Ray's bookkeeping
    num_gpus: float = Field(default=0, ge=0)  # per worker; 0 trains on the CPU
    threads: int = Field(default=1, gt=0)  # of torch on the CPU, per worker
    prepare_threads: int = Field(default=2, gt=0)
    # Outputs of the frozen tower that a worker keeps on its device: the later epochs then skip tower and images. At
    # full size one image takes 21 MB (phi3v, 16 crops), so that this matters for small sets and small models.
    cache_gib: float = Field(default=1.0, ge=0)
    save_every: int = Field(default=100, gt=0)  # steps that a kill can cost
    log_every: int = Field(default=10, gt=0)
    max_restarts: int = Field(default=2, ge=0)  # after a worker died; errors of our own are not tried again

    @field_validator("data", "eval_data", "image_root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # Workers open these too, each in a folder of its own.
        if value is None or storage.is_s3(value):
            return value
        return str(storage.local_path(value).absolute())

    @field_validator("backbone")
    @classmethod
    def _absolute_backbone(cls, value: str) -> str:
        return str(Path(value).absolute()) if "/" in value and Path(value).is_dir() else value

    @field_validator("output")
    @classmethod
    def _absolute_output(cls, value: str) -> str:
        if storage.is_s3(value):
            storage.split_s3(value)
            return value.rstrip("/")
        return str(storage.local_path(value).absolute())

    @field_validator("work")
    @classmethod
    def _local_work(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("must be a folder that every worker sees")
        return None if value is None else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _work_goes_with_s3(self) -> Self:
        if storage.is_s3(self.output) and self.work is None:
            raise ValueError(
                f"output={self.output} takes the finished checkpoint alone; give --work, a folder that every worker "
                "sees, for the run until then"
            )
        if self.work is not None and not storage.is_s3(self.output):
            raise ValueError(
                f"work={self.work}: a run lies in its output={self.output} unless that is in S3; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _temperature_needs_data(self) -> Self:
        if self.fit_temperature and self.eval_data is None:
            raise ValueError("fit_temperature=true needs held-out records; give --eval-data")
        return self

    @property
    def folder(self) -> Path:
        """Where the run lies while it is at work: ``output`` itself, or ``work``."""
        return Path(self.work or self.output)

    @property
    def checkpoint_name(self) -> str:
        """Of the new checkpoint."""
        return self.name or self.output.rsplit("/", 1)[-1]

    def decisive(self) -> dict[str, Any]:
        """What a continuation must agree in, as JSON values."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE}


def defaults() -> dict[str, Any]:
    """The settings that have one, but those that may change, as JSON values."""
    fields = TrainConfig.model_fields.items()
    return {
        name: to_jsonable_python(f.get_default(call_default_factory=True))
        for name, f in fields
        if not f.is_required() and name not in FREE
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``assay train``; they win over ``--config``."""
    parser.add_argument("--config", metavar="FILE", help="YAML with every setting (infra/training/); flags win")
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", help=text)
    add_reading_options(parser)
    parser.add_argument("--workers", type=int, help="Ray Train workers (1)")
    parser.add_argument("--local", action="store_true", help="start a Ray of its own on this machine, for this run")


def build(path: str | None, flags: dict[str, Any]) -> TrainConfig:
    """Flags over ``--config`` over defaults. Raises ``ConfigError`` in one line with the first fault and its place."""
    values = read_yaml(path) if path else {}
    given = {key: value for key, value in flags.items() if value is not None}
    for name in ("map", "labels"):  # single entries win, the others stay
        if name in given and isinstance(in_file := values.get(name) or {}, dict):
            given[name] = {**in_file, **given[name]}
    try:
        return TrainConfig.model_validate({**values, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        if not place:  # about several settings
            raise ConfigError(str(fault["msg"])) from error
        if fault["type"] == "missing":
            raise ConfigError(
                f"{place} is required; give --{place.replace('_', '-')}, or {place}: in --config"
            ) from error
        raise ConfigError(f"{place}: {fault['msg']} (got {fault['input']!r})") from error
