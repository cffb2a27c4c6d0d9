"""Writes a tiny checkpoint in the published layout: ``python -m model.llava_reward.tiny OUT``.

Random weights, deterministic by seed: it shows that every file, tensor and step works, and knows nothing about
images. Scaled so that rewards differ between inputs, which untrained networks of default scale hardly do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from model.errors import InfrastructureError
from model.golden import GOLDEN_FILE
from model.llava_reward.backbones.phi3v import Phi3VBackbone, read_backbone
from model.llava_reward.bundle import read_bundle
from model.llava_reward.config import HeadConfig, write_json
from model.llava_reward.network import RewardBranch
from model.llava_reward.small_phi3v import NetworkSizes, write_configs
from model.llava_reward.tiny_tokenizer import build_tokenizer
from model.modes import EXACT, FEW_CROPS
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import load

_SEED = 20
_NAME = "demo"
_LORA_RANK = 8
_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_STORED = torch.bfloat16  # as published; halves the repository's share

# 112-pixel crops, at most four: 93 image tokens for a square picture instead of 2509.
_SIZES = NetworkSizes(
    crop=112,
    patch=14,
    num_crops=4,
    tower_width=64,
    tower_mlp=128,
    tower_layers=2,
    tower_heads=4,
    hidden=128,
    mlp=256,
    layers=4,
    heads=4,
)
_SCORER = {
    "system": "llava_reward",
    "family": "phi3v",
    "name": _NAME,
    "licence": "Apache-2.0",
    "is_trained": False,
    "backbone": "backbone",
    "adapters": {p.value: p.value for p in Perspective},
    "num_crops": _SIZES.num_crops,
    "notes": "Random weights for demonstrations and tests: its rewards mean nothing.",
}
_REWARD_CONFIG = """\
add_cross_attention: true
general_preference_tau: 0.1
is_general_preference: false
value_head_dim: 1
"""
# Looked up or joined rather than multiplied, so their scale is that of an activation.
_UNIT = ("embed_tokens.weight", "position_embedding.weight", "class_embedding", "glb_GN", "sub_GN")
_GOLDEN_PROMPTS = ("a red circle above a blue square", "", "two green birds, watercolor 🎨")
_GOLDEN_SIZES = ((96, 96), (128, 60), (48, 112))


def write_checkpoint(out: Path, seed: int = _SEED) -> None:
    """Write the whole bundle into ``out``, which is created; equal seeds give equal weights and golden rewards."""
    generator = torch.Generator().manual_seed(seed)
    backbone = out / "backbone"
    write_configs(backbone, _SIZES, build_tokenizer(seed), is_tied=False)
    write_json(out / "scorer.json", _SCORER)
    built = read_backbone(backbone)
    _write_backbone(backbone, built, generator)
    for perspective in Perspective:
        write_adapter(out / perspective, built, generator)
    write_golden(out, seed)


def write_golden(out: Path, seed: int = _SEED, *, device: str = "cpu", is_scaled: bool = False) -> None:
    """Score three small pictures with the bundle in ``out`` and keep the rewards beside them.

    - is_scaled: a bfloat16 tolerance that grows with the largest reward, for heads whose scale nobody chose
    - raises: ``InfrastructureError`` if a picture has no reward
    """
    (out / GOLDEN_FILE).unlink(missing_ok=True)
    (out / "golden").mkdir(exist_ok=True)
    generations = []
    for i, (prompt, size) in enumerate(zip(_GOLDEN_PROMPTS, _GOLDEN_SIZES, strict=True)):
        name = f"golden/{i}.png"
        _picture(np.random.default_rng(seed + i), *size).save(out / name, optimize=True)
        generations.append(Generation(name, prompt, (out / name).read_bytes()))
    # The mode is for phi3v alone, and a checkpoint of one crop has none to leave out.
    bundle = read_bundle(out)
    modes = (EXACT, FEW_CROPS) if bundle.family == "phi3v" and bundle.num_crops > 1 else (EXACT,)
    exact, *coarse = (_values(out, generations, mode, device) for mode in modes)
    cases = [
        {"image": g.generation_id, "prompt": g.prompt, "values": own} for g, own in zip(generations, exact, strict=True)
    ]
    for values in coarse:
        cases = [case | {FEW_CROPS: own} for case, own in zip(cases, values, strict=True)]
    largest = max(1.0, *(abs(value) for case in exact for row in case.values() for value in row))
    tolerance = {"float32": 1e-3, "bfloat16": round(5e-2 * (largest if is_scaled else 1.0), 3)}
    write_json(out / GOLDEN_FILE, {"tolerance": tolerance, "cases": cases})


def _values(
    out: Path, generations: Sequence[Generation], mode: str, device: str
) -> list[dict[Perspective, list[float]]]:
    """Rewards in a mode, per generation and perspective; those of general preference have several values."""
    found = []
    for generation, record in zip(generations, load(out, device=device, mode=mode).score(generations), strict=True):
        if record.error is not None:
            raise InfrastructureError(f"{out}: {generation.generation_id} has no reward: {record.error.message}")
        values = {p: (r,) for p, r in record.rewards.items()} | dict(record.reward_vectors)
        found.append({p: [round(value, 6) for value in row] for p, row in values.items()})
    return found


def _write_backbone(folder: Path, built: Phi3VBackbone, generator: torch.Generator) -> None:
    with torch.device("meta"):
        vision, branch = built.build_vision(), RewardBranch(built, HeadConfig(False, False, 1, 0.1))
    shapes = {f"model.vision_embed_tokens.{name}": t.shape for name, t in vision.state_dict().items()}
    shapes |= {name: t.shape for name, t in branch.state_dict().items() if name != "value_head.weight"}
    tensors = {name: _draw(name, shape, generator) for name, shape in sorted(shapes.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, built: Phi3VBackbone, generator: torch.Generator) -> None:
    """A random adapter for a backbone, as published: SkipCA, a Bradley-Terry head, projector and LoRA."""
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
    elif not name.endswith(_UNIT):
        values = values / math.sqrt(math.prod(shape[1:]))
    return values.to(_STORED)


def _picture(draw: np.random.Generator, width: int, height: int) -> Image.Image:
    """A plain background with coloured rectangles."""
    pixels = np.full((height, width, 3), draw.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(4):
        x, y = draw.integers(0, width), draw.integers(0, height)
        pixels[y : y + height // 2, x : x + width // 2] = draw.integers(0, 256, 3)
    return Image.fromarray(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the new checkpoint")
    parser.add_argument("--seed", type=int, default=_SEED)
    args = parser.parse_args()
    write_checkpoint(args.out, args.seed)


if __name__ == "__main__":
    main()
