"""Whether the perspectives' LoRA is merged or kept low-rank: what each takes in memory, and which is chosen.

Merged, each perspective has a language model of its own; low-rank, all share one. Merged is the less work, so it is
taken where it fits. Sizes come from configuration files; nothing is allocated and no weights are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.llava_reward.adapter_file import HEAD_CONFIG, LORA_CONFIG
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.bundle import Bundle
from model.llava_reward.config import HeadConfig, LoraConfig, read_head_config, read_lora_config
from model.llava_reward.lora import lora_modules
from model.llava_reward.network import RewardBranch
from model.perspectives import Perspective

# How much of the free memory merged weights may take. On a GPU the rest holds a pass (some 4 GB by estimate, see
# scorer.py) and spare room; on a CPU replicas start side by side, and each sees the same free memory.
FREE_SHARES = {"cuda": 0.8, "cpu": 0.5}

_GIB = 2**30


@dataclass(frozen=True)
class WeightBytes:
    """All weights of one network, in each form. Projectors count once a perspective, though equal ones are shared."""

    merged: int
    low_rank: int


@dataclass(frozen=True)
class AdapterForm:
    """The form taken, and in one line why."""

    is_low_rank: bool
    reason: str


def choose_form(bundle: Bundle, asked: str, *, device: torch.device, dtype: torch.dtype) -> AdapterForm:
    """The form for a bundle on ``device`` as it is now; ``asked``: one of ``model.scorer.ADAPTERS``.

    - raises: ``ConfigError`` for a malformed configuration file
    """
    backbone = read_backbone(bundle.family, bundle.backbone, skip_ca_keys=bundle.skip_ca_keys)
    heads = {p: read_head_config(path / HEAD_CONFIG) for p, path in bundle.adapters.items()}
    loras = {p: read_lora_config(path / LORA_CONFIG) for p, path in bundle.adapters.items()}
    sizes = weight_bytes(backbone, heads, loras, dtype)
    return decide(asked, sizes, free_bytes(device), FREE_SHARES.get(device.type, 0.0), str(device))


def decide(asked: str, sizes: WeightBytes, free: int | None, share: float, place: str) -> AdapterForm:
    """Merged where that takes at most ``share`` of the ``free`` bytes, or no more than low-rank; else low-rank.

    - asked: ``merged`` or ``low_rank`` decides by itself; free: None where it cannot be told
    - place: the device, for the reason
    """
    both = f"weights merged {sizes.merged / _GIB:.2f} GiB, low-rank {sizes.low_rank / _GIB:.2f} GiB"
    if asked != "auto":
        return AdapterForm(asked == "low_rank", f"{asked}: as set; {both}")
    if sizes.merged <= sizes.low_rank:
        return AdapterForm(False, f"merged: low-rank would save nothing; {both}")
    if free is None:
        return AdapterForm(True, f"low_rank: how much memory {place} has free is unknown; {both}")
    limit = f"{share:.0%} of the {free / _GIB:.2f} GiB free on {place}"
    if sizes.merged <= share * free:
        return AdapterForm(False, f"merged: within {limit}; {both}")
    tight = "" if sizes.low_rank <= share * free else ", and so is low-rank: loading may fail"
    return AdapterForm(True, f"low_rank: merged is over {limit}{tight}; {both}")


def weight_bytes(
    backbone: Backbone[Any, Any],
    heads: Mapping[Perspective, HeadConfig],
    loras: Mapping[Perspective, LoraConfig],
    dtype: torch.dtype,
) -> WeightBytes:
    """Bytes of all weights in either form, from sizes alone. ``heads``, ``loras``: of the same perspectives."""
    with torch.device("meta"):
        vision = backbone.build_vision()
        branches = [RewardBranch(backbone, head).state_dict() for head in heads.values()]
    names = backbone.names
    shared = {n: t for n, t in branches[0].items() if n.startswith("model.") and not n.startswith(names.projector)}
    own = sum(t.numel() for branch in branches for n, t in branch.items() if n not in shared)
    rest = own + sum(t.numel() for t in vision.state_dict().values())
    changes = Counter(f"{m}.weight" for lora in loras.values() for m in lora_modules(lora.targets, backbone))
    # A weight that some adapter leaves as it is exists once more, for all of those.
    copies = {name: changes[name] + (changes[name] < len(loras)) for name in shared}
    rank = max(lora.rank for lora in loras.values())
    merged = rest + sum(copies[name] * tensor.numel() for name, tensor in shared.items())
    beside = sum(len(loras) * rank * sum(shared[name].shape) for name in changes)
    low_rank = rest + sum(tensor.numel() for tensor in shared.values()) + beside
    return WeightBytes(merged * dtype.itemsize, low_rank * dtype.itemsize)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device; None where this is not known how to ask."""
    if device.type == "cuda":
        # What torch keeps for reuse is not free to the driver, yet free to us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free: int = torch.cuda.mem_get_info(device)[0] + kept
        return free
    return available_ram(Path("/")) if device.type == "cpu" else None


def available_ram(root: Path) -> int | None:
    """Main memory that this process may still take, by the kernel and by the container's limit; None if unknown.

    - root: where ``proc`` and ``sys`` lie
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    kernel = _numbers(meminfo)["MemAvailable"] * 1024
    return min([kernel, *_container_rooms(root / "sys/fs/cgroup")])


def _container_rooms(cgroup: Path) -> list[int]:
    """Limit less use, for control groups of either version. Files in the page cache can be dropped: no use."""
    rooms = []
    for folder, limit, used, cached in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()) != "max":
            taken = int((folder / used).read_text()) - _numbers(folder / "memory.stat").get(cached, 0)
            rooms.append(max(0, int(most) - taken))
    return rooms


def _numbers(path: Path) -> dict[str, int]:
    """``name: 12 kB`` or ``name 12``, a line each."""
    return {words[0].rstrip(":"): int(words[1]) for words in map(str.split, path.read_text().splitlines())}
