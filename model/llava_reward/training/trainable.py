"""One perspective as it is trained: which tensors move, how they start, and the forward with gradients.

Every group below is stepped. (The released trainer gives its optimiser LoRA alone; projector, SkipCA and head keep
their first values there.) The image tower, the separators of its features, embeddings and base weights are frozen.

Letters: b: samples, h: hidden size, v: values per reward.
Source: LLaVA-Reward, released trainer, for initialisation and targets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.errors import ConfigError
from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.network import RewardBranch
from model.llava_reward.training.lora import LoraLinear, LoraSpec, attach

LORA, PROJECTOR, SKIP_CA, HEAD, TEMPERATURE = "lora", "projector", "skip_ca", "head", "temperature"
GROUPS = (LORA, PROJECTOR, SKIP_CA, HEAD, TEMPERATURE)


class TrainableReward(nn.Module):
    """A branch with trainable groups in float32, everything else frozen in ``dtype``, and the loss's own parameters.

    - dtype: of the frozen weights and of the arithmetic; bfloat16 runs under autocast, the value head never does
    """

    def __init__(self, backbone: Backbone[Any, Any], branch: RewardBranch, loss: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone, self.branch, self.loss, self.dtype = backbone, branch, loss, dtype

    def forward(self, shared: Any) -> Tensor:
        """Rewards ``(b, v)``, float32, of a batch after the tower."""
        branch, device = self.branch, self.branch.value_head.weight.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not torch.float32):
            tokens = self.backbone.project(branch.model, shared)
            state = branch.head_input(self.backbone.end_state(branch.model, shared, tokens))
        with torch.autocast(device.type, enabled=False):
            return F.linear(state.float(), branch.value_head.weight)

    def set_dropout(self, is_active: bool) -> None:
        """Only LoRA has dropout; frozen modules stay as they are in inference."""
        self.eval()
        for module in self.modules():
            if isinstance(module, LoraLinear):
                module.train(is_active)

    def trained(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(group, name, parameter) of everything that is stepped, in order of name.

        Names are those of the branch, in the names of this project; a temperature's is ``loss.tau.theta``.
        """
        for name, parameter in sorted(self.named_parameters()):
            short = name.removeprefix("branch.")
            group = group_of(short, self.backbone.names.projector)
            if group is not None:
                yield group, short, parameter


def group_of(name: str, projector: str) -> str | None:
    """The group of a tensor of a branch; None for a frozen one."""
    if name.endswith((".lora_A", ".lora_B")):
        return LORA
    if name.startswith(projector):
        return PROJECTOR
    if name.startswith(("W_q.", "W_k.", "W_v.", "ca_layernorm.")):
        return SKIP_CA
    if name.startswith("value_head."):
        return HEAD
    return TEMPERATURE if name.startswith("loss.") else None


def make_trainable(
    backbone: Backbone[Any, Any],
    branch: RewardBranch,
    loss: nn.Module,
    *,
    lora: LoraSpec,
    dtype: torch.dtype,
    seed: int,
    has_checkpointing: bool,
) -> TrainableReward:
    """A branch fresh from ``load_untrained``, initialised and ready for a step.

    Draws depend on ``seed`` and names alone, not on device, dtype or the number of workers.

    - has_checkpointing: compute each layer again in the backward pass instead of keeping its activations
    - raises: ``ConfigError`` where SkipCA would never see the image, and so never train
    """
    if branch.head.has_skip_ca and not branch.has_image_keys:
        raise ConfigError(
            'SkipCA finds no image token in the released form; train with qwen_skipca_keys="image_tokens"'
        )
    generator = torch.Generator().manual_seed(seed)
    attach(branch, backbone, lora, generator)
    device = branch.value_head.weight.device
    reward = TrainableReward(backbone, branch, loss.to(device), dtype).requires_grad_(False)
    for group, name, parameter in reward.trained():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        _initialise(group, name, parameter, backbone.hidden_size, generator)
    if has_checkpointing:
        _recompute_layers(reward)
    reward.set_dropout(True)
    return reward


def _initialise(group: str, name: str, parameter: nn.Parameter, hidden: int, generator: torch.Generator) -> None:
    """Head and SkipCA start as gaussians of deviation 1/(h+1), the norm as ones; the projector as the backbone's."""
    if group == SKIP_CA and parameter.dim() == 1:
        parameter.data.fill_(1.0)
    elif group in (SKIP_CA, HEAD):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / (hidden + 1))


def _recompute_layers(reward: TrainableReward) -> None:
    layers = reward.branch.get_submodule(reward.backbone.names.layers.removesuffix("."))
    for layer in layers.children():
        # On the instance: calls of the layer go through it, hooks of the layer stay outside.
        again = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        cast(Any, layer).forward = again
