"""LoRA kept beside the weights that it changes, so that several perspectives run through one language model.

A batch then holds one group of equal size per perspective, one behind the other. Each projection multiplies all of
it with its one weight, and each group with the two narrow matrices of its own perspective.

Letters: p: groups, one per perspective of a call; q: adapters held; b: samples of a group; r: rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.lora import LoraPair
from model.perspectives import Perspective


class Selection:
    """Whose groups the batch consists of, told once a call to all projections of one network.

    Nothing is chosen outside of ``of``, and then no projection runs: a forgotten choice must not score with the
    adapters of the call before. One thread at a time.
    """

    def __init__(self, perspectives: Sequence[Perspective]) -> None:
        self.perspectives = tuple(perspectives)
        self._chosen: tuple[int, ...] | None = None

    @contextmanager
    def of(self, perspectives: Sequence[Perspective]) -> Iterator[None]:
        """Inside, the batch holds one group for each of ``perspectives``, in this order."""
        if self._chosen is not None:
            raise RuntimeError("another call is running through this network; one thread at a time may")
        self._chosen = tuple(map(self.perspectives.index, perspectives))
        try:
            yield
        finally:
            self._chosen = None

    def pick(self, held: Tensor) -> Tensor:
        """What the groups need of ``(q, ...)``: ``(p, ...)``, without a copy where that is everything in order."""
        if self._chosen is None:
            raise RuntimeError("no perspectives are chosen for this batch; call inside Selection.of")
        if self._chosen == tuple(range(len(held))):
            return held
        # Stacked rather than indexed: a list of indices would be sent to the device for each projection.
        return torch.stack([held[i] for i in self._chosen])


class LowRankLinear(nn.Module):
    """``x W^T + bias + (x A_i^T) B_i^T`` for group i of the batch, LoRA's scale in B.

    - base: the one weight of all groups
    - a: ``(q, r, in)``; b: ``(q, out, r)``; smaller ranks and adapters without this module are padded with zeros
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._selection = selection

    def forward(self, values: Tensor) -> Tensor:
        """``(p*b, ..., in)``, a group behind the other, to ``(p*b, ..., out)``."""
        return self._add(self.base(values), values, self.b)

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Outputs ``start`` up to ``stop`` alone: ``(p*b, ..., in)`` to ``(p*b, ..., stop - start)``."""
        return self._add(output_rows(self.base, values, start, stop), values, self.b[:, start:stop])

    def _add(self, plain: Tensor, values: Tensor, b: Tensor) -> Tensor:
        a, b = self._selection.pick(self.a), self._selection.pick(b)
        groups = len(a)
        if len(values) % groups:
            raise ValueError(f"a batch of {len(values)} rows does not hold {groups} groups of equal size")
        narrow = torch.bmm(values.reshape(groups, -1, values.shape[-1]), a.mT)  # (p, b*..., r)
        # In place: no second tensor of the width of the output.
        plain.view(groups, -1, plain.shape[-1]).baddbmm_(narrow, b.mT)
        return plain


def put_beside(model: nn.Module, adapters: Mapping[Perspective, Mapping[str, LoraPair]]) -> Selection:
    """Replace each ``nn.Linear`` of ``model`` that an adapter changes by a ``LowRankLinear``, in the weight's dtype.

    - adapters: pairs by the module's path in ``model``, per perspective; shapes already checked
    - returns: the selection that all of them obey
    """
    selection = Selection(tuple(adapters))
    for path in sorted({path for pairs in adapters.values() for path in pairs}):
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear), f"{path} is {type(base).__name__}"
        a, b = _padded([pairs.get(path) for pairs in adapters.values()], base.weight)
        model.set_submodule(path, LowRankLinear(base, a, b, selection))
    return selection


def _padded(pairs: Sequence[LoraPair | None], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of any rank as ``(q, r, in)`` and ``(q, out, r)`` of the largest; zeros where an adapter has none."""
    rank = max(len(pair.a) for pair in pairs if pair is not None)
    a = weight.new_zeros(len(pairs), rank, weight.shape[1])
    b = weight.new_zeros(len(pairs), weight.shape[0], rank)
    for i, pair in enumerate(pairs):
        if pair is not None:
            a[i, : len(pair.a)] = pair.a.to(weight.device)
            b[i, :, : len(pair.a)] = pair.scale * pair.b.to(weight.device, torch.float32)
    return a, b
