"""Random phi3v networks without files, and the straightforward way to run one, step by step up to ours.

Knows nothing of timing. Letters: b: samples, l: length, h: hidden size, n: image tokens, r: rank of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.backbones.interface import EndState
from model.llava_reward.backbones.layers import Layer, embed, every_token
from model.llava_reward.backbones.phi3v import Phi3VBackbone, Phi3VModel, Phi3VSample, Phi3VShared
from model.llava_reward.backbones.phi3v_vision import merge_patches
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.prefix import runs_of
from model.llava_reward.backbones.rope import rope_tables
from model.llava_reward.config import ClipConfig, HeadConfig, Phi3VConfig, RopeConfig
from model.llava_reward.network import RewardBranch, RewardNetwork
from model.llava_reward.processor import IMAGE_TOKEN, hd_layout, num_image_tokens
from model.perspectives import Perspective

SLOTS = 17  # the global view and 16 crops, which the released code always fills
TEXT_TOKENS = 45
LORA_SCALE = 2.0
_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_UNIT = ("embed_tokens.weight", "position_embedding.weight", "class_embedding", "glb_GN", "sub_GN")

# In the order of the ladder: each step is added to those before it, and all of them together are the network's way.
# LoRA comes before the last layer, whose short form reads merged weights.
STEPS = ("skip zero crops", "merged LoRA", "EOS-only last layer", "folded SkipCA", "shared tower")


@dataclass(frozen=True)
class Scale:
    """Sizes of a random network; crops and token counts are the real ones in each."""

    config: Phi3VConfig
    clip: ClipConfig
    lora_rank: int
    dtype: torch.dtype


def _lm(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> Phi3VConfig:
    # No factor lists: the same arithmetic with ones in their place.
    rope = RopeConfig(10000.0, hidden // heads, 4096, (), (), 1.0)
    return Phi3VConfig(vocabulary, hidden, intermediate, layers, heads, heads, 1e-5, 131072, rope)


SCALES = {
    "full": Scale(_lm(3072, 8192, 32, 32, 32064), ClipConfig(1024, 4096, 24, 16, 336, 14, 1e-5), 128, torch.bfloat16),
    # All 32 layers, so that the last one keeps its share; the tower is short instead, wide enough for its kernels.
    "cpu": Scale(_lm(128, 344, 32, 2, 512), ClipConfig(128, 384, 5, 2, 336, 14, 1e-5), 6, torch.float32),
}


class LoraLinear(nn.Module):
    """A projection with its update beside it, unmerged: ``x W^T + s (x A^T) B^T``."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.weight, self.a, self.b = weight, a, b
        self.in_features = weight.shape[1]

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight) + LORA_SCALE * F.linear(F.linear(values, self.a), self.b)


class Draws:
    """Gaussian weights of a scale that keeps activations near one; norms near their neutral value."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device, self._dtype = device, dtype

    def weight(self, name: str, shape: Sequence[int]) -> Tensor:
        values = torch.randn(tuple(shape), generator=self._generator, device=self._device)
        if len(shape) == 1 and name.endswith(".bias"):
            values = 0.05 * values
        elif len(shape) == 1 and "class_embedding" not in name:
            values = 1 + 0.1 * values
        elif not name.endswith(_UNIT):
            values = values / math.sqrt(math.prod(shape[1:]))
        return values.to(self._dtype)

    def fill(self, module: nn.Module, known: dict[str, Tensor]) -> None:
        """Put ``known`` tensors, and drawn ones elsewhere, into a module without storage."""
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        tensors = {name: known[name] if name in known else self.weight(name, s) for name, s in shapes.items()}
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False).eval()


@dataclass(frozen=True)
class Built:
    """A network with merged LoRA, and per perspective the same language model with LoRA beside its weights."""

    scale: Scale
    network: RewardNetwork
    unmerged: dict[Perspective, Phi3VModel]

    @property
    def backbone(self) -> Phi3VBackbone:
        return cast(Phi3VBackbone, self.network.backbone)


def build(scale: Scale, perspectives: Sequence[Perspective], device: torch.device, seed: int = 0) -> Built:
    """Random weights on ``device``; each perspective has its own projector, LoRA, SkipCA and head."""
    draws = Draws(device, scale.dtype, seed)
    backbone = Phi3VBackbone(scale.config, scale.clip)
    with torch.device("meta"):
        vision, base = backbone.build_vision(), backbone.build_model()
    draws.fill(vision, {})
    draws.fill(base, {})
    branches, unmerged = {}, {}
    for perspective in perspectives:
        branches[perspective], unmerged[perspective] = _perspective(backbone, base, draws, scale)
    return Built(scale, RewardNetwork(backbone, vision, branches).eval(), unmerged)


def _perspective(
    backbone: Phi3VBackbone, base: Phi3VModel, draws: Draws, scale: Scale
) -> tuple[RewardBranch, Phi3VModel]:
    with torch.device("meta"):
        branch, plain = RewardBranch(backbone, HeadConfig(True, False, 1, 0.1)), backbone.build_model()
    known = {name: t for name, t in base.state_dict().items() if "img_projection" not in name}
    draws.fill(plain, known)
    merged = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    for name, module in list(plain.named_modules()):
        if not name.endswith(_TARGETS):
            continue
        weight = cast(Tensor, module.weight).detach()
        a = draws.weight(name, (scale.lora_rank, weight.shape[1]))
        # Updates of a quarter of the weights' size: no perspective resembles another.
        b = 0.125 * draws.weight(name, (weight.shape[0], scale.lora_rank))
        merged[f"model.{name}.weight"] = (weight.float() + LORA_SCALE * (b.float() @ a.float())).to(weight.dtype)
        plain.set_submodule(name, LoraLinear(weight, a, b))
    draws.fill(branch, merged)
    return branch, plain


def make_sample(
    built: Built, width: int, height: int, device: torch.device, seed: int, num_crops: int = SLOTS - 1
) -> Phi3VSample:
    """A noise picture of the size that a ``width x height`` one gets, and 45 tokens of text."""
    clip, vocabulary = built.scale.clip, built.scale.config.vocab_size
    layout = hd_layout(width, height, num_crops=num_crops, crop_size=clip.image_size)
    columns, rows = (side // clip.image_size for side in layout.padded)
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(1 + rows * columns, 3, clip.image_size, clip.image_size, generator=generator)
    text = torch.randint(vocabulary, (TEXT_TOKENS,), generator=generator)
    slots = torch.full((num_image_tokens(*layout.padded, clip),), IMAGE_TOKEN)
    return Phi3VSample(torch.cat((text[:2], slots, text[2:])).to(device), crops.to(device), (rows, columns))


def rewards_by_steps(
    built: Built, sample: Phi3VSample, perspectives: Sequence[Perspective], steps: Collection[str]
) -> dict[Perspective, Tensor]:
    """Rewards of one sample; without any step, the straightforward way: a full forward per perspective.

    - steps: of ``STEPS``; the released work is done where a step is absent
    """
    shared = _towered(built, sample, steps) if "shared tower" in steps else None
    rewards = {}
    for perspective in perspectives:
        towered = shared or _towered(built, sample, steps)
        branch = built.network.branch(perspective)
        model = cast(Phi3VModel, branch.model) if "merged LoRA" in steps else built.unmerged[perspective]
        rewards[perspective] = _reward(built, branch, model, towered, steps)
    return rewards


def _towered(built: Built, sample: Phi3VSample, steps: Collection[str]) -> Phi3VShared:
    """What ``Phi3VBackbone.share`` gives; where zero crops are not skipped, the tower sees every slot."""
    encoder, real = built.network.vision, len(sample.crops)
    empty = 0 if "skip zero crops" in steps else SLOTS - real
    features = encoder.img_processor.vision_model(F.pad(sample.crops, (0, 0, 0, 0, 0, 0, 0, empty)))[:real]
    merged = encoder.assemble(merge_patches(features), sample.grid)
    pictures = Pictures.of([merged])
    (run,) = runs_of([sample.input_ids], pictures)
    rope = rope_tables(run.lengths, run.positions, built.scale.config.rope)
    return Phi3VShared([merged], pictures, [sample.input_ids], [(run, rope)])


def _reward(
    built: Built, branch: RewardBranch, model: Phi3VModel, towered: Phi3VShared, steps: Collection[str]
) -> Tensor:
    tokens = built.backbone.project(model, towered)
    if "EOS-only last layer" in steps:
        hidden = built.backbone.end_state(model, towered, tokens).hidden[:, None]  # (1, 1, h)
    else:
        run, rope = towered.runs[0]
        hidden = embed(model.embed_tokens, run.input_ids, tokens[0])
        for layer in model.layers:
            hidden = every_token(cast(Layer, layer), hidden, rope, run.layout)
        hidden = model.norm(hidden)  # (1, l, h)
    if "folded SkipCA" in steps:
        rewards: Tensor = branch(EndState(hidden[:, -1], tokens))
        return rewards
    keys, values = branch.W_k(tokens[0]), branch.W_v(tokens[0])  # (n, h)
    scores = branch.W_q(hidden) @ keys.T / math.sqrt(keys.shape[-1])  # (1, l, n)
    mixed = scores.float().softmax(-1).to(values.dtype) @ values
    everywhere: Tensor = branch.value_head(branch.ca_layernorm(hidden + mixed))
    return everywhere[:, -1]
