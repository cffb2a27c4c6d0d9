"""The training losses: against the released code's values, and by hand. Layout: tests/golden/llava_reward/README.md."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from model.llava_reward.losses import (
    PAIR_LOSSES,
    LearnableTau,
    LossValue,
    binary_classification_loss,
    focal_pairwise_loss,
    general_preference,
    pair_loss,
)
from tests.golden_cases import DEFAULT_ROOT, golden_root, read_json, require_cases, system_folders
from tests.llava_reward_cases import SYSTEM, TOLERANCE


def _expected(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(folder / "expected.json")["expected_loss_and_prob"]
    return values


FOLDERS = [f for f in system_folders(SYSTEM) if f.name.startswith("losses")]
CASES = [(folder, name) for folder in FOLDERS for name in _expected(folder)]


def _id(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


every_case = pytest.mark.parametrize(("folder", "name"), CASES, ids=_id)


def computed(values: dict[str, Any], case: str) -> LossValue:
    """A loss from a case's inputs; the case's name says which, with margin or not, and of which dimension."""
    name = case.split("(")[0]
    if name.startswith("Binary_Cls_loss"):
        released = not name.endswith("_float32")
        return binary_classification_loss(
            torch.tensor(values["chosen_1d"]), torch.tensor(values["labels"]), rounds_as_released=released
        )
    dimension = re.search(r"dim=(\d+)", case)
    size = int(dimension[1]) if dimension else 2 if name.startswith("General") else 1
    tau = re.search(r"tau=([\d.]+)", case)
    loss = pair_loss(name, float(tau[1]) if tau else 0.1)
    chosen, rejected = (torch.tensor(values[f"{side}_{size}d"]) for side in ("chosen", "reject"))
    value: LossValue = loss(chosen, rejected, torch.tensor(values["margin"]) if "margin" in case else None)
    return value


def check(values: dict[str, Any], case: str) -> None:
    expected = values["expected_loss_and_prob"][case]
    if expected is None:
        with pytest.raises(ConfigError, match="cannot be used"):
            computed(values, case)
        return
    got = [float(part.detach()) for part in computed(values, case)]
    # Some are around a hundred, where float32 has a step of 1e-5.
    assert got == pytest.approx(expected, rel=1e-6, abs=TOLERANCE)


@pytest.mark.golden
def test_the_system_has_cases() -> None:
    require_cases(SYSTEM, list(system_folders(SYSTEM)))
    if golden_root() == DEFAULT_ROOT:
        names = {name.split("(")[0] for _, name in CASES}
        assert set(PAIR_LOSSES) <= names


@pytest.mark.golden
@every_case
def test_losses_equal_the_reference(folder: Path, name: str) -> None:
    check(read_json(folder / "expected.json"), name)


# Where the reference raises there is no value to miss.
@pytest.mark.golden
@pytest.mark.parametrize(("folder", "name"), [(f, n) for f, n in CASES if _expected(f)[n] is not None], ids=_id)
def test_one_changed_input_is_noticed(folder: Path, name: str) -> None:
    values = read_json(folder / "expected.json")
    for key in ("chosen_1d", "chosen_2d", "chosen_4d"):
        values[key][0][0] += 0.5
    with pytest.raises(AssertionError):
        check(values, name)


def pair(chosen: list[float], rejected: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor([chosen]), torch.tensor([rejected])


def test_pairwise_by_hand() -> None:
    # d = 0.2, tau 0.1: -log sg(2) = log(1 + e^-2) = 0.126928; with m = 0.3: -log sg(-1) = 1.313262
    loss = pair_loss("PairWiseLoss", 0.1)
    assert float(loss(*pair([0.5], [0.3])).loss) == pytest.approx(0.126928, abs=1e-5)
    assert float(loss(*pair([0.5], [0.3]), torch.tensor([0.3])).loss) == pytest.approx(1.313262, abs=1e-5)


def test_focal_weight_has_a_gradient_where_the_pair_is_certain() -> None:
    chosen = torch.tensor([[30.0], [0.2]], requires_grad=True)
    focal_pairwise_loss(chosen, torch.zeros(2, 1), 0.1).loss.backward()  # logits 300, where sg is 1, and 2
    # d/dx of -log sg(x) (1 - sg(x))^0.5 at 2 is -(0.1192 + 0.5 * 0.1269) * 0.1192^0.5; by 1/tau and half a pair
    assert chosen.grad is not None
    assert chosen.grad[:, 0].tolist() == pytest.approx([0.0, -0.30224], abs=1e-4)


def test_general_preference_by_hand() -> None:
    # (1, 2) and (3, 5): 1*5 - 2*3 = -1; a second block (1, 0), (0, 4) adds 1*4 - 0*0 = 4.
    assert general_preference(*pair([1, 2], [3, 5])).tolist() == [[-1]]
    assert general_preference(*pair([1, 2, 1, 0], [3, 5, 0, 4])).tolist() == [[3]]
    with pytest.raises(ValueError, match="even"):
        general_preference(*pair([1, 2, 3], [1, 2, 3]))


def test_margins_of_regressions_by_hand() -> None:
    margin = torch.tensor([0.7])
    # d / tau = 2; target 5 * sg(0.7) = 5 * 0.668188 = 3.340939; (2 - 3.340939)^2 / 2 = 0.899059
    value = pair_loss("PairWiseRegressionLoss", 0.1)(*pair([0.5], [0.3]), margin)
    assert float(value.loss) == pytest.approx(0.899059, abs=1e-5)
    # s = -1, tau 0.5: s / tau = -2; (-2 - 3.340939)^2 / 2 = 14.262814
    chosen, rejected = pair([1, 2], [3, 5])
    value = pair_loss("GeneralPreferenceRegressionLoss", 0.5)(chosen, rejected, margin)
    assert float(value.loss) == pytest.approx(14.262814, abs=1e-4)
    # High dimensions know no target with a margin: ((-1 - 0.7) / 0.5)^2 / 2 = 5.78
    value = pair_loss("HighDimGeneralPreferenceRegressionLoss", 0.5)(chosen, rejected, margin)
    assert float(value.loss) == pytest.approx(5.78, abs=1e-5)


def test_learnable_temperature_is_trained_and_floored() -> None:
    loss = pair_loss("PairWiseLearnableTauLoss")
    value = loss(*pair([0.5], [0.3]))
    value.loss.backward()
    (theta,) = loss.parameters()
    assert theta.grad is not None
    assert float(theta.grad) != 0
    # log(1 + e^-2.25) = 0.100202
    assert LearnableTau()().item() == pytest.approx(math.log1p(math.exp(-2.25)), abs=1e-6)
    assert LearnableTau(initial=-20.0)().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("HighDimGeneralPreferenceMoELoss", "response length"),
        ("HighDimGeneralPreferenceLearnableTauLoss", "torch does not have"),
        ("margin_loss", "before there is one"),
        ("SFTSumLoss", "no effect"),
        ("Binary_Cls_loss", "binary_classification_loss"),
        ("PairwiseLoss", "unknown"),
    ],
)
def test_broken_and_unknown_losses_are_named(name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        pair_loss(name)


def test_a_margin_that_a_loss_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="focal_pairwise_loss has no margin"):
        pair_loss("FocalPairWiseLoss")(*pair([0.5], [0.3]), torch.tensor([0.3]))
