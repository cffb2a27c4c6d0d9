"""Merged or low-rank: how much each takes, what is free, and the choice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model.llava_reward.adapter_form import (
    WeightBytes,
    available_ram,
    choose_form,
    decide,
    free_bytes,
    weight_bytes,
)
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.backbones.phi3v import Phi3VBackbone
from model.llava_reward.bundle import read_bundle
from model.llava_reward.checkpoint import load_network
from model.llava_reward.config import (
    ClipConfig,
    HeadConfig,
    LoraConfig,
    Phi3VConfig,
    RopeConfig,
    read_head_config,
    read_lora_config,
)
from model.perspectives import Perspective
from model.scorer import load, resolve
from tests.llava_reward_bundles import write_bundle

torch.set_num_threads(1)

GIB = 2**30
CPU = torch.device("cpu")
# Phi-3.5-vision in bfloat16 with four perspectives, rounded.
FOUR = WeightBytes(merged=29 * GIB, low_rank=10 * GIB)


@pytest.mark.parametrize(
    ("free_gib", "is_low_rank", "reason"),
    [
        (80, False, "merged: within 80% of the 80.00 GiB free on cuda:0"),
        (36.25, False, "merged: within 80%"),  # 0.8 * 36.25 = 29
        (36.24, True, "low_rank: merged is over 80% of the 36.24 GiB free on cuda:0;"),
        (12.5, True, "low_rank: merged is over 80% of the 12.50 GiB free on cuda:0;"),  # 0.8 * 12.5 = 10
        (12, True, "low_rank: merged is over 80% of the 12.00 GiB free on cuda:0, and so is low-rank: loading may"),
        (None, True, "low_rank: how much memory cuda:0 has free is unknown"),
    ],
)
def test_merged_where_it_fits(free_gib: float | None, is_low_rank: bool, reason: str) -> None:
    free = None if free_gib is None else int(free_gib * GIB)
    form = decide("auto", FOUR, free, 0.8, "cuda:0")
    assert form.is_low_rank is is_low_rank
    assert form.reason.startswith(reason)
    assert form.reason.endswith("weights merged 29.00 GiB, low-rank 10.00 GiB")
    assert "\n" not in form.reason


@pytest.mark.parametrize("asked", ["merged", "low_rank"])
def test_what_is_set_is_taken(asked: str) -> None:
    form = decide(asked, FOUR, 0, 0.8, "cpu")
    assert form.is_low_rank is (asked == "low_rank")
    assert form.reason.startswith(f"{asked}: as set; weights merged 29.00 GiB")


def test_one_perspective_is_merged_however_little_is_free() -> None:
    assert decide("auto", WeightBytes(8 * GIB, 9 * GIB), 0, 0.8, "cpu").reason.startswith("merged: low-rank would save")


def test_full_size_by_hand() -> None:
    """Phi-3.5-vision, four adapters of rank 128 on all projections, SkipCA, a projector each; bfloat16.

    Per layer: projections 3072*(9216 + 3072 + 16384) + 8192*3072 = 113,246,208, norms 6144; LoRA 128*(3072 + 9216
    + 2*3072 + 3072 + 16384 + 8192 + 3072) = 128*49,152 = 6,291,456.
    """
    layers, lora = 32 * 113_246_208, 32 * 6_291_456
    once = 32064 * 3072 + 32 * 6144 + 3072
    own = 4096 * 3072 + 3072 + 3072 * 3072 + 3072 + 3 * 3072 * 3072 + 3072 + 3072  # projector, SkipCA, norm, head
    # CLIP: 23 layers of 4*(w*w + w) + 2*w*4096 + 4096 + w + 4*w; patches, positions, class, norm; two separators.
    w = 1024
    tower = 23 * (4 * (w * w + w) + 2 * w * 4096 + 4096 + w + 4 * w) + 3 * 14 * 14 * w + 577 * w + w + 2 * w + 2 * 4096
    rope = RopeConfig(10000.0, 96, 4096, (), (), 1.0)
    backbone = Phi3VBackbone(
        Phi3VConfig(32064, 3072, 8192, 32, 32, 32, 1e-5, 131072, rope), ClipConfig(1024, 4096, 24, 16, 336, 14, 1e-5)
    )
    heads = dict.fromkeys(Perspective, HeadConfig(True, False, 1, 0.1))
    loras = dict.fromkeys(Perspective, LoraConfig(128, 2.0, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")))
    sizes = weight_bytes(backbone, heads, loras, torch.bfloat16)
    assert sizes.merged == 2 * (tower + once + 4 * own + 4 * layers)
    assert sizes.low_rank == 2 * (tower + once + 4 * own + layers + 4 * lora)
    assert (sizes.merged / GIB, sizes.low_rank / GIB) == pytest.approx((28.1, 9.4), abs=0.1)
    partly = {**loras, Perspective.SAFETY: LoraConfig(64, 2.0, ("o_proj",))}
    sizes = weight_bytes(backbone, heads, partly, torch.bfloat16)
    # The fourth adapter's other projections are the base's, once.
    assert sizes.merged == 2 * (tower + once + 4 * own + 4 * layers)


def _held(folder: Path, *, is_low_rank: bool) -> int:
    bundle = read_bundle(folder)
    network = load_network(
        bundle.backbone,
        bundle.adapters,
        device=CPU,
        dtype=torch.bfloat16,
        family=bundle.family,
        skip_ca_keys=bundle.skip_ca_keys,
        is_low_rank=is_low_rank,
    )
    tensors = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in network.state_dict().values()}
    return sum(tensors.values())


@pytest.mark.parametrize("family", ["phi3v", "qwen", "llava"])
def test_the_estimate_is_what_is_then_held(family: str, tmp_path: Path) -> None:
    folder = resolve("demo")
    if family != "phi3v":
        folder = write_bundle(tmp_path / family, family, {"safety": "bt_plain", "overall": "gpm_plain"})
    reason = choose_form(read_bundle(folder), "auto", device=CPU, dtype=torch.bfloat16).reason
    sizes = re.search(r"merged (\S+) GiB, low-rank (\S+) GiB", reason)
    assert sizes is not None
    for text, is_low_rank in zip(sizes.groups(), (False, True), strict=True):
        assert float(text) == pytest.approx(_held(folder, is_low_rank=is_low_rank) / GIB, abs=0.006)


def test_the_estimate_of_the_demo_is_exact_to_the_byte() -> None:
    bundle = read_bundle(resolve("demo"))
    exact = [_held(bundle.folder, is_low_rank=form) for form in (False, True)]
    heads = {p: read_head_config(path / "reward_config.yaml") for p, path in bundle.adapters.items()}
    loras = {p: read_lora_config(path / "lora/adapter_config.json") for p, path in bundle.adapters.items()}
    sizes = weight_bytes(read_backbone(bundle.family, bundle.backbone), heads, loras, torch.bfloat16)
    assert [sizes.merged, sizes.low_rank] == exact
    assert sizes.low_rank < 0.5 * sizes.merged


def test_a_full_device_loads_the_low_rank_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.llava_reward.adapter_form.free_bytes", lambda device: 1_000_000)
    scorer = load("demo")
    assert scorer.placement.startswith("low_rank: merged is over 50% of the 0.00 GiB free on cpu")
    scorer.check_golden()


def test_the_demo_is_merged_here() -> None:
    assert load("demo").placement.startswith("merged: within 50% of the ")


# --- what is free ---


def _proc(root: Path, available_kib: int) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:  9 kB\nMemAvailable:   {available_kib} kB\nHugePages_Total: 0\n")
    return root


def test_main_memory_is_what_kernel_and_container_leave(tmp_path: Path) -> None:
    assert available_ram(_proc(tmp_path / "plain", 1000)) == 1000 * 1024
    root = _proc(tmp_path / "v2", 1000)
    cgroup = root / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    for name, text in (
        ("memory.max", "900000\n"),
        ("memory.current", "700000\n"),
        ("memory.stat", "inactive_file 5\n"),
    ):
        (cgroup / name).write_text(text)
    assert available_ram(root) == 900_000 - (700_000 - 5)
    (cgroup / "memory.max").write_text("max\n")
    assert available_ram(root) == 1000 * 1024
    root = _proc(tmp_path / "v1", 1000)
    cgroup = root / "sys/fs/cgroup/memory"
    cgroup.mkdir(parents=True)
    for name, text in (
        ("memory.limit_in_bytes", "500"),
        ("memory.usage_in_bytes", "600"),
        ("memory.stat", "cache 9\ntotal_inactive_file 0"),
    ):
        (cgroup / name).write_text(text)
    assert available_ram(root) == 0
    assert available_ram(tmp_path / "no linux") is None


def test_free_memory_of_devices() -> None:
    assert (free_bytes(CPU) or 0) > 0
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_memory_of_a_gpu() -> None:
    assert 0 < (free_bytes(torch.device("cuda")) or 0) <= torch.cuda.get_device_properties(0).total_memory
