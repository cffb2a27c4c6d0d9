"""A random adapter for a phi3v backbone of any sizes, in the published layout."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from model.llava_reward.backbones.phi3v import Phi3VBackbone
from model.llava_reward.config import HeadConfig, write_json
from model.llava_reward.network import RewardBranch

_LORA_RANK = 8
_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_REWARD_CONFIG = """\
add_cross_attention: true
general_preference_tau: 0.1
is_general_preference: false
value_head_dim: 1
"""


def write_adapter(folder: Path, built: Phi3VBackbone, generator: torch.Generator) -> None:
    """SkipCA, a Bradley-Terry head, projector and LoRA."""
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    (folder / "reward_config.yaml").write_text(_REWARD_CONFIG, encoding="utf-8")
    lora_config = {"peft_type": "LORA", "r": _LORA_RANK, "lora_alpha": 2 * _LORA_RANK, "target_modules": [*_TARGETS]}
    write_json(folder / "lora" / "adapter_config.json", lora_config)
    with torch.device("meta"):
        branch = RewardBranch(built, HeadConfig(True, False, 1, 0.1))
    shapes = {name: t.shape for name, t in branch.state_dict().items()}
    head, lora = {}, {}
    for name, shape in sorted(shapes.items()):
        module = name.removesuffix(".weight")
        if name.startswith(("value_head", "W_", "ca_layernorm")) or "img_projection" in name:
            head[name] = _draw(name, shape, generator)
        elif module.endswith(_TARGETS):
            lora[f"{module}.lora_A.weight"] = _draw(name, torch.Size((_LORA_RANK, shape[1])), generator)
            # Updates of about half the size of the weights: enough that no perspective resembles another.
            lora[f"{module}.lora_B.weight"] = 0.25 * _draw(name, torch.Size((shape[0], _LORA_RANK)), generator)
    torch.save(head, folder / "pytorch_model.bin")
    torch.save(lora, folder / "lora" / "adapter_model.bin")


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gaussian of a scale that keeps activations near one; norms near their neutral value."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith(".bias"):
        values = 0.05 * values
    elif len(shape) == 1 and "class_embedding" not in name:
        values = 1 + 0.1 * values
    else:
        values = values / math.sqrt(math.prod(shape[1:]))
    return values.to(torch.bfloat16)
