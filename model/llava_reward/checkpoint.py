"""Weights on disk to a ready network, in the authors' published layout. Nothing is unpickled.

Every tensor is accounted for: what is missing, left over or of another shape is listed in one ``ConfigError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.adapter_file import inside, member_of
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.backbones.interface import Backbone, WeightNames
from model.llava_reward.bundle import adapter_weights, backbone_weights
from model.llava_reward.config import HeadConfig, LoraConfig, read_head_config, read_lora_config
from model.llava_reward.model_config import check_head
from model.llava_reward.network import RewardBranch, RewardNetwork
from model.perspectives import Perspective

# The released code finds the head's tensors by these endings, whatever stands before them.
_HEAD_NAMES = ("value_head.weight", "W_q.weight", "W_k.weight", "W_v.weight", "ca_layernorm.weight")
_LORA_KEY = re.compile(r"(?:base_model\.model\.|module\.)*(.+)\.lora_([AB])(?:\.default)?\.weight")

Tensors = dict[str, Tensor]


class _BaseTensors:
    """The backbone's tensors under their names here. What is used as it is exists once on the device."""

    def __init__(self, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        self._stored, self._device, self._dtype = tensors, device, dtype
        self._ready: Tensors = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._ready:
            self._ready[name] = self._stored[name].to(self._device, self._dtype)
        return self._ready[name]

    def merged(self, name: str, delta: Tensor, source: Path) -> Tensor:
        """The stored tensor plus a LoRA update in float32, rounded once."""
        found = list(self._stored[name].shape) if name in self._stored else "nothing"
        if found != list(delta.shape):
            raise ConfigError(f"{source}: {name} needs {list(delta.shape)}, the backbone has {found}")
        return (self._stored[name].to(self._device, torch.float32) + delta).to(self._dtype)

    def names(self) -> set[str]:
        return set(self._stored)


def load_network(
    backbone: Path,
    adapters: Mapping[Perspective, Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    family: str = "phi3v",
    skip_ca_keys: str | None = None,
) -> RewardNetwork:
    """Build the network of a backbone and its adapters, in evaluation mode and without gradients.

    LoRA is merged in float32 and rounded to ``dtype`` once. Tensors that no adapter changes exist once, however
    many perspectives there are; so do projectors that several adapters store bit by bit alike.

    - family, skip_ca_keys: as in ``scorer.json``
    - raises: ``ConfigError`` naming the file and every tensor that is missing, left over or misshaped
    """
    heads = {p: read_head_config(path / "reward_config.yaml") for p, path in adapters.items()}
    for perspective, path in adapters.items():
        check_head(family, heads[perspective], path)
    built = read_backbone(family, backbone, skip_ca_keys=skip_ca_keys)
    with torch.device("meta"):
        vision = built.build_vision()
    tensors = _load_backbone(backbone, built.names)
    prefix = built.names.vision
    _fill(vision, _take(tensors, prefix, vision), f"{backbone} (image tower)", device, dtype)
    base = _BaseTensors(tensors, device, dtype)
    branches = {}
    for perspective, path in adapters.items():
        with torch.device("meta"):
            branch = RewardBranch(built, heads[perspective])
        _fill(branch, _branch_tensors(built, branch, base, path, device), str(path), device, dtype)
        branches[perspective] = branch
    network = RewardNetwork(built, vision, branches)
    network.share_projectors()
    return network.eval().requires_grad_(False)


def _take(tensors: Tensors, prefix: str, module: nn.Module) -> Tensors:
    """Remove and return the tensors of a module whose names carry ``prefix``."""
    return {name: tensors.pop(prefix + name) for name in module.state_dict() if prefix + name in tensors}


def _load_backbone(backbone: Path, names: WeightNames) -> Tensors:
    """All tensors that a reward needs, as stored, under their names here."""
    tensors: Tensors = {}
    for path in backbone_weights(backbone):
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}") from error
        for published, tensor in stored.items():
            if names.unused.fullmatch(published):
                continue
            name = names.rename(published)
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise ConfigError(f"{path}: {published} is a second, different {name}")
            tensors[name] = tensor
    return tensors


def _branch_tensors(
    backbone: Backbone[Any, Any], branch: RewardBranch, base: _BaseTensors, adapter: Path, device: torch.device
) -> Tensors:
    """Everything of one perspective: the adapter's own tensors, merged weights, and the rest of the backbone."""
    head_path, lora_path = adapter_weights(adapter)
    lora = read_lora_config(adapter / "lora" / "adapter_config.json")
    # The stored projector wins over the backbone's.
    tensors = _head_tensors(head_path, backbone.names.projector, branch.state_dict())
    for name, delta in _lora_deltas(lora_path, lora, backbone, device).items():
        tensors[name] = base.merged(name, delta, lora_path)
    return tensors | {name: base[name] for name in base.names() - set(tensors)}


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
    # Buffers that are in no file, such as rotary frequencies, still lie where they were made.
    module.to(device)


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


def _head_tensors(path: Path, projector: str, expected: Iterable[str]) -> Tensors:
    """``pytorch_model.bin`` under the network's names; any prefix before the known endings is dropped."""
    parent = projector[: projector[:-1].rindex(".") + 1]
    endings = {name: name for name in _HEAD_NAMES}
    endings |= {name.removeprefix(parent): name for name in expected if name.startswith(projector)}
    found: Tensors = {}
    unknown = []
    for key, tensor in read_tensors(path).items():
        name = next((n for ending, n in endings.items() if key == ending or key.endswith(f".{ending}")), None)
        if name is None or name in found:
            unknown.append(key)
        else:
            found[name] = tensor
    if unknown:
        raise ConfigError(f"{path}: surplus or repeated tensors {sorted(unknown)}")
    return found


def _lora_deltas(path: Path, lora: LoraConfig, backbone: Backbone[Any, Any], device: torch.device) -> Tensors:
    """``scale * B @ A`` in float32 per weight name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in read_tensors(path).items():
        match = _LORA_KEY.fullmatch(key)
        module = backbone.names.rename(match[1]) if match else ""
        if match is None or not _is_layer_part(module, backbone.names) or match[2] in pairs.get(module, {}):
            unknown.append(key)
        else:
            pairs.setdefault(module, {})[match[2]] = tensor
    missing = sorted(
        f"{module}.lora_{side}.weight"
        for module in set(_lora_modules(lora.targets, backbone)) | set(pairs)
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


def _is_layer_part(module: str, names: WeightNames) -> bool:
    return re.fullmatch(re.escape(names.layers) + r"\d+\.(?:self_attn|mlp)\.\w+", module) is not None


def _lora_modules(targets: Iterable[str], backbone: Backbone[Any, Any]) -> list[str]:
    """The modules that an adapter must change. Targets are last names or, as qwen and llava have them, whole paths."""
    names, wanted = backbone.names, {backbone.names.rename(target) for target in targets}
    modules = [
        (f"{names.layers}{layer}.{part}.{projection}", projection)
        for layer in range(backbone.num_layers)
        for part, projections in names.projections.items()
        for projection in projections
    ]
    return [module for module, last in modules if module in wanted or last in wanted]


def load_untrained(
    backbone: Backbone[Any, Any], folder: Path, head: HeadConfig, *, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, RewardBranch]:
    """Image tower and the branch of a new perspective: the backbone's own projector, no LoRA, a head of zeros.

    - backbone: of the configuration in ``folder``
    - raises: ``ConfigError`` as ``load_network`` does
    """
    with torch.device("meta"):
        vision, branch = backbone.build_vision(), RewardBranch(backbone, head)
    tensors = _load_backbone(folder, backbone.names)
    _fill(vision, _take(tensors, backbone.names.vision, vision), f"{folder} (image tower)", device, dtype)
    head_names = {name for name in branch.state_dict() if name.endswith(_HEAD_NAMES) and name not in tensors}
    tensors |= {name: torch.zeros(branch.state_dict()[name].shape) for name in head_names}
    _fill(branch, tensors, str(folder), device, dtype)
    return vision, branch
