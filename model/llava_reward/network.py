"""The reward network: one image tower, and per perspective a language model, SkipCA and a value head.

Letters: b: samples, k: pictures among them, m: captions of one picture (padded to the most), h: hidden size,
n: image tokens (padded to the longest), v: values per reward (1 for BT).
Source: LLaVA-Reward (arXiv 2507.21391), in the form of the released code; rewards equal those of one sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model.errors import ConfigError
from model.llava_reward.backbones.interface import Backbone, EndState
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.rms_norm import RmsNorm
from model.llava_reward.config import HeadConfig
from model.perspectives import Perspective


class RewardBranch(nn.Module):
    """Everything that belongs to one perspective, LoRA already merged.

    - raises: ``ConfigError`` where the adapter has SkipCA and the family has none
    """

    def __init__(self, backbone: Backbone[Any, Any], head: HeadConfig) -> None:
        super().__init__()
        hidden = backbone.hidden_size
        self.head = head
        self.model = backbone.build_model()
        self.value_head = nn.Linear(hidden, head.value_head_dim, bias=False)
        if head.has_skip_ca:
            if backbone.skip_ca is None:
                raise ConfigError("add_cross_attention=true, but this backbone's released form has no SkipCA")
            self.has_image_keys = backbone.skip_ca.has_image_keys
            self.W_q = nn.Linear(hidden, hidden, bias=False)
            self.W_k = nn.Linear(hidden, hidden, bias=False)
            self.W_v = nn.Linear(hidden, hidden, bias=False)
            self.ca_layernorm = RmsNorm(hidden, backbone.skip_ca.norm_eps)

    def head_input(self, end: EndState) -> Tensor:
        """SkipCA: the end token attends once to its own image tokens.

        Where the released form finds no key, the attention's output is zero, and only the norm remains.

        - returns: ``(b, h)``; the end token's hidden state itself for checkpoints without SkipCA
        """
        if not self.head.has_skip_ca:
            return end.hidden
        mixed = self._attend(end) if self.has_image_keys else torch.zeros_like(end.hidden)
        out: Tensor = self.ca_layernorm(end.hidden + mixed)
        return out

    def _attend(self, end: EndState) -> Tensor:
        """Folded for a single query: scores = E (W_k^T W_q x) / sqrt(h), output = W_v (sum_j p_j E_j).

        That is the released formula, without keys and values for thousands of image tokens.
        """
        pictures = Pictures.of(end.image_tokens)
        shown = pictures.once(end.image_tokens)
        tokens = pad_sequence(shown, batch_first=True)  # (k, n, h)
        counts = torch.tensor([len(t) for t in shown], device=tokens.device)
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= counts[:, None]
        # Captions of one picture ask it together, so that its tokens are not copied for each of them.
        place = torch.tensor([pictures.numbers, pictures.slots()], device=tokens.device)
        queries = end.hidden.new_zeros(len(shown), max(pictures.slots()) + 1, tokens.shape[-1])  # (k, m, h)
        queries[place[0], place[1]] = self.W_q(end.hidden) @ self.W_k.weight
        scores = torch.einsum("knh,kmh->kmn", tokens, queries).float() / math.sqrt(tokens.shape[-1])
        # Padding must weigh nothing, or a reward would depend on the largest image of its batch.
        weights = scores.masked_fill(is_padding[:, None], -math.inf).softmax(-1).to(tokens.dtype)
        mixed: Tensor = self.W_v(torch.einsum("kmn,knh->kmh", weights, tokens)[place[0], place[1]])
        return mixed

    def forward(self, end: EndState) -> Tensor:
        """Rewards ``(b, v)``, float32 in every dtype of the weights, unbounded, higher is better."""
        # bfloat16 has steps of 0.06 between 8 and 16: a reward rounded to it would jump by one when the last bit of
        # a sum falls otherwise in another batch, and rewards of unlike images would be equal.
        return F.linear(self.head_input(end).float(), self.value_head.weight.float())


class RewardNetwork(nn.Module):
    """All perspectives of one checkpoint bundle. Branches may share one projector module; see ``share_projectors``."""

    def __init__(
        self, backbone: Backbone[Any, Any], vision: nn.Module, branches: Mapping[Perspective, RewardBranch]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.vision = vision
        self._projector_path = backbone.names.projector.removesuffix(".")
        self.branches = nn.ModuleDict({str(perspective): branch for perspective, branch in branches.items()})

    def branch(self, perspective: Perspective) -> RewardBranch:
        """The part of one perspective."""
        return cast(RewardBranch, self.branches[str(perspective)])

    def forward(self, batch: Sequence[Any], perspectives: Sequence[Perspective]) -> dict[Perspective, Tensor]:
        """Rewards of any mix of sizes and lengths; each equals the reward of its sample alone.

        - batch: samples as ``backbone.sample`` makes them
        - returns: per perspective ``(b, v)``
        """
        shared = self.backbone.share(self.vision, batch)
        image_tokens: dict[nn.Module, Sequence[Tensor]] = {}  # by projector: once per image, however many share it
        rewards = {}
        for perspective in perspectives:
            branch = self.branch(perspective)
            projector = branch.get_submodule(self._projector_path)
            if projector not in image_tokens:
                image_tokens[projector] = self.backbone.project(branch.model, shared)
            rewards[perspective] = branch(self.backbone.end_state(branch.model, shared, image_tokens[projector]))
        return rewards

    def share_projectors(self) -> None:
        """Give branches whose projectors hold equal tensors one module, for inference: kept and computed once."""
        distinct: list[nn.Module] = []
        for branch in self.branches.values():
            own = branch.get_submodule(self._projector_path)
            found = next((other for other in distinct if _same_tensors(own, other)), None)
            if found is None:
                distinct.append(own)
            else:
                branch.set_submodule(self._projector_path, found)


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
