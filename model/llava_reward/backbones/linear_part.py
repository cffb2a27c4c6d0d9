"""Some outputs of a linear layer, whatever holds its weight."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F


class _Parted(Protocol):
    def part(self, values: Tensor, rows: slice) -> Tensor: ...


def linear_part(linear: nn.Module, values: Tensor, rows: slice) -> Tensor:
    """``linear(values)[..., rows]`` without computing the rest: ``(..., i)`` to ``(..., len(rows))``.

    - linear: ``nn.Linear``, or a module that has the method ``part``
    """
    if isinstance(linear, nn.Linear):
        bias = None if linear.bias is None else linear.bias[rows]
        return F.linear(values, linear.weight[rows], bias)
    return cast(_Parted, linear).part(values, rows)
