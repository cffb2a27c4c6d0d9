"""Runs of pretraining: they learn, stop, resume exactly, and leave a folder that is a backbone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from model.errors import ConfigError, DivergedError
from model.llava_reward.backbones.phi3v import read_backbone
from model.llava_reward.checkpoint import load_network
from model.llava_reward.pretrain import DEFAULT_CONFIG, Pretraining
from model.llava_reward.pretrain_config import read_pretrain_config
from model.llava_reward.pretrain_data import (
    LABELS,
    Sample,
)
from model.llava_reward.pretrain_objectives import learning_rate
from model.perspectives import Perspective
from model.scene_grammar import HELD_OUT_PAIRS, Kind
from tests.pretrain_helpers import SMALL, small_config
from tests.random_adapter import write_adapter


def _logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_shipped_configuration_reads() -> None:
    config = read_pretrain_config(DEFAULT_CONFIG)
    assert config.network.crop % (2 * config.network.patch) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tower": {**SMALL["tower"], "lr": 1.0}}, "tower holds"),
        ({"captions": {**SMALL["captions"], "rate": "1e-3"}}, "captions.rate='1e-3' is no number"),
        ({"tower": {**SMALL["tower"], "micro_batch": 3}}, "no multiple of tower.micro_batch"),
        ({"captions": {**SMALL["captions"], "micro_batch": 0}}, "no multiple of captions.micro_batch"),
        ({"is_mixed": 1}, "is_mixed=1"),
        ({"network": {**SMALL["network"], "layers": -1}}, "network.layers=-1"),
        ({"scenes": {**SMALL["scenes"], "sizes": [[64, 32]]}}, r"\[64, 32\]"),
        ({"extra": 1}, "extra"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**SMALL, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_pretrain_config(tmp_path / "config.yaml")


def test_what_the_split_keeps_apart_is_not_asked(tmp_path: Path) -> None:
    """Of a cell in the one colour in which no ball is ever drawn nobody learns that it holds no ball."""
    [colour] = [colour for kind, colour in HELD_OUT_PAIRS if kind is Kind.BALL]
    run = Pretraining(tmp_path, small_config(tmp_path, tower={"micro_batch": 4, "steps": 16}), workers=0)
    with torch.no_grad():
        run.network.cells.weight.zero_()
        run.network.cells.bias.zero_()
    total = colourless = 0
    for batch in list(run._batches()):
        _, shown = run.network.crops(batch, 1)
        flat = shown.flatten(0, 1)
        has_colour = flat[:, LABELS.index(colour)] == 1
        total, colourless = total + len(flat), colourless + int((~has_colour).sum())
        run.optimizer.zero_grad()
        [losses] = run.objective.losses(batch)
        losses.total.backward()  # type: ignore[no-untyped-call]
        gradient = run.network.cells.bias.grad
        assert gradient is not None
        # at a logit of 0 the gradient is half a cell up or down, for each cell that is asked
        expected = float((0.5 - flat[:, LABELS.index(Kind.BALL)])[~has_colour].sum() / len(flat))
        assert gradient[LABELS.index(Kind.BALL)].item() == pytest.approx(expected, abs=1e-6)
    assert 0 < colourless < total


def test_learning_rate(tmp_path: Path) -> None:
    stage = small_config(tmp_path).captions  # 2e-3, two steps of warm-up, six in all, down to a tenth
    assert learning_rate(stage, 0) == pytest.approx(1e-3)
    assert learning_rate(stage, 1) == pytest.approx(2e-3)
    assert learning_rate(stage, 2) == pytest.approx(2e-3)
    assert learning_rate(stage, 4) == pytest.approx(1.1e-3)  # half of the cosine: 0.1 + 0.9 / 2
    assert learning_rate(stage, 6) == pytest.approx(2e-4)


def test_a_step_moves_what_its_stage_teaches(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, small_config(tmp_path), workers=0)
    every = {name for name, _ in run.network.named_parameters()}
    tower = {name for name in every if name.startswith(("vision.img_processor", "cells"))}
    for stage, expected in (("tower", tower), ("captions", every - tower)):
        run.begin(stage)
        before = {name: parameter.detach().clone() for name, parameter in run.network.named_parameters()}
        run.train_step(next(run._batches()))
        moved = {name for name, p in run.network.named_parameters() if not torch.equal(p, before[name])}
        # one key shared by all keys changes no softmax, so the bias of keys has no gradient
        assert moved <= expected
        assert {name for name in expected - moved if not name.endswith("k_proj.bias")} == set()


@pytest.mark.parametrize("stage", ["tower", "captions"])
def test_micro_batches_change_nothing(tmp_path: Path, stage: str) -> None:
    losses = []
    for micro_batch in (1, 4):
        out = tmp_path / str(micro_batch)
        run = Pretraining(out, small_config(out, **{stage: {"micro_batch": micro_batch}}), workers=0)
        run.begin(stage)
        losses.append([list(run.train_step(batch).values()) for batch in list(run._batches())[:3]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def _recorded(run: Pretraining, stop_after: int | None = None) -> list[dict[str, float]]:
    """Losses of ``run.run()``, told to stop after so many steps."""
    found: list[dict[str, float]] = []
    step = run.train_step

    def recorded(batch: Sequence[Sample]) -> dict[str, float]:
        found.append(step(batch))
        if len(found) == stop_after:
            run.stop()
        return found[-1]

    run.train_step = recorded  # type: ignore[method-assign]
    run.run()
    return found


@pytest.mark.parametrize("cut", [2, 4, 7])  # in the tower's four steps, at their end, in the captions
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, cut: int) -> None:
    whole = Pretraining(tmp_path / "whole", small_config(tmp_path / "whole"), workers=0)
    expected = _recorded(whole)
    assert [set(losses) for losses in expected] == [{"cells"}] * 4 + [{"loss", "words"}] * 6

    first = Pretraining(tmp_path / "cut", small_config(tmp_path / "cut"), workers=0)
    found = list(_recorded(first, stop_after=cut))
    if cut != 4:
        first.train_step(next(first._batches()))  # lost by a kill
    second = Pretraining(tmp_path / "cut", small_config(tmp_path / "cut"), workers=0)
    assert (second.stage, second.step, second.seen) == (("tower", cut, 4 * cut) if cut <= 4 else ("captions", 3, 28))
    found += _recorded(second)
    assert found == expected
    ours, theirs = second.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_network_does_not_resume(tmp_path: Path) -> None:
    Pretraining(tmp_path, small_config(tmp_path), workers=0).save()
    with pytest.raises(ConfigError, match="scenes"):
        Pretraining(tmp_path, small_config(tmp_path, scenes={"sign_share": 0.5}), workers=0)
    # other stages do, and the decay is the new one
    run = Pretraining(tmp_path, small_config(tmp_path, tower={"steps": 9, "weight_decay": 0.3}), workers=0)
    assert run.step == 0
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.3}


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, small_config(tmp_path, tower={"steps": 0}), workers=0)
    with torch.no_grad():
        run.network.model.norm.weight[0] = math.nan
    with pytest.raises(DivergedError, match=r"captions, step 0: losses \{'loss': nan.* lower captions.rate"):
        run.run()
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.timeout(120)
def test_terminated_it_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    small_config(tmp_path, tower={"steps": 5000})
    command = [sys.executable, "-m", "model.llava_reward.pretrain", str(tmp_path), "--config"]
    command.append(str(tmp_path / "config.yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment) as process:
        while not (tmp_path / "log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    step = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    assert 1 <= step < 5000
    Pretraining(tmp_path, small_config(tmp_path, tower={"steps": step + 2}, captions={"steps": 2}), workers=0).run()
    steps = [(entry["stage"], entry["step"]) for entry in _logged(tmp_path) if "split" not in entry]
    assert steps == [("tower", n) for n in range(1, step + 3)] + [("captions", 1), ("captions", 2)]
    measured = {(entry["stage"], entry["split"]) for entry in _logged(tmp_path) if "split" in entry}
    assert measured == {(stage, split) for stage in ("tower", "captions") for split in ("validation", "held_out")}


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("stage", ["tower", "captions"])
def test_it_learns(tmp_path: Path, is_mixed: bool, stage: str) -> None:
    config = small_config(tmp_path, is_mixed=is_mixed, **{stage: {"steps": 40, "rate": 1.0e-2}})
    run = Pretraining(tmp_path, config, workers=0)
    run.begin(stage)
    losses = [run.train_step(batch) for batch in run._batches()]
    main = "cells" if stage == "tower" else "loss"
    assert losses[-1][main] < 0.6 * losses[0][main]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_it_learns_which_words_are_wrong(tmp_path: Path, is_mixed: bool) -> None:
    """Of one batch: from 160 others a network this small learns nothing of prompts."""
    config = small_config(tmp_path, is_mixed=is_mixed, captions={"rate": 1.0e-2, "steps": 40})
    run = Pretraining(tmp_path, config, workers=0)
    run.begin("captions")
    batch = next(run._batches())
    losses = [run.train_step(batch) for _ in range(40)]
    assert losses[-1]["words"] < 0.6 * losses[0]["words"]


def test_a_run_begins_with_the_weights_of_another_backbone(tmp_path: Path) -> None:
    first = Pretraining(tmp_path / "first", small_config(tmp_path / "first"), workers=0)
    with torch.no_grad():
        first.network.model.norm.weight.fill_(0.5)
        first.network.vision.sub_GN.fill_(0.25)
    first.save()
    start = tmp_path / "first" / "backbone"
    config = small_config(tmp_path / "second", seed=4)
    second = Pretraining(tmp_path / "second", config, workers=0, start=start)
    ours = second.network.state_dict()
    for name, tensor in first.network.state_dict().items():
        is_kept = torch.equal(ours[name], tensor.bfloat16().float())
        assert is_kept != name.startswith(("cells.weight", "words.weight"))
    second.train_step(next(second._batches()))
    second.save()  # from then on it goes on from its own state
    again = Pretraining(tmp_path / "second", config, workers=0, start=start)
    assert again.step == 1
    other = small_config(tmp_path / "third", network={"hidden": 32})
    with pytest.raises(ConfigError, match="other sizes"):
        Pretraining(tmp_path / "third", other, workers=0, start=start)


def test_the_written_folder_is_a_backbone(tmp_path: Path) -> None:
    run = Pretraining(tmp_path, small_config(tmp_path), workers=0)
    [sample, *_] = next(run._batches())
    run.save()
    built = read_backbone(tmp_path / "backbone")
    write_adapter(tmp_path / "alignment", built, torch.Generator().manual_seed(0))
    adapters = {Perspective.ALIGNMENT: tmp_path / "alignment"}
    network = load_network(tmp_path / "backbone", adapters, device=torch.device("cpu"), dtype=torch.float32)
    kept = network.vision.state_dict()
    for name, trained in run.network.vision.state_dict().items():
        assert torch.equal(kept[name], trained.bfloat16().float())
    arrays = {"pixels": sample.pixels, "input_ids": sample.input_ids}
    rewards = network([built.sample(arrays, torch.device("cpu"))], [Perspective.ALIGNMENT])
    assert rewards[Perspective.ALIGNMENT].isfinite().all()
