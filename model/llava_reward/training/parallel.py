"""Several workers as one: DDP or FSDP around the network, sums over workers, whole tensors out of parts.

Everything here is a plain call with one worker. Uses the process group that is there; starts none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.errors import ConfigError
from model.llava_reward.training.trainable import TEMPERATURE, TrainableReward

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")


class Workers:
    """Who trains together. ``rank`` counts from 0 to ``world - 1``."""

    def __init__(self, strategy: Strategy = "ddp") -> None:
        self.strategy = strategy
        is_many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_many else 0
        self.world = dist.get_world_size() if is_many else 1

    def wrap(self, reward: TrainableReward) -> nn.Module:
        """The network whose backward pass averages gradients over the workers.

        - raises: ``ConfigError`` for FSDP with a learnable temperature, whose one number cannot be cut in parts
        """
        if self.strategy == "fsdp":
            return self._cut(reward)
        return DistributedDataParallel(reward) if self.world > 1 else reward

    def _cut(self, reward: TrainableReward) -> nn.Module:
        if any(group == TEMPERATURE for group, _, _ in reward.trained()):
            raise ConfigError("strategy=fsdp cannot train a learnable temperature; use strategy=ddp or a fixed tau")
        if not dist.is_initialized():
            raise ConfigError("strategy=fsdp needs workers of a process group; use strategy=ddp for one")
        layers = reward.branch.get_submodule(reward.backbone.names.layers.removesuffix("."))
        mesh = dist.device_mesh.init_device_mesh(reward.branch.value_head.weight.device.type, (self.world,))
        for layer in layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(reward, mesh=mesh)
        return reward

    def accumulating(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: DDP averages only the last one of a step."""
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            return cast(AbstractContextManager[None], wrapped.no_sync())
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all workers, the same in each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, own: Sequence[T]) -> list[T]:
        """The items of all workers, in order of rank."""
        if self.world == 1:
            return list(own)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, list(own))
        return [item for part in parts for item in part]


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each worker may hold a part, on the CPU. All workers must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)


def put(target: Tensor, value: Tensor) -> None:
    """The other way: copy a whole tensor into one of which each worker may hold a part."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(value)
