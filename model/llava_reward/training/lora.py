"""LoRA as it is trained: two narrow float32 matrices beside each frozen projection.

Letters: r: rank. Source: PEFT 0.13 (``gaussian`` initialisation), as the released trainer uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.lora import layer_projections


@dataclass(frozen=True)
class LoraSpec:
    """``dropout``: share of the inputs of the update that are zeroed while training, in [0, 1)."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Module):
    """``x W^T + scale * (dropout(x) A^T) B^T``; only A and B are trained.

    - base: the frozen projection; lora_A: ``(r, in)``, lora_B: ``(out, r)``, both float32
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = spec.scale
        self.dropout = nn.Dropout(spec.dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(spec.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, spec.rank, device=device))

    def forward(self, values: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        out: Tensor = self.base(values)
        return out + self._update(values, self.lora_B)

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Outputs ``start`` up to ``stop`` alone: ``(..., in)`` to ``(..., stop - start)``."""
        return output_rows(self.base, values, start, stop) + self._update(values, self.lora_B[start:stop])

    def _update(self, values: Tensor, b: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(self.dropout(values), self.lora_A), b)

    def draw(self, generator: torch.Generator) -> None:
        """A gaussian of deviation 1/r, B zero: the update starts as nothing."""
        drawn = torch.randn(self.lora_A.shape, generator=generator) / len(self.lora_A)
        self.lora_A.data.copy_(drawn)
        self.lora_B.data.zero_()


def attach(branch: nn.Module, backbone: Backbone[Any, Any], spec: LoraSpec, generator: torch.Generator) -> None:
    """Put a ``LoraLinear`` in the place of each projection, drawn in order of path."""
    for path in sorted(layer_projections(backbone)):
        base = branch.get_submodule(path)
        assert isinstance(base, nn.Linear), f"{path} is {type(base).__name__}"
        adapted = LoraLinear(base, spec)
        adapted.draw(generator)
        branch.set_submodule(path, adapted)
