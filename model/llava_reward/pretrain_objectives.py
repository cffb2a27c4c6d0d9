"""The two objectives of pretraining, one after the other: what the tower's cells show, then captions.

Each says which weights move and how fast, what a batch loses, and how well the network does on other scenes.
Losses come a micro-batch at a time and add up to the means of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.pretrain_config import CaptionStage, Stage, TowerStage
from model.llava_reward.pretrain_data import Sample
from model.llava_reward.pretrain_measure import measure_captions, measure_cells
from model.llava_reward.pretrain_network import PretrainNetwork
from model.llava_reward.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class Losses:
    """Of a micro-batch. total: scalar to minimise; parts: what it is made of, by the name in the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """One stage of pretraining."""

    @property
    def stage(self) -> Stage: ...

    def rates(self) -> dict[nn.Parameter, float]:
        """The parameters that move, each with its share of the stage's rate."""
        ...

    def losses(self, batch: Sequence[Sample]) -> Iterator[Losses]:
        """One micro-batch after another; each is computed when it is asked for, so that one graph lives at a time."""
        ...

    def measure(self, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
        """How well the network does over all of ``batches``."""
        ...


class SeeingCells:
    """The tower says what each cell shows: those of the global view and of a few crops of each scene."""

    def __init__(self, network: PretrainNetwork, stage: TowerStage) -> None:
        self.network, self.stage = network, stage

    def rates(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.network.tower_parts(), 1.0)

    def losses(self, batch: Sequence[Sample]) -> Iterator[Losses]:
        total = sum(1 + min(self.stage.fine_crops, len(sample.crop_order)) for sample in batch)
        for part in _parts(batch, self.stage.micro_batch):
            crops, wanted = self.network.crops(part, self.stage.fine_crops)
            said = self.network.cell_logits(crops)
            loss = F.binary_cross_entropy_with_logits(said, wanted, reduction="sum") / (total * wanted.shape[1])
            yield Losses(loss, {"cells": loss})

    def measure(self, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
        return measure_cells(self.network, batches)


class Captioning:
    """All of the network says the caption, and the tower goes on saying what its cells show."""

    def __init__(self, network: PretrainNetwork, stage: CaptionStage) -> None:
        self.network, self.stage = network, stage

    def rates(self) -> dict[nn.Parameter, float]:
        tower = self.network.tower_parts()
        return {p: self.stage.tower_rate if p in tower else 1.0 for p in self.network.parameters()}

    def losses(self, batch: Sequence[Sample]) -> Iterator[Losses]:
        # Texts of similar length go together, so that little is padding; the sums below do not depend on it.
        ordered = sorted(batch, key=lambda sample: len(sample.input_ids))
        total = float(sum(sample.weights.sum() for sample in batch))
        for part in _parts(ordered, self.stage.micro_batch):
            said = self.network(part)
            text: Tensor = (said.losses * said.weights).sum() / total
            cells: Tensor = said.cell_loss / len(batch)
            yield Losses(text + self.stage.cell_weight * cells, {"loss": text, "cells": cells})

    def measure(self, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
        return measure_captions(self.network, batches)


def build_optimizer(network: nn.Module, objective: Objective) -> torch.optim.AdamW:
    """Matrices decay towards zero; biases, norms, embeddings and separators do not. Groups hold their rate's share."""
    stage, rates = objective.stage, objective.rates()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter in rates:
            is_matrix = parameter.dim() >= 2 and not name.endswith(("_GN", "embedding.weight", "embed_tokens.weight"))
            decay = stage.weight_decay if is_matrix else 0.0
            groups.setdefault((rates[parameter], decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": held, "share": share, "weight_decay": decay} for (share, decay), held in groups.items()],
        lr=stage.rate,
        betas=(stage.beta1, stage.beta2),
        fused=True,
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Of a step; ``last_rate`` times ``rate`` at the last one."""
    return stage.rate * learning_rate_factor(step, stage.steps, stage.warmup, stage.last_rate)


def _parts(batch: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    return (batch[start : start + size] for start in range(0, len(batch), size))
