"""Part of what a linear module computes, whatever holds its weight."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F


@runtime_checkable
class HasRows(Protocol):
    """A linear module that is not a plain ``nn.Linear``, and computes some of its outputs by itself."""

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Outputs ``start`` up to ``stop`` of ``(..., in)``: ``(..., stop - start)``."""
        ...


def output_rows(linear: nn.Module, values: Tensor, start: int, stop: int) -> Tensor:
    """Outputs ``start`` up to ``stop`` of a linear module, without computing the others.

    - linear: an ``nn.Linear``, or a module with ``rows``; values: ``(..., in)``
    - returns: ``(..., stop - start)``, as ``linear(values)[..., start:stop]`` has them
    """
    if isinstance(linear, HasRows):
        return linear.rows(values, start, stop)
    plain = cast(nn.Linear, linear)
    bias = plain.bias[start:stop] if plain.bias is not None else None
    return F.linear(values, plain.weight[start:stop], bias)
