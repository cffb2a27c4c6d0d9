"""The two objectives of pretraining, one after the other: what the tower's cells show, then captions.

Each says which weights move, what a batch loses, and how well the network does on other scenes. Losses come a
micro-batch at a time and add up to the means of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.pretrain_config import CaptionStage, Stage, TowerStage
from model.llava_reward.pretrain_data import NEVER_TOGETHER, NO_WORD, Sample
from model.llava_reward.pretrain_measure import measure_captions, measure_cells
from model.llava_reward.pretrain_network import PretrainNetwork, SeenSample
from model.llava_reward.training.schedule import learning_rate_factor

T = TypeVar("T")


@dataclass(frozen=True)
class Losses:
    """Of a micro-batch. total: scalar to minimise; parts: what it is made of, by the name in the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """One stage of pretraining."""

    @property
    def stage(self) -> Stage: ...

    def moved(self) -> frozenset[nn.Parameter]:
        """The parameters that move."""
        ...

    def prepared(self, batch: Sequence[Sample]) -> list[Any]:
        """What no gradient goes through, done where the samples are drawn: in another process if there is one."""
        ...

    def losses(self, batch: Sequence[Any]) -> Iterator[Losses]:
        """One micro-batch after another; each is computed when it is asked for, so that one graph lives at a time."""
        ...

    def measure(self, batches: Iterable[Sequence[Any]]) -> dict[str, float]:
        """How well the network does over all of ``batches``."""
        ...


class SeeingCells:
    """The tower says what each cell shows: those of the global view and of a few crops of each scene.

    What the split alone decides is not asked: see ``NEVER_TOGETHER``.
    """

    def __init__(self, network: PretrainNetwork, stage: TowerStage) -> None:
        self.network, self.stage = network, stage
        self._never_together = torch.from_numpy(NEVER_TOGETHER).float()

    def moved(self) -> frozenset[nn.Parameter]:
        return self.network.tower_parts()

    def prepared(self, batch: Sequence[Sample]) -> list[Sample]:
        return list(batch)

    def losses(self, batch: Sequence[Sample]) -> Iterator[Losses]:
        total = sum(1 + min(self.stage.fine_crops, len(sample.crop_order)) for sample in batch)
        for part in _parts(batch, self.stage.micro_batch):
            crops, wanted = self.network.crops(part, self.stage.fine_crops)
            said = self.network.cell_logits(crops)
            asked = (wanted @ self._never_together == 0).float()
            loss = F.binary_cross_entropy_with_logits(said, wanted, asked, reduction="sum")
            loss = loss / (total * wanted.shape[1])
            yield Losses(loss, {"cells": loss})

    def measure(self, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
        return measure_cells(self.network, batches)


class Captioning:
    """All but the tower learns to say the caption, and at each word of a prompt whether the image contradicts it yet.

    The tower stays as it is, as it does in every published reward recipe, and so runs where the samples are drawn.
    """

    def __init__(self, network: PretrainNetwork, stage: CaptionStage) -> None:
        self.network, self.stage = network, stage

    def moved(self) -> frozenset[nn.Parameter]:
        return frozenset(self.network.parameters()) - self.network.tower_parts()

    def prepared(self, batch: Sequence[Sample]) -> list[SeenSample]:
        return self.network.see(batch)

    def losses(self, batch: Sequence[SeenSample]) -> Iterator[Losses]:
        # Texts of similar length go together, so that little is padding; the sums below do not depend on it.
        ordered = sorted(batch, key=lambda seen: len(seen.sample.input_ids))
        total = float(sum(seen.sample.weights.sum() for seen in batch))
        words = max(1, sum(int((seen.sample.wrong != NO_WORD).sum()) for seen in batch))
        for part in _parts(ordered, self.stage.micro_batch):
            said = self.network(part)
            text: Tensor = (said.losses * said.weights).sum() / total
            wrong = F.binary_cross_entropy_with_logits(said.wrong, said.is_wrong, reduction="sum") / words
            yield Losses(text + self.stage.word_weight * wrong, {"loss": text, "words": wrong})

    def measure(self, batches: Iterable[Sequence[SeenSample]]) -> dict[str, float]:
        return measure_captions(self.network, batches)


def build_optimizer(network: nn.Module, objective: Objective) -> torch.optim.AdamW:
    """Of what the objective moves. Matrices decay towards zero; biases, norms, embeddings and separators do not."""
    stage, moved = objective.stage, objective.moved()
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter in moved:
            is_matrix = parameter.dim() >= 2 and not name.endswith(("_GN", "embedding.weight", "embed_tokens.weight"))
            decay = stage.weight_decay if is_matrix else 0.0
            groups.setdefault(decay, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": held, "weight_decay": decay} for decay, held in groups.items()],
        lr=stage.rate,
        betas=(stage.beta1, stage.beta2),
        fused=True,
    )


def learning_rate(stage: Stage, step: int) -> float:
    """Of a step; ``last_rate`` times ``rate`` at the last one."""
    return stage.rate * learning_rate_factor(step, stage.steps, stage.warmup, stage.last_rate)


def _parts(batch: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (batch[start : start + size] for start in range(0, len(batch), size))
