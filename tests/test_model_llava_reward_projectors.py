"""Projectors that perspectives share: kept once, run once, and no reward changes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.llava_reward.checkpoint import load_network
from model.llava_reward.network import RewardNetwork
from model.perspectives import Perspective
from tests.llava_reward_bundles import GOLDEN
from tests.llava_reward_cases import BATCH_TOLERANCE, FAMILIES, read_inputs

torch.set_num_threads(2)

VARIANTS = {"phi3v": ("bt_skipca", "gpm_plain"), "qwen": ("bt_skipca", "gpm_plain"), "llava": ("bt_plain", "gpm_plain")}
PROJECTORS = {"phi3v": "img_projection", "qwen": "visual.merger", "llava": "multi_modal_projector"}
# Two adapters with one projector, and one with its own.
FIRST, SAME, OTHER = Perspective.ALIGNMENT, Perspective.SAFETY, Perspective.FIDELITY


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(family: str, tmp_path: Path) -> dict[Perspective, Path]:
    """Three adapters; the projector of the second is a copy of the first's."""
    one, two = VARIANTS[family]
    chosen = {FIRST: one, SAME: two, OTHER: two}
    made = {
        p: Path(shutil.copytree(GOLDEN / family / variant / "adapter", tmp_path / p)) for p, variant in chosen.items()
    }
    stored = _projector(made[FIRST], family)
    _rewrite(made[SAME], stored)
    _rewrite(made[OTHER], {name: tensor + 0.01 for name, tensor in stored.items()})
    return made


def _tensors(adapter: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(adapter / "pytorch_model.bin", weights_only=True)
    return tensors


def _projector(adapter: Path, family: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _tensors(adapter).items() if PROJECTORS[family] in name}


def _rewrite(adapter: Path, changed: dict[str, Tensor]) -> None:
    assert changed
    torch.save(_tensors(adapter) | changed, adapter / "pytorch_model.bin")


def read(family: str, adapters: dict[Perspective, Path]) -> RewardNetwork:
    folder = GOLDEN / family / "backbone"
    return load_network(folder, adapters, device=torch.device("cpu"), dtype=torch.float32, family=family)


@torch.inference_mode()
def rewards(network: RewardNetwork, family: str, perspectives: Sequence[Perspective]) -> dict[Perspective, Tensor]:
    return network(read_inputs(GOLDEN / family, family), perspectives)


def projector_of(network: RewardNetwork, perspective: Perspective) -> torch.nn.Module:
    return network.branch(perspective).get_submodule(network.backbone.names.projector.removesuffix("."))


def test_equal_projectors_become_one_module(family: str, adapters: dict[Perspective, Path]) -> None:
    network = read(family, adapters)
    assert projector_of(network, FIRST) is projector_of(network, SAME)
    assert projector_of(network, OTHER) is not projector_of(network, FIRST)


def test_rewards_equal_those_of_each_adapter_alone(family: str, adapters: dict[Perspective, Path]) -> None:
    together = rewards(read(family, adapters), family, [FIRST, OTHER, SAME])
    for perspective, path in adapters.items():
        alone = rewards(read(family, {perspective: path}), family, [perspective])[perspective]
        assert (together[perspective] - alone).abs().max() <= BATCH_TOLERANCE


def test_a_shared_projector_runs_once(
    family: str, adapters: dict[Perspective, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = read(family, adapters)
    calls: list[torch.nn.Module] = []
    project = network.backbone.project

    def counted(model: torch.nn.Module, shared: object) -> Sequence[Tensor]:
        calls.append(model)
        return project(model, shared)

    monkeypatch.setattr(network.backbone, "project", counted)
    rewards(network, family, [FIRST, SAME, OTHER])
    assert calls == [network.branch(FIRST).model, network.branch(OTHER).model]


def test_one_value_of_difference_keeps_projectors_apart(family: str, adapters: dict[Perspective, Path]) -> None:
    name, tensor = next(iter(_projector(adapters[SAME], family).items()))
    changed = tensor.clone()
    changed.view(-1)[0] += 0.5
    _rewrite(adapters[SAME], {name: changed})
    network = read(family, adapters)
    assert projector_of(network, FIRST) is not projector_of(network, SAME)
