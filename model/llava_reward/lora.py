"""A stored LoRA adapter: which modules it changes, and the two narrow matrices of each.

Letters: r: rank; a module has the weight ``(out, in)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import ConfigError
from model.llava_reward.backbones.interface import Backbone, WeightNames
from model.llava_reward.config import LoraConfig

_KEY = re.compile(r"(?:base_model\.model\.|module\.)*(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """The update ``scale * b @ a`` of one weight, as stored. ``a``: ``(r, in)``; ``b``: ``(out, r)``."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update, and so of the weight."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, device: torch.device) -> Tensor:
        """The update itself, ``(out, in)`` in float32."""
        return self.scale * (self.b.to(device, torch.float32) @ self.a.to(device, torch.float32))


def lora_pairs(
    path: Path, stored: Mapping[str, Tensor], lora: LoraConfig, backbone: Backbone[Any, Any]
) -> dict[str, LoraPair]:
    """The pairs of an adapter, by module under its name here.

    - stored: the tensors of the file at ``path``
    - raises: ``ConfigError`` naming ``path`` and each tensor that is missing, left over or of another rank
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        module = backbone.names.rename(match[1]) if match else ""
        if match is None or not _is_layer_part(module, backbone.names) or match[2] in pairs.get(module, {}):
            unknown.append(key)
        else:
            pairs.setdefault(module, {})[match[2]] = tensor
    missing = sorted(
        f"{module}.lora_{side}.weight"
        for module in set(lora_modules(lora.targets, backbone)) | set(pairs)
        for side in "AB"
        if side not in pairs.get(module, {})
    )
    misshaped = [m for m, p in sorted(pairs.items()) if "A" in p and "B" in p and not _fits(p, lora.rank)]
    if unknown or missing or misshaped:
        raise ConfigError(f"{path}: missing {missing}; surplus {sorted(unknown)}; not of rank {lora.rank} {misshaped}")
    return {module: LoraPair(pair["A"], pair["B"], lora.scale) for module, pair in pairs.items()}


def lora_modules(targets: Iterable[str], backbone: Backbone[Any, Any]) -> list[str]:
    """The modules that an adapter must change. Targets are last names or, as qwen and llava have them, whole paths."""
    wanted = {backbone.names.rename(target) for target in targets}
    return [module for module in layer_projections(backbone) if module in wanted or module.rpartition(".")[2] in wanted]


def layer_projections(backbone: Backbone[Any, Any]) -> list[str]:
    """The modules that LoRA can change: all projections of all layers, under their names here."""
    names = backbone.names
    return [
        f"{names.layers}{layer}.{part}.{projection}"
        for layer in range(backbone.num_layers)
        for part, projections in names.projections.items()
        for projection in projections
    ]


def _fits(pair: Mapping[str, Tensor], rank: int) -> bool:
    a, b = pair["A"], pair["B"]
    return a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank


def _is_layer_part(module: str, names: WeightNames) -> bool:
    return re.fullmatch(re.escape(names.layers) + r"\d+\.(?:self_attn|mlp)\.\w+", module) is not None
