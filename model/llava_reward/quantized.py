"""Projections of the language model in eight bits: weights rounded once, activations at each call, row by row.

A row is one output of a weight, or one token. Each has a scale of its own, so that a token's result depends on no
other token. Left as they are: embeddings, norms, attention itself, image tower, projector, SkipCA and value head.

Two operators of torch do the work. torchao 0.18 offers the same, but each of its releases is made for few releases
of torch, it was no faster on a CPU without compilation, and its layers do not give a part of the rows.

Letters: r: rows (tokens), i: input width, o: output width.
Source: per-token and per-channel scales as in LLM.int8 (arXiv 2208.07339) and FP8 formats (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.network import RewardNetwork
from model.modes import FP8, INT8

_FORMATS = {INT8: torch.int8, FP8: torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Widths that the kernels take; other layers stay as they are.
_WIDTH_UNIT = {torch.int8: 8, torch.float8_e4m3fn: 16}
_LEAST_CUDA_ROWS = 32  # of the int8 product: cuBLAS refuses 16 and less
_FP8_CAPABILITY = (8, 9)


class EightBitLinear(nn.Module):
    """A linear layer with weight and input in eight bits, and sums in int32 or float32."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, eight_bits: torch.dtype) -> None:
        super().__init__()
        self.in_features = linear.in_features
        weight, scales = round_rows(linear.weight.detach(), eight_bits)
        self.register_buffer("weight", weight)  # (o, i)
        self.register_buffer("scales", scales)  # (o, 1) float32
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        """``(..., i)`` to ``(..., o)``, in the dtype of ``values``."""
        return self.rows(values, 0, len(self.weight))

    def rows(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Some of the outputs only: ``self(values)[..., start:stop]``."""
        rows = slice(start, stop)
        rounded, scales = round_rows(values.flatten(0, -2), self.weight.dtype)
        product = _int8_product if self.weight.dtype is torch.int8 else _fp8_product
        out = product(rounded, scales, self.weight[rows], self.scales[rows]).to(values.dtype)
        if self.bias is not None:
            out = out + self.bias[rows]
        return out.reshape(*values.shape[:-1], -1)


def round_rows(values: Tensor, eight_bits: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row divided by its scale, which puts its largest magnitude at the end of the format's range.

    A row with NaN or infinity gets a scale that is not finite, so that it is not lost.

    - values: ``(r, i)``, float
    - returns: ``(r, i)`` in eight bits, and scales ``(r, 1)`` float32
    """
    largest = values.abs().amax(-1, keepdim=True).float()
    scales = largest.clamp_min(1e-12) / _LARGEST[eight_bits]
    scaled = values / scales  # float32
    return (scaled.round_() if eight_bits is torch.int8 else scaled).to(eight_bits), scales


def _int8_product(rounded: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """Exact up to the scales: sums are int32. ``(r, o)`` float32."""
    rows = len(rounded)
    if rounded.is_cuda and rows < _LEAST_CUDA_ROWS:
        rounded = torch.cat((rounded, rounded.new_zeros(_LEAST_CUDA_ROWS - rows, rounded.shape[1])))
    sums: Tensor = torch._int_mm(rounded, weight.t())[:rows]
    return (sums * scales).mul_(weight_scales.t())


def _fp8_product(rounded: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """``(r, o)`` bfloat16, the only result of row-wise scales that all versions of torch here have."""
    product: Tensor = torch._scaled_mm(
        rounded, weight.t(), scale_a=scales, scale_b=weight_scales.t(), out_dtype=torch.bfloat16
    )
    return product


def check_device(mode: str, device: torch.device) -> None:
    """Raises ``ConfigError`` where ``mode`` cannot run on ``device``."""
    if mode != FP8:
        return
    need = "mode='fp8' needs an NVIDIA GPU of capability 8.9 or more"
    if device.type != "cuda":
        raise ConfigError(f"{need}, not device={str(device)!r}; use mode=int8")
    found = torch.cuda.get_device_capability(device)
    if found < _FP8_CAPABILITY:
        raise ConfigError(f"{need}, {device} has {found[0]}.{found[1]}; use mode=int8")


def quantize(network: RewardNetwork, mode: str) -> None:
    """Replace the linear layers within the language models' layers, in place.

    - mode: ``int8`` or ``fp8``; layers whose widths the kernels do not take stay as they are
    """
    eight_bits = _FORMATS[mode]
    path = network.backbone.names.layers.removesuffix(".")
    made: dict[tuple[int, ...], EightBitLinear] = {}  # what several perspectives share stays shared
    for branch in network.branches.values():
        layers = branch.get_submodule(path)
        for name, linear in list(layers.named_modules()):
            if type(linear) is not nn.Linear or any(n % _WIDTH_UNIT[eight_bits] for n in linear.weight.shape):
                continue
            key = tuple(0 if t is None else t.data_ptr() for t in (linear.weight, linear.bias))
            if key not in made:
                made[key] = EightBitLinear(linear, eight_bits)
            layers.set_submodule(name, made[key])
