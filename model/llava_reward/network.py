"""The reward network: one image tower, and per perspective a language model, SkipCA and a value head.

Letters: b: samples, h: hidden size, n: image tokens (padded to the longest), v: values per reward (1 for BT).
Source: LLaVA-Reward (arXiv 2507.21391), in the form of the released code; rewards equal those of one sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.llava_reward.backbones.phi3v import Lengths, Phi3VModel, RmsNorm, VisionEncoder
from model.llava_reward.backbones.rope import rope_tables
from model.llava_reward.config import ClipConfig, HeadConfig, Phi3VConfig
from model.perspectives import Perspective

# Fixed in the released code, whatever the backbone's own value.
_CA_NORM_EPS = 1e-5


@dataclass(frozen=True)
class NetworkInput:
    """One sample on the device, without any padding.

    - input_ids: ``(length,)`` int64, negative where an image token goes, the end token last
    - crops: ``(1 + rows*columns, 3, c, c)`` normalised, global view first
    - grid: rows and columns of crops
    """

    input_ids: Tensor
    crops: Tensor
    grid: tuple[int, int]


class RewardBranch(nn.Module):
    """Everything that belongs to one perspective, LoRA already merged."""

    def __init__(self, config: Phi3VConfig, clip: ClipConfig, head: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.head = head
        self.model = Phi3VModel(config, clip)
        self.value_head = nn.Linear(hidden, head.value_head_dim, bias=False)
        if head.has_skip_ca:
            self.W_q = nn.Linear(hidden, hidden, bias=False)
            self.W_k = nn.Linear(hidden, hidden, bias=False)
            self.W_v = nn.Linear(hidden, hidden, bias=False)
            self.ca_layernorm = RmsNorm(hidden, _CA_NORM_EPS)

    def head_input(self, end_hidden: Tensor, image_tokens: Sequence[Tensor]) -> Tensor:
        """SkipCA: the end token attends once to its own image tokens.

        Folded for a single query: scores = E (W_k^T W_q x) / sqrt(h), output = W_v (sum_j p_j E_j). That is the
        released formula, without keys and values for thousands of image tokens.

        - end_hidden: ``(b, h)`` after the final norm; image_tokens: per sample ``(n, h)``, projected
        - returns: ``(b, h)``; ``end_hidden`` itself for checkpoints without SkipCA
        """
        if not self.head.has_skip_ca:
            return end_hidden
        tokens = pad_sequence(list(image_tokens), batch_first=True)  # (b, n, h)
        counts = torch.tensor([len(t) for t in image_tokens], device=tokens.device)
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= counts[:, None]
        folded_query = self.W_q(end_hidden) @ self.W_k.weight  # (b, h)
        scores = torch.einsum("bnh,bh->bn", tokens, folded_query).float() / math.sqrt(end_hidden.shape[-1])
        # Padding must weigh nothing, or a reward would depend on the largest image of its batch.
        weights = scores.masked_fill(is_padding, -math.inf).softmax(-1).to(tokens.dtype)
        mixed = self.W_v(torch.einsum("bn,bnh->bh", weights, tokens))
        out: Tensor = self.ca_layernorm(end_hidden + mixed)
        return out

    def forward(
        self, input_ids: Tensor, merged: Sequence[Tensor], rope: tuple[Tensor, Tensor], lengths: Lengths
    ) -> Tensor:
        """Rewards of right-padded samples.

        - input_ids: ``(b, l)``; merged: per sample ``(n, 4w)`` from the shared tower
        - returns: ``(b, v)``, unbounded, higher is better
        """
        projected = self.model.vision_embed_tokens(torch.cat(list(merged)))
        end_hidden = self.model.end_hidden(self.model.embed(input_ids, projected), rope, lengths)
        image_tokens = projected.split([len(m) for m in merged])
        rewards: Tensor = self.value_head(self.head_input(end_hidden, image_tokens))
        return rewards


class RewardNetwork(nn.Module):
    """All perspectives of one checkpoint bundle."""

    def __init__(
        self, config: Phi3VConfig, vision: VisionEncoder, branches: Mapping[Perspective, RewardBranch]
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.branches = nn.ModuleDict({str(perspective): branch for perspective, branch in branches.items()})

    def forward(self, batch: Sequence[NetworkInput], perspectives: Sequence[Perspective]) -> dict[Perspective, Tensor]:
        """Rewards of any mix of sizes and lengths; each equals the reward of its sample alone.

        The tower runs once per image, on real crops only, whatever the number of perspectives.

        - returns: per perspective ``(b, v)``
        """
        merged = self.vision([item.crops for item in batch], [item.grid for item in batch])
        input_ids = pad_sequence([item.input_ids for item in batch], batch_first=True)
        counts = torch.tensor([len(item.input_ids) for item in batch], device=input_ids.device)
        lengths = Lengths(counts, input_ids.shape[1])
        rope = rope_tables(counts, lengths.padded, self.config.rope)
        return {p: self.branches[str(p)](input_ids, merged, rope, lengths) for p in perspectives}


def strip_padding(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Rows of a padded batch without their padding, left or right: ``(b, l)`` to ``b`` of ``(length,)``."""
    return [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
