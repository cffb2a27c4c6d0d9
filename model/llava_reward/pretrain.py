"""Teaches a small phi3v to caption drawn scenes: ``python -m model.llava_reward.pretrain OUT [--config FILE]``.

    OUT/backbone/     config.json, clip_tower.json, tokenizer.json, model.safetensors (bfloat16): the published layout
    OUT/state.pt      weights, optimizer and step, from which the same command goes on
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from model.errors import ConfigError, DivergedError
from model.llava_reward.pretrain_config import Learning, PretrainConfig, read_pretrain_config
from model.llava_reward.pretrain_data import Sample, SceneSamples
from model.llava_reward.pretrain_measure import measure
from model.llava_reward.pretrain_network import PretrainNetwork
from model.llava_reward.scene_tokenizer import build_scene_tokenizer
from model.llava_reward.small_phi3v import write_configs
from model.llava_reward.training.schedule import learning_rate_factor
from model.scene_splits import Split

DEFAULT_CONFIG = Path(__file__).parent / "pretrain.yaml"


class Pretraining:
    """One run in its folder, new or resumed. ``workers``: processes that draw, 0 to draw in this one."""

    def __init__(self, out: Path, config: PretrainConfig, *, workers: int = 1) -> None:
        self.out, self.config, self._workers = out, config, workers
        self.backbone = out / "backbone"
        if not self._state_path.exists():
            write_configs(self.backbone, config.network, build_scene_tokenizer(), is_tied=True)
        self.network = PretrainNetwork(self.backbone, config.seed, is_mixed=config.learning.is_mixed)
        self.optimizer = _optimizer(self.network, config.learning)
        self.step = 0
        self._is_stopping = False
        if self._state_path.exists():
            self._resume()

    @property
    def _state_path(self) -> Path:
        return self.out / "state.pt"

    def _resume(self) -> None:
        state = torch.load(self._state_path, weights_only=True)
        ours = json.loads(json.dumps(self.config.must_stay()))
        if state["must_stay"] != ours:
            changed = [name for name in ours if state["must_stay"].get(name) != ours[name]]
            raise ConfigError(f"{self._state_path} was made with another {', '.join(changed)}; use another folder")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write state and backbone, each whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
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
        """Train to the last step, reporting and saving on the way. Raises ``DivergedError`` when the loss diverges."""
        report, saved = self.config.reporting, time.monotonic()
        losses: list[tuple[float, float]] = []
        started = time.monotonic()
        for batch in self._batches():
            losses.append(self.train_step(batch))
            if self.step % report.log_steps == 0:
                seconds = (time.monotonic() - started) / len(losses)
                means = [sum(values) / len(losses) for values in zip(*losses, strict=True)]
                self._log(loss=means[0], cells=means[1], seconds_a_step=seconds)
                losses, started = [], time.monotonic()
            if self.step % report.validate_steps == 0 or self.step == self.config.learning.steps:
                self.validate()
                started = time.monotonic()
            if self._is_stopping or time.monotonic() - saved > report.save_seconds:
                self.save()
                saved = time.monotonic()
            if self._is_stopping:
                return
        self.save()

    def train_step(self, batch: Sequence[Sample]) -> tuple[float, float]:
        """One step of the optimizer; its mean losses of a token and of a cell."""
        learning = self.config.learning
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(learning, self.step)
        # Texts of similar length go together, so that little is padding; the sums below do not depend on it.
        ordered = sorted(batch, key=lambda sample: len(sample.input_ids))
        total = float(sum(sample.weights.sum() for sample in batch))
        text, cells = 0.0, 0.0
        for start in range(0, len(ordered), learning.micro_batch):
            said = self.network(ordered[start : start + learning.micro_batch])
            text_loss: Tensor = (said.losses * said.weights).sum() / total
            cell_loss: Tensor = said.cell_loss / len(batch)
            loss: Tensor = text_loss + learning.cell_weight * cell_loss
            loss.backward()  # type: ignore[no-untyped-call]
            text, cells = text + text_loss.item(), cells + cell_loss.item()
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), learning.clip))
        if not (math.isfinite(text + cells) and math.isfinite(norm)):
            message = f"step {self.step}: loss {text}, of cells {cells}, gradient norm {norm}; lower learning.rate"
            raise DivergedError(f"{message} and start again from {self._state_path}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return text, cells

    def _samples(self, split: Split, length: int) -> SceneSamples:
        config = self.config
        return SceneSamples(
            split,
            config.scenes,
            config.network,
            self.backbone / "tokenizer.json",
            config.learning.prompt_weight,
            length,
        )

    def _batches(self) -> Iterator[list[Sample]]:
        """The batches that are left. Sample n of the run is sample n of the split, resumed or not."""
        learning = self.config.learning
        length = learning.steps * learning.batch
        left = Subset(self._samples(Split.TRAINING, length), range(self.step * learning.batch, length))
        yield from _load(left, learning.batch, self._workers)

    def validate(self) -> None:
        """Measure on scenes of new seeds, and on scenes with held-out combinations."""
        for split in (Split.VALIDATION, Split.HELD_OUT):
            samples = self._samples(split, self.config.reporting.scenes)
            found = measure(self.network, _load(samples, self.config.learning.micro_batch, self._workers))
            self._log(split=split.value, **found)

    def _log(self, **values: Any) -> None:
        rounded = {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}
        entry = {"time": time.strftime("%H:%M:%S"), "step": self.step, **rounded}
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _load(samples: SceneSamples | Subset[Sample], batch: int, workers: int) -> DataLoader[Any]:
    # Samples differ in length, so a batch stays a list.
    return DataLoader(samples, batch, num_workers=workers, collate_fn=list, prefetch_factor=8 if workers else None)


def _optimizer(network: nn.Module, learning: Learning) -> torch.optim.AdamW:
    """Matrices decay towards zero; biases, norms, embeddings and separators do not."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in network.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith(("_GN", "embedding.weight", "embed_tokens.weight"))
        groups[is_matrix].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": learning.weight_decay}],
        lr=learning.rate,
        betas=(learning.beta1, learning.beta2),
        fused=True,
    )


def learning_rate(learning: Learning, step: int) -> float:
    """Of a step; ``last_rate`` times ``rate`` at the last one."""
    return learning.rate * learning_rate_factor(step, learning.steps, learning.warmup, learning.last_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--threads", type=int, default=1, help="of the network; one more process draws")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretraining = Pretraining(args.out, read_pretrain_config(args.config))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: pretraining.stop())
    pretraining.run()


if __name__ == "__main__":
    main()
