"""Weights on disk to a ready network, in the authors' published layout. Nothing is unpickled.

Every tensor is accounted for: what is missing, left over or of another shape is listed in one ``ConfigError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.adapter_file import LORA_CONFIG, inside, member_of
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.backbones.interface import Backbone, WeightNames
from model.llava_reward.bundle import adapter_weights, backbone_weights
from model.llava_reward.config import HeadConfig, read_head_config, read_lora_config
from model.llava_reward.lora import LoraPair, lora_pairs
from model.llava_reward.model_config import check_head
from model.llava_reward.network import RewardBranch, RewardNetwork
from model.perspectives import Perspective

# The released code finds the head's tensors by these endings, whatever stands before them.
_HEAD_NAMES = ("value_head.weight", "W_q.weight", "W_k.weight", "W_v.weight", "ca_layernorm.weight")

Tensors = dict[str, Tensor]

# What torch.load raises, with weights_only=True, for files that are cut or changed: seen with thousands of them.
# UnicodeDecodeError is a ValueError, IndexError and KeyError are LookupErrors.
_DAMAGED = (
    UnpicklingError,
    StructError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
)


class _BaseTensors:
    """The backbone's tensors under their names here. What is used as it is exists once on the device."""

    def __init__(self, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        self._stored, self._device, self._dtype = tensors, device, dtype
        self._ready: Tensors = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._ready:
            self._ready[name] = self._stored[name].to(self._device, self._dtype)
        return self._ready[name]

    def check(self, pairs: Mapping[str, LoraPair], source: Path) -> None:
        """Raises ``ConfigError`` for the first update that has another shape than its weight."""
        for module, pair in sorted(pairs.items()):
            name = f"{module}.weight"
            found = list(self._stored[name].shape) if name in self._stored else "nothing"
            if found != list(pair.shape):
                raise ConfigError(f"{source}: {name} needs {list(pair.shape)}, the backbone has {found}")

    def merged(self, module: str, pair: LoraPair) -> Tensor:
        """The stored weight plus its update in float32, rounded once."""
        weight = self._stored[f"{module}.weight"].to(self._device, torch.float32)
        return (weight + pair.delta(self._device)).to(self._dtype)

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
    is_low_rank: bool = False,
) -> RewardNetwork:
    """Build the network of a backbone and its adapters, in evaluation mode and without gradients.

    LoRA is merged in float32 and rounded to ``dtype`` once. Tensors that no adapter changes exist once, however
    many perspectives there are; so do projectors that several adapters store bit by bit alike.

    - family, skip_ca_keys: as in ``scorer.json``
    - is_low_rank: keep LoRA beside one language model instead of merging it into one per perspective
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
    branches: dict[Perspective, RewardBranch] = {}
    beside: dict[Perspective, dict[str, LoraPair]] = {}
    for perspective, path in adapters.items():
        with torch.device("meta"):
            branch = RewardBranch(built, heads[perspective])
        pairs = _lora(built, base, path)
        merged = {} if is_low_rank else {f"{m}.weight": base.merged(m, pair) for m, pair in pairs.items()}
        _fill(branch, _branch_tensors(built, branch, base, path, merged), str(path), device, dtype)
        branches[perspective] = branch
        if is_low_rank:
            beside[perspective] = pairs
    network = RewardNetwork(built, vision, branches)
    if is_low_rank:
        network.share_language_model(beside)
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


def _lora(backbone: Backbone[Any, Any], base: _BaseTensors, adapter: Path) -> dict[str, LoraPair]:
    path = adapter_weights(adapter)[1]
    pairs = lora_pairs(path, read_tensors(path), read_lora_config(adapter / LORA_CONFIG), backbone)
    base.check(pairs, path)
    return pairs


def _branch_tensors(
    backbone: Backbone[Any, Any], branch: RewardBranch, base: _BaseTensors, adapter: Path, merged: Tensors
) -> Tensors:
    """Everything of one perspective: the adapter's own tensors, merged weights, and the rest of the backbone."""
    # The stored projector wins over the backbone's.
    own = _head_tensors(adapter_weights(adapter)[0], backbone.names.projector, branch.state_dict()) | merged
    return own | {name: base[name] for name in base.names() - set(own)}


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
            stored_tensors: Tensors = load_file(path)
            return stored_tensors
    except (SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise _no_tensors(path, error) from error
    return _read_pickled(path)


def _read_pickled(path: Path) -> Tensors:
    try:
        tensors: object = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise _no_tensors(path, error) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise ConfigError(f"{path} is not a flat dict of names and tensors")
    return tensors


def _no_tensors(path: Path, error: Exception) -> ConfigError:
    cause = " ".join(str(error).split())[:200] or type(error).__name__
    return ConfigError(f"{path} holds no plain tensors: {cause}; replace it by the published file")


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
