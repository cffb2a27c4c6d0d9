"""Teaches a small phi3v to caption drawn scenes: ``python -m model.llava_reward.pretrain OUT [--config FILE]``.

First its image tower alone learns what each cell of a scene shows, then all the rest learns to caption. With
``--start BACKBONE`` it begins with the weights of a backbone of the same sizes instead of random ones.

    OUT/backbone/     config.json, clip_tower.json, tokenizer.json, model.safetensors (bfloat16): the published layout
    OUT/state.pt      weights, optimizer, stage and step, from which the same command goes on
    OUT/log.jsonl     one JSON object for each report and each validation

Stop it with Ctrl-C or SIGTERM: it saves and ends. Killed in any other way it repeats what came after the last save.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from model.errors import ConfigError, DivergedError
from model.llava_reward.pretrain_config import PretrainConfig, read_pretrain_config
from model.llava_reward.pretrain_data import Sample, SceneSamples
from model.llava_reward.pretrain_network import PretrainNetwork
from model.llava_reward.pretrain_objectives import Captioning, Objective, SeeingCells, build_optimizer, learning_rate
from model.llava_reward.scene_tokenizer import build_scene_tokenizer
from model.llava_reward.small_phi3v import write_configs
from model.scene_splits import Split

DEFAULT_CONFIG = Path(__file__).parent / "pretrain.yaml"


class Pretraining:
    """One run in its folder, new or resumed.

    - workers: processes that draw, 0 to draw in this one
    - start: backbone whose weights a new run begins with
    - stage, step: where it stands: the stage's name, and steps of that stage; seen: samples of all stages
    """

    def __init__(self, out: Path, config: PretrainConfig, *, workers: int = 1, start: Path | None = None) -> None:
        self.out, self.config, self._workers = out, config, workers
        self.backbone = out / "backbone"
        if not self._state_path.exists():
            write_configs(self.backbone, config.network, build_scene_tokenizer(), is_tied=True)
        self.network = PretrainNetwork(self.backbone, config.seed, is_mixed=config.is_mixed)
        self.objectives: dict[str, Objective] = {
            "tower": SeeingCells(self.network, config.tower),
            "captions": Captioning(self.network, config.captions),
        }
        self.seen = 0
        self._is_stopping = False
        self.begin("tower")
        if self._state_path.exists():
            self._resume()
        elif start is not None:
            self.network.read(start)

    @property
    def _state_path(self) -> Path:
        return self.out / "state.pt"

    def begin(self, stage: str) -> None:
        """Start a stage with the weights as they are and an optimizer of its own."""
        self.stage, self.step = stage, 0
        self.objective = self.objectives[stage]
        self.optimizer = build_optimizer(self.network, self.objective)

    def _resume(self) -> None:
        state = torch.load(self._state_path, weights_only=True)
        ours = json.loads(json.dumps(self.config.must_stay()))
        if state["must_stay"] != ours:
            changed = [name for name in ours if state["must_stay"].get(name) != ours[name]]
            raise ConfigError(f"{self._state_path} was made with another {', '.join(changed)}; use another folder")
        self.network.load_state_dict(state["network"])
        self.begin(state["stage"])
        # Moments come from the state; rates, betas and decay from the configuration, which may have changed.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]["state"]})
        self.step, self.seen = state["step"], state["seen"]

    def save(self) -> None:
        """Write state and backbone, each whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seen": self.seen,
            "must_stay": json.loads(json.dumps(self.config.must_stay())),
        }
        partial = self._state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state_path)
        self.network.write(self.backbone)

    def stop(self) -> None:
        """Save and end after the step under way."""
        self._is_stopping = True

    def run(self) -> None:
        """Train to the last step of the last stage, reporting and saving on the way.

        Raises ``DivergedError`` when a loss diverges.
        """
        names = list(self.objectives)
        for name in names[names.index(self.stage) :]:
            if name != self.stage:
                self.begin(name)
            self._run_stage()
            if self._is_stopping:
                break
        self.save()

    def _run_stage(self) -> None:
        report, saved = self.config.reporting, time.monotonic()
        losses: list[dict[str, float]] = []
        started = time.monotonic()
        for batch in self._batches():
            losses.append(self.train_step(batch))
            if self.step % report.log_steps == 0:
                seconds = (time.monotonic() - started) / len(losses)
                means = {name: sum(one[name] for one in losses) / len(losses) for name in losses[0]}
                self._log(**means, seconds_a_step=seconds)
                losses, started = [], time.monotonic()
            if self.step % report.validate_steps == 0 or self.step == self.objective.stage.steps:
                self.validate()
                started = time.monotonic()
            if self._is_stopping:
                return
            if time.monotonic() - saved > report.save_seconds:
                self.save()
                saved = time.monotonic()

    def train_step(self, batch: Sequence[Any]) -> dict[str, float]:
        """One step of the optimizer; the batch's mean losses, by name."""
        stage = self.objective.stage
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, self.step)
        means: dict[str, float] = {}
        for losses in self.objective.losses(batch):
            losses.total.backward()  # type: ignore[no-untyped-call]
            for name, part in losses.parts.items():
                means[name] = means.get(name, 0.0) + part.item()
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), stage.clip))
        if not all(map(math.isfinite, (norm, *means.values()))):
            message = f"{self.stage}, step {self.step}: losses {means}, gradient norm {norm}; lower {self.stage}.rate"
            raise DivergedError(f"{message} and start again from {self._state_path}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + len(batch)
        return means

    def _samples(self, split: Split, length: int) -> SceneSamples:
        config = self.config
        return SceneSamples(
            split,
            config.scenes,
            config.network,
            self.backbone / "tokenizer.json",
            config.captions,
            length,
        )

    def _batches(self) -> Iterator[list[Any]]:
        """The batches that are left of the stage. Sample n of the run is sample n of the split, resumed or not."""
        stage = self.objective.stage
        end = self.seen + (stage.steps - self.step) * stage.batch
        yield from self._load(Subset(self._samples(Split.TRAINING, end), range(self.seen, end)), stage.batch)

    def _load(self, samples: SceneSamples | Subset[Sample], batch: int) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch,
            num_workers=self._workers,
            collate_fn=self.objective.prepared,
            prefetch_factor=8 if self._workers else None,
        )

    def validate(self) -> None:
        """Measure on scenes of new seeds, and on scenes with held-out combinations."""
        for split in (Split.VALIDATION, Split.HELD_OUT):
            samples = self._samples(split, self.config.reporting.scenes)
            found = self.objective.measure(self._load(samples, self.objective.stage.micro_batch))
            self._log(split=split.value, **found)

    def _log(self, **values: Any) -> None:
        rounded = {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}
        entry = {"time": time.strftime("%H:%M:%S"), "stage": self.stage, "step": self.step, **rounded}
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--start", type=Path, metavar="BACKBONE", help="begin with its weights")
    parser.add_argument("--threads", type=int, default=1, help="of the network; one more process draws")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretraining = Pretraining(args.out, read_pretrain_config(args.config), start=args.start)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: pretraining.stop())
    pretraining.run()


if __name__ == "__main__":
    main()
