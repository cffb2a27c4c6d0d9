"""The training losses of LLaVA-Reward, by the names that the released trainer gives them.

Each takes float tensors and returns the mean loss with a mean probability for logging. They know nothing about models
or data.

Letters: b: pairs or samples, v: values per reward (1 for BT and classification, even for GPM).
d = chosen - rejected; s = sum over 2-blocks of chosen_0 * rejected_1 - chosen_1 * rejected_0; sg: sigmoid.
Source: LLaVA-Reward (arXiv 2507.21391) and its released loss module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import ConfigError

# Where regression pulls d / tau or s / tau to; a margin m makes it 5 * sg(m).
REGRESSION_TARGET = 10.0
FOCAL_GAMMA = 0.5


class LossValue(NamedTuple):
    """Both scalars: ``loss`` to minimise; ``probability``, in [0, 1], for the log."""

    loss: Tensor
    probability: Tensor


def bt_difference(chosen: Tensor, rejected: Tensor) -> Tensor:
    """d of Bradley-Terry rewards: ``(b, 1)`` each, to ``(b, 1)``."""
    return chosen - rejected


def general_preference(chosen: Tensor, rejected: Tensor) -> Tensor:
    """s of GPM vectors: ``(b, v)`` each, v even, to ``(b, 1)``; raises ``ValueError`` for an odd v."""
    if chosen.shape != rejected.shape or chosen.shape[-1] % 2:
        raise ValueError(
            f"GPM vectors of shapes {tuple(chosen.shape)} and {tuple(rejected.shape)}, expected (b, even) twice"
        )
    blocks = chosen[..., 0::2] * rejected[..., 1::2] - chosen[..., 1::2] * rejected[..., 0::2]
    return blocks.sum(-1, keepdim=True)


def inner_product(chosen: Tensor, rejected: Tensor) -> Tensor:
    """<chosen, rejected>, symmetric: ``(b, v)`` each, to ``(b, 1)``."""
    return (chosen * rejected).sum(-1, keepdim=True)


def _preference(scores: Tensor, tau: float | Tensor, margin: Tensor | None = None) -> LossValue:
    """-log sg((score - m) / tau)."""
    logits = (scores if margin is None else scores - margin.view_as(scores)) / tau
    return LossValue(-F.logsigmoid(logits).mean(), logits.sigmoid().mean())


def _regression(scores: Tensor, tau: float | Tensor, target: float | Tensor) -> LossValue:
    """(score / tau - target)^2 / 2."""
    logits = scores / tau
    return LossValue((0.5 * (logits - target) ** 2).mean(), logits.sigmoid().mean())


def _margin_target(scores: Tensor, target: float, margin: Tensor | None) -> float | Tensor:
    return target if margin is None else target / 2 * margin.view_as(scores).sigmoid()


def pairwise_loss(chosen: Tensor, rejected: Tensor, tau: float | Tensor, margin: Tensor | None = None) -> LossValue:
    """-log sg((d - m) / tau): Bradley-Terry, the default. margin: ``(b,)``."""
    return _preference(bt_difference(chosen, rejected), tau, margin)


def focal_pairwise_loss(chosen: Tensor, rejected: Tensor, tau: float | Tensor, gamma: float = FOCAL_GAMMA) -> LossValue:
    """-log sg(d / tau) * (1 - sg(d / tau))^gamma: pairs that are right already count less."""
    logits = bt_difference(chosen, rejected) / tau
    # As a power of 1 - sg it would have no finite gradient where sg rounds to 1.
    weight = (gamma * F.logsigmoid(-logits)).exp()
    return LossValue((-F.logsigmoid(logits) * weight).mean(), logits.sigmoid().mean())


def pairwise_regression_loss(
    chosen: Tensor,
    rejected: Tensor,
    tau: float | Tensor,
    margin: Tensor | None = None,
    target: float = REGRESSION_TARGET,
) -> LossValue:
    """(d / tau - target)^2 / 2; with margin the target is target / 2 * sg(m)."""
    scores = bt_difference(chosen, rejected)
    return _regression(scores, tau, _margin_target(scores, target, margin))


def general_preference_loss(
    chosen: Tensor, rejected: Tensor, tau: float | Tensor, margin: Tensor | None = None
) -> LossValue:
    """-log sg((s - m) / tau): GPM of any even dimension."""
    return _preference(general_preference(chosen, rejected), tau, margin)


def unrotated_preference_loss(chosen: Tensor, rejected: Tensor, tau: float | Tensor) -> LossValue:
    """-log sg(<chosen, rejected> / tau)."""
    return _preference(inner_product(chosen, rejected), tau)


def general_preference_regression_loss(
    chosen: Tensor,
    rejected: Tensor,
    tau: float | Tensor,
    margin: Tensor | None = None,
    target: float = REGRESSION_TARGET,
) -> LossValue:
    """(s / tau - target)^2 / 2; with margin the target is target / 2 * sg(m). GPM of dimension 2."""
    scores = general_preference(chosen, rejected)
    return _regression(scores, tau, _margin_target(scores, target, margin))


def high_dim_regression_loss(
    chosen: Tensor,
    rejected: Tensor,
    tau: float | Tensor,
    margin: Tensor | None = None,
    target: float = REGRESSION_TARGET,
) -> LossValue:
    """(s / tau - target)^2 / 2; with margin ((s - m) / tau)^2 / 2, without a target. GPM of any even dimension."""
    scores = general_preference(chosen, rejected)
    if margin is None:
        return _regression(scores, tau, target)
    return _regression(scores - margin.view_as(scores), tau, 0.0)


def pair_classification_loss(chosen: Tensor, rejected: Tensor) -> LossValue:
    """BCE(chosen, 1) + BCE(rejected, 0) on logits; the probability is that of sg(d)."""
    loss = -F.logsigmoid(chosen).mean() - F.logsigmoid(-rejected).mean()
    return LossValue(loss, bt_difference(chosen, rejected).sigmoid().mean())


def binary_classification_loss(rewards: Tensor, labels: Tensor, *, rounds_as_released: bool = False) -> LossValue:
    """BCE of sg(reward) against labels, 1: safe. The probability is the mean P(safe).

    - rewards: ``(b, 1)`` or ``(b,)``; labels: ``(b,)``, 0 or 1
    - rounds_as_released: the released code casts labels to bfloat16, and so computes most of the loss in it
    """
    wanted = labels.view(-1).to(torch.bfloat16 if rounds_as_released else rewards.dtype)
    loss = F.binary_cross_entropy_with_logits(rewards.view(-1), wanted)
    return LossValue(loss.to(rewards.dtype), rewards.sigmoid().mean())


class LearnableTau(nn.Module):
    """A temperature trained with the network: max(softplus(sign * theta), least)."""

    def __init__(self, initial: float = -2.25, sign: float = 1.0, least: float = 0.01) -> None:
        super().__init__()
        # softplus(-2.25) = 0.1002, about the temperature of every published recipe.
        self.theta = nn.Parameter(torch.tensor(initial))
        self.sign, self.least = sign, least

    def forward(self) -> Tensor:
        """tau, a positive scalar."""
        return F.softplus(self.sign * self.theta).clamp(min=self.least)


PairFunction = Callable[..., LossValue]

_FIXED_TAU: dict[str, PairFunction] = {
    "PairWiseLoss": pairwise_loss,
    "FocalPairWiseLoss": focal_pairwise_loss,
    "PairWiseRegressionLoss": pairwise_regression_loss,
    "GeneralPreferenceLoss": general_preference_loss,
    "GeneralPreferenceLoss_no_R": unrotated_preference_loss,
    "GeneralPreferenceRegressionLoss": general_preference_regression_loss,
    "HighDimGeneralPreferenceLoss": general_preference_loss,
    "HighDimGeneralPreferenceRegressionLoss": high_dim_regression_loss,
}
_LEARNABLE_TAU: dict[str, tuple[PairFunction, Callable[[], LearnableTau]]] = {
    "PairWiseLearnableTauLoss": (pairwise_loss, LearnableTau),
    "PairWiseLearnableTauRegressionLoss": (
        pairwise_regression_loss,
        lambda: LearnableTau(initial=2.25, sign=-1.0, least=0.0),
    ),
    "GeneralPreferenceLearnableTauLoss": (general_preference_loss, LearnableTau),
    "GeneralPreferenceLearnableTauRegressionLoss": (general_preference_regression_loss, LearnableTau),
}
_WITHOUT_TAU: dict[str, PairFunction] = {"Cls_loss": pair_classification_loss}
_WITH_MARGIN = {
    pairwise_loss,
    pairwise_regression_loss,
    general_preference_loss,
    general_preference_regression_loss,
    high_dim_regression_loss,
}
_UNUSABLE = {
    "HighDimGeneralPreferenceLearnableTauLoss": "it calls a function that torch does not have",
    "HighDimGeneralPreferenceMoELoss": "it needs a response length that the dataset never returns",
    "HighDimGeneralPreferenceRegressionMoELoss": "it needs a response length that the dataset never returns",
    "SFTSumLoss": "its value is overwritten by the preference loss and has no effect",
    "margin_loss": "it reads the margin before there is one; give a margin to the loss itself",
    "Binary_Cls_loss": "it takes single images with labels; call binary_classification_loss",
}
PAIR_LOSSES = (*_FIXED_TAU, *_LEARNABLE_TAU, *_WITHOUT_TAU)


class PairLoss(nn.Module):
    """A loss over preference pairs; its parameters, where it has any, are the learnable temperature's."""

    def __init__(self, function: PairFunction, tau: float | LearnableTau | None) -> None:
        super().__init__()
        self.function, self.tau = function, tau

    def forward(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> LossValue:
        """Loss of rewards ``(b, v)`` each.

        - margin: ``(b,)``, by how much chosen should lead
        - raises: ``ConfigError`` if this loss knows no margin
        """
        options: dict[str, float | Tensor] = {}
        if self.tau is not None:
            options["tau"] = self.tau() if isinstance(self.tau, LearnableTau) else self.tau
        if margin is not None:
            if self.function not in _WITH_MARGIN:
                raise ConfigError(f"{self.function.__name__} has no margin; leave it out, or take PairWiseLoss")
            options["margin"] = margin
        return self.function(chosen, rejected, **options)


def pair_loss(name: str, tau: float = 0.1) -> PairLoss:
    """The loss of a released name, one of ``PAIR_LOSSES``.

    - tau: temperature, where it is fixed; ``general_preference_tau`` of the checkpoint
    - raises: ``ConfigError`` for names that are unknown, or that raise or do nothing in the released code
    """
    if name in _UNUSABLE:
        raise ConfigError(f"loss={name!r} cannot be used: {_UNUSABLE[name]}")
    if name in _FIXED_TAU:
        return PairLoss(_FIXED_TAU[name], tau)
    if name in _LEARNABLE_TAU:
        function, make_tau = _LEARNABLE_TAU[name]
        return PairLoss(function, make_tau())
    if name in _WITHOUT_TAU:
        return PairLoss(_WITHOUT_TAU[name], None)
    raise ConfigError(f"loss={name!r} is unknown, expected one of {list(PAIR_LOSSES)}")
