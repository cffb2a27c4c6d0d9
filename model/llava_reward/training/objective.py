"""What a perspective is trained for: the loss, the head that it needs, and what counts as right.

Letters: b: records, v: values per reward (1, or even for general preference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.config import HeadConfig
from model.llava_reward.losses import (
    PAIR_LOSSES,
    LearnableTau,
    PairLoss,
    binary_classification_loss,
    bt_difference,
    general_preference,
    inner_product,
    pair_loss,
)
from model.meaning import HeadTraining

CLASSIFICATION = "Binary_Cls_loss"
# Short names of the three published recipes.
SHORT_NAMES = {"bt": "PairWiseLoss", "gpm": "GeneralPreferenceLoss", "cls": CLASSIFICATION}
LOSSES = (*SHORT_NAMES, *PAIR_LOSSES, CLASSIFICATION)
# Symmetric in chosen and rejected: it can be trained, and no preference can be read off what it trains.
SYMMETRIC = "GeneralPreferenceLoss_no_R"


class Outcome(NamedTuple):
    """Of some records: mean loss (with gradient); how many are right; ``(b,)`` log odds of the right answers."""

    loss: Tensor
    correct: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss by its released name, with the head that it trains.

    - tau: temperature of preferences; where the loss learns it, only until it is written
    """

    name: str
    head: HeadConfig
    has_margin: bool = False

    @property
    def kind(self) -> Literal["paired", "unpaired"]:
        """Which data it takes."""
        return "unpaired" if self.name == CLASSIFICATION else "paired"

    @property
    def training(self) -> HeadTraining | None:
        """What the head says of itself in ``scorer.json``; None for general preference."""
        if self.head.is_general_preference:
            return None
        return HeadTraining.CLS if self.kind == "unpaired" else HeadTraining.BT

    def build(self) -> nn.Module:
        """The loss as a module; its parameters are those of a learnable temperature."""
        if self.kind == "unpaired":
            return nn.Module()
        return pair_loss(self.name, self.head.tau)


def make_objective(
    loss: str, *, has_skip_ca: bool, tau: float = 0.1, value_head_dim: int | None = None, has_margin: bool = False
) -> Objective:
    """The objective of a loss name, one of ``LOSSES``.

    - value_head_dim: of general preference; 2 by default, 4 for the losses of more dimensions
    - raises: ``ConfigError`` for an unknown loss, or a dimension or margin that it cannot have
    """
    name = SHORT_NAMES.get(loss, loss)
    if name != CLASSIFICATION:
        pair_loss(name, tau)  # refuses what cannot be used, and says why
    is_vector, is_high = "GeneralPreference" in name, name.startswith("HighDim")
    dimension = value_head_dim or (4 if is_high else 2 if is_vector else 1)
    if is_vector and (dimension % 2 or (dimension == 2) is is_high):
        raise ConfigError(f"value_head_dim={dimension}: {name} needs {'an even number above 2' if is_high else '2'}")
    if not is_vector and dimension != 1:
        raise ConfigError(f"value_head_dim={dimension}: {name} has one value; leave it out")
    if has_margin:
        _check_margin(name, dimension)
    return Objective(name, HeadConfig(has_skip_ca, is_vector, dimension, tau), has_margin)


def _check_margin(name: str, dimension: int) -> None:
    if name == CLASSIFICATION:
        raise ConfigError(f"use_margin=true: {name} takes labels, which have no margin")
    # Losses say themselves whether they know a margin.
    values = torch.zeros(1, dimension)
    pair_loss(name)(values, values, torch.zeros(1))


def paired_outcome(loss: PairLoss, rewards: Tensor, margins: Sequence[float] | None) -> Outcome:
    """Of ``(2b, v)`` rewards, chosen first. A tie is wrong, as in the released evaluation."""
    chosen, rejected = rewards.chunk(2)
    margin = None if margins is None else torch.tensor(margins, device=rewards.device)
    value = loss(chosen, rejected, margin)
    score = _score(loss, chosen, rejected).detach()
    tau = loss.tau() if isinstance(loss.tau, LearnableTau) else loss.tau or 1.0
    return Outcome(value.loss, (score > 0).sum(), (score / tau).detach().view(-1))


def _score(loss: PairLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    if chosen.shape[-1] == 1:
        return bt_difference(chosen, rejected)
    is_symmetric = loss.function is pair_loss(SYMMETRIC).function
    return inner_product(chosen, rejected) if is_symmetric else general_preference(chosen, rejected)


def unpaired_outcome(rewards: Tensor, labels: Sequence[int]) -> Outcome:
    """Of ``(b, 1)`` rewards; a reward of 0 counts as label 1, as in the released evaluation."""
    wanted = torch.tensor(labels, device=rewards.device)
    value = binary_classification_loss(rewards, wanted)
    logits = rewards.detach().view(-1)
    is_right = (logits >= 0) == (wanted == 1)
    return Outcome(value.loss, is_right.sum(), torch.where(wanted == 1, logits, -logits))
