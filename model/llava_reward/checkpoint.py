"""Weights on disk to a ready network, in the authors' published layout. Nothing is unpickled.

Every tensor is accounted for: what is missing, left over or of another shape is listed in one ``ConfigError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.adapter_file import inside, member_of
from model.llava_reward.backbones.phi3v import VisionEncoder
from model.llava_reward.bundle import adapter_weights, backbone_weights
from model.llava_reward.config import (
    ClipConfig,
    LoraConfig,
    Phi3VConfig,
    read_clip_config,
    read_head_config,
    read_lora_config,
    read_phi3v_config,
)
from model.llava_reward.network import RewardBranch, RewardNetwork
from model.perspectives import Perspective

_EMBED = "model.embed_tokens.weight"
_EMBED_ALIAS = "model.vision_embed_tokens.wte.weight"
_VISION = "model.vision_embed_tokens."
_PROJECTOR = "model.vision_embed_tokens.img_projection."
# Published, and never read for a reward.
_UNUSED = re.compile(r"lm_head\.weight|.*vision_model\.post_layernorm\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq")
# The released code finds the head's tensors by these endings, whatever stands before them.
_HEAD_NAMES = ("value_head.weight", "W_q.weight", "W_k.weight", "W_v.weight", "ca_layernorm.weight")
_PROJECTOR_ENDINGS = tuple(f"img_projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
_LORA_KEY = re.compile(r"(?:.*?\.)?(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_([AB])(?:\.default)?\.weight")

Tensors = dict[str, Tensor]


def load_network(
    backbone: Path, adapters: Mapping[Perspective, Path], *, device: torch.device, dtype: torch.dtype
) -> RewardNetwork:
    """Build the network of a backbone and its adapters, in evaluation mode and without gradients.

    LoRA is merged in float32 and rounded to ``dtype`` once. Tensors that no adapter changes exist once, however
    many perspectives there are.

    - raises: ``ConfigError`` naming the file and every tensor that is missing, left over or misshaped
    """
    config = read_phi3v_config(backbone / "config.json")
    clip = read_clip_config(backbone / "clip_tower.json")
    base = _load_backbone(backbone, clip)
    with torch.device("meta"):
        vision = VisionEncoder(clip)
    vision_tensors = {name: base.pop(_VISION + name) for name in vision.state_dict() if _VISION + name in base}
    _fill(vision, vision_tensors, f"{backbone} (image tower)", device, dtype)
    merged_names = {name for name in base if name.endswith("_proj.weight")}
    shared = {n: t if n in merged_names else t.to(device, dtype) for n, t in base.items()}
    branches = {p: _load_branch(config, clip, shared, path, device, dtype) for p, path in adapters.items()}
    network = RewardNetwork(config, vision, branches)
    return network.eval().requires_grad_(False)


def _load_backbone(backbone: Path, clip: ClipConfig) -> Tensors:
    """All tensors that a reward needs, as stored."""
    tensors: Tensors = {}
    for path in backbone_weights(backbone):
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}") from error
    alias = tensors.pop(_EMBED_ALIAS, None)
    if alias is not None:
        tensors.setdefault(_EMBED, alias)
    last = re.compile(rf".*vision_model\.encoder\.layers\.{clip.feature_layers}\..*")
    return {n: t for n, t in tensors.items() if not _UNUSED.fullmatch(n) and not last.fullmatch(n)}


def _load_branch(
    config: Phi3VConfig, clip: ClipConfig, base: Tensors, adapter: Path, device: torch.device, dtype: torch.dtype
) -> RewardBranch:
    head_path, lora_path = adapter_weights(adapter)
    with torch.device("meta"):
        branch = RewardBranch(config, clip, read_head_config(adapter / "reward_config.yaml"))
    lora = read_lora_config(adapter / "lora" / "adapter_config.json")
    tensors = {**base, **_head_tensors(head_path)}  # the stored projector wins over the backbone's
    for name, delta in _lora_deltas(lora_path, lora, config, device).items():
        if name not in base or base[name].shape != delta.shape:
            found = list(base[name].shape) if name in base else "nothing"
            raise ConfigError(f"{lora_path}: {name} needs {list(delta.shape)}, the backbone has {found}")
        tensors[name] = base[name].to(device, torch.float32) + delta
    _fill(branch, tensors, str(adapter), device, dtype)
    return branch


def _fill(module: nn.Module, tensors: Tensors, source: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put tensors into a module without storage, after checking names and shapes."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    missing = sorted(set(expected) - set(tensors))
    surplus = sorted(set(tensors) - set(expected))
    misshaped = [
        f"{name} {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or surplus or misshaped:
        raise ConfigError(f"{source}: missing tensors {missing}; surplus {surplus}; misshaped {misshaped}")
    module.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, assign=True)


def read_tensors(path: Path) -> Tensors:
    """A weight file, or the part of an adapter file that stands for it. Raises ``ConfigError`` if it is neither."""
    try:
        if place := inside(path):
            with safe_open(place[0], framework="pt") as stored:
                names = [name for name in list(stored.keys()) if member_of(name) == place[1]]
                return {name: stored.get_tensor(name) for name in names}
        if path.suffix == ".safetensors":
            tensors: object = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError) as error:
        raise ConfigError(f"{path} holds no plain tensors: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"{path} is not a flat dict of tensors")
    return tensors


def _head_tensors(path: Path) -> Tensors:
    """``pytorch_model.bin`` under the network's names; any prefix before the known endings is dropped."""
    found: Tensors = {}
    unknown = []
    for key, tensor in read_tensors(path).items():
        name = next((n for n in _HEAD_NAMES if key == n or key.endswith(f".{n}")), None)
        if name is None and key.endswith(_PROJECTOR_ENDINGS):
            name = _PROJECTOR + key.rsplit("img_projection.", 1)[1]
        if name is None or name in found:
            unknown.append(key)
        else:
            found[name] = tensor
    if unknown:
        raise ConfigError(f"{path}: surplus or repeated tensors {sorted(unknown)}")
    return found


def _lora_deltas(path: Path, lora: LoraConfig, config: Phi3VConfig, device: torch.device) -> Tensors:
    """``scale * B @ A`` in float32 per weight name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in read_tensors(path).items():
        match = _LORA_KEY.fullmatch(key)
        if match is None or match[2] in pairs.get(match[1], {}):
            unknown.append(key)
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    missing = sorted(
        f"{module}.lora_{side}.weight"
        for module in set(_lora_modules(lora.targets, config.num_hidden_layers)) | set(pairs)
        for side in "AB"
        if side not in pairs.get(module, {})
    )
    misshaped = [m for m, p in sorted(pairs.items()) if "A" in p and "B" in p and not _fits(p, lora.rank)]
    if unknown or missing or misshaped:
        raise ConfigError(f"{path}: missing {missing}; surplus {sorted(unknown)}; not of rank {lora.rank} {misshaped}")
    return {
        f"{module}.weight": lora.scale * (pair["B"].to(device, torch.float32) @ pair["A"].to(device, torch.float32))
        for module, pair in pairs.items()
    }


def _fits(pair: Mapping[str, Tensor], rank: int) -> bool:
    a, b = pair["A"], pair["B"]
    return a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank


def _lora_modules(targets: Iterable[str], layers: int) -> list[str]:
    part = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
    return [f"model.layers.{i}.{part[t]}.{t}" for i in range(layers) for t in targets if t in part]
