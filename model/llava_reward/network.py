"""The reward network: one image tower, and per perspective a language model, SkipCA and a value head.

LoRA is merged into a language model per perspective, or lies beside the weights of a single one (``low_rank.py``).

Letters: b: samples, k: pictures among them, m: captions of one picture (padded to the most), h: hidden size,
n: image tokens (padded to the longest), v: values per reward (1 for BT).
Source: LLaVA-Reward (arXiv 2507.21391), in the form of the released code; rewards equal those of one sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from model.llava_reward.lora import LoraPair
from model.llava_reward.low_rank import Selection, put_beside
from model.perspectives import Perspective


class RewardBranch(nn.Module):
    """Everything that belongs to one perspective; its language model may be that of all, with LoRA beside it.

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
        asked = self.W_q(end.hidden) @ self.W_k.weight
        queries = asked.new_zeros(len(shown), max(pictures.slots()) + 1, tokens.shape[-1])  # (k, m, h)
        queries[place[0], place[1]] = asked
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
    """All perspectives of one checkpoint bundle, each with LoRA merged, until ``share_language_model`` is called.

    Branches may share one projector module; see ``share_projectors``.
    """

    def __init__(
        self, backbone: Backbone[Any, Any], vision: nn.Module, branches: Mapping[Perspective, RewardBranch]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.vision = vision
        self._projector_path = backbone.names.projector.removesuffix(".")
        self.branches = nn.ModuleDict({str(perspective): branch for perspective, branch in branches.items()})
        self._selection: Selection | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether one language model takes all perspectives of a pass at once, so that each sample is in it often."""
        return self._selection is not None

    def branch(self, perspective: Perspective) -> RewardBranch:
        """The part of one perspective."""
        return cast(RewardBranch, self.branches[str(perspective)])

    def forward(self, batch: Sequence[Any], perspectives: Sequence[Perspective]) -> dict[Perspective, Tensor]:
        """Rewards of any mix of sizes and lengths; each equals the reward of its sample alone.

        - batch: samples as ``backbone.sample`` makes them
        - returns: per perspective ``(b, v)``
        """
        shared = self.backbone.share(self.vision, batch)
        projected: dict[nn.Module, Sequence[Tensor]] = {}  # by projector: once per image, however many share it
        image_tokens = []
        for perspective in perspectives:
            branch = self.branch(perspective)
            projector = branch.get_submodule(self._projector_path)
            if projector not in projected:
                projected[projector] = self.backbone.project(branch.model, shared)
            image_tokens.append(projected[projector])
        ends = self._ends_together if self.is_low_rank else self._ends_apart
        return {p: self.branch(p)(end) for p, end in ends(shared, perspectives, image_tokens)}

    def _ends_apart(
        self, shared: Any, perspectives: Sequence[Perspective], image_tokens: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[Perspective, EndState]]:
        """One language model after the other."""
        for perspective, own in zip(perspectives, image_tokens, strict=True):
            yield perspective, self.backbone.end_state(self.branch(perspective).model, shared, own)

    def _ends_together(
        self, shared: Any, perspectives: Sequence[Perspective], image_tokens: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[Perspective, EndState]]:
        """All perspectives through one language model, stacked along the batch."""
        if not perspectives or self._selection is None:
            return
        stacked = self.backbone.stack(shared, len(perspectives))
        with self._selection.of(perspectives):
            model = self.branch(perspectives[0]).model  # the language model is the same in every branch
            end = self.backbone.end_state(model, stacked, [token for own in image_tokens for token in own])
        for perspective, hidden, own in zip(
            perspectives, end.hidden.chunk(len(perspectives)), image_tokens, strict=True
        ):
            yield perspective, EndState(hidden, own)

    def share_language_model(self, adapters: Mapping[Perspective, Mapping[str, LoraPair]]) -> None:
        """Give all branches the first one's language model, whose weights are those of the backbone, LoRA beside them.

        Projectors, SkipCA and heads stay with their branches.

        - adapters: per perspective, pairs by the module's path in a branch
        """
        first, *others = (self.branch(perspective) for perspective in adapters)
        _, *path = self._projector_path.split(".")
        for other in others:
            _adopt(other.model, first.model, path)
        self._selection = put_beside(first, adapters)

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


def _adopt(mine: nn.Module, theirs: nn.Module, kept: Sequence[str]) -> None:
    """Put everything of ``theirs`` into ``mine``, except for the submodule at the path ``kept``."""
    for name, parameter in theirs.named_parameters(recurse=False):
        setattr(mine, name, parameter)
    for name, child in theirs.named_children():
        if name != kept[0]:
            setattr(mine, name, child)
        elif len(kept) > 1:
            _adopt(mine.get_submodule(name), child, kept[1:])


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
