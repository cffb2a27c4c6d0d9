"""LLaVA-Reward's scorer on the shipped checkpoint: batches, passes, heads and hashes."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model.errors import ConfigError, ErrorCode, InfrastructureError, Stage
from model.identity import same_within
from model.llava_reward.heads import gpm_score, preference_probability, safe_probability
from model.llava_reward.scorer import LlavaRewardScorer
from model.meaning import HeadTraining
from model.perspectives import PERSPECTIVES, Perspective
from model.scenes import asked_spec, prompt_of
from model.schema import Generation
from model.scorer import RawOutput, load, read_identity, resolve

torch.set_num_threads(2)

DEMO = resolve("demo")
SIZES = ((64, 64), (200, 90), (90, 200), (300, 40), (33, 31), (112, 112))


def jpeg(draw: np.random.Generator, width: int, height: int) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scorer() -> LlavaRewardScorer:
    return LlavaRewardScorer(DEMO)


@pytest.fixture(scope="module")
def generations() -> list[Generation]:
    draw = np.random.default_rng(1)
    prompts = ["", *(prompt_of(seed, asked_spec(seed)) for seed in range(8))]
    return [Generation(f"g{i}", prompts[i % 9] * (1 + i % 3), jpeg(draw, *SIZES[i % len(SIZES)])) for i in range(24)]


def values(outputs: Sequence[RawOutput]) -> np.ndarray:
    return np.array([[output.values[p] for p in PERSPECTIVES] for output in outputs])


def test_any_batch_gives_the_reward_of_the_sample_alone(
    scorer: LlavaRewardScorer, generations: list[Generation]
) -> None:
    prepared = scorer.preprocess(generations)
    alone = values([scorer.forward([item])[0] for item in prepared])
    order = np.random.default_rng(2).permutation(len(prepared))
    together = values(scorer.forward(prepared))
    shuffled = values(scorer.forward([prepared[i] for i in order]))
    assert np.abs(together - alone).max() <= 1e-5
    assert np.abs(shuffled - alone[order]).max() <= 1e-5


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 1000])
def test_pass_size_does_not_change_rewards(
    scorer: LlavaRewardScorer, generations: list[Generation], max_batch_tokens: int
) -> None:
    prepared = scorer.preprocess(generations[:8])
    small = LlavaRewardScorer(DEMO, max_batch_tokens=max_batch_tokens)
    lengths = [len(item.arrays["input_ids"]) for item in prepared]
    passes = small._passes({i: i for i in range(len(prepared))}, prepared, max_batch_tokens)
    assert sorted(i for indices in passes for i in indices) == list(range(len(prepared)))
    for indices in passes:
        assert len(indices) == 1 or len(indices) * max(lengths[i] for i in indices) <= max_batch_tokens
    assert np.abs(values(small.forward(prepared)) - values(scorer.forward(prepared))).max() <= 1e-5


def test_equal_batches_are_bit_equal(scorer: LlavaRewardScorer, generations: list[Generation]) -> None:
    prepared = scorer.preprocess(generations[:6])
    assert scorer.forward(prepared) == scorer.forward(prepared)


def test_rewards_vary_with_image_and_with_prompt(scorer: LlavaRewardScorer, generations: list[Generation]) -> None:
    def spread(varied: list[Generation]) -> np.ndarray:
        return values(scorer.forward(scorer.preprocess(varied))).std(axis=0)

    assert spread(generations).min() > 0.05
    assert spread([dataclasses.replace(g, prompt="a cat") for g in generations]).min() > 0.05
    assert spread([dataclasses.replace(g, image=generations[0].image) for g in generations]).min() > 0.01


def test_perspectives_differ_and_can_be_chosen(scorer: LlavaRewardScorer, generations: list[Generation]) -> None:
    prepared = scorer.preprocess(generations[:4])
    every = scorer.forward(prepared)
    one = scorer.forward(prepared, [Perspective.SAFETY])
    assert [set(output.values) for output in one] == [{Perspective.SAFETY}] * 4
    for full, single in zip(every, one, strict=True):
        assert single.values[Perspective.SAFETY] == full.values[Perspective.SAFETY]
        assert len(set(full.values.values())) == len(PERSPECTIVES)


def test_bfloat16_stays_near_float32(scorer: LlavaRewardScorer, generations: list[Generation]) -> None:
    coarse = load("demo", dtype="bfloat16")
    prepared = scorer.preprocess(generations)
    fine = values(scorer.forward(prepared))
    near = [same_within("bfloat16", spread) for spread in fine.std(axis=0).flat]
    assert (np.abs(values(coarse.forward(prepared)) - fine).max(axis=0).ravel() < near).all()
    coarse.check_golden()


def test_non_finite_reward_is_an_error_of_its_row(generations: list[Generation]) -> None:
    broken = LlavaRewardScorer(DEMO)
    with torch.no_grad():
        broken._network.branches["safety"].get_submodule("value_head").weight.fill_(torch.inf)
    for record in broken.score(generations[:2]):
        assert record.error is not None
        assert (record.error.code, record.error.stage) == (ErrorCode.NON_FINITE_REWARD, Stage.SCORE)
        assert "safety" in record.error.message
        assert not record.rewards
    assert all(r.error is None for r in broken.score(generations[:2], [Perspective.OVERALL]))


# --- general-preference checkpoints ---


@pytest.fixture(scope="module")
def gpm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a two-row alignment head."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("gpm") / "gpm")
    head = torch.load(folder / "alignment" / "pytorch_model.bin", weights_only=True)
    head["value_head.weight"] = head["value_head.weight"] * torch.tensor([[1.0], [-2.0]])
    torch.save(head, folder / "alignment" / "pytorch_model.bin")
    config = {
        "add_cross_attention": True,
        "general_preference_tau": 0.1,
        "is_general_preference": True,
        "value_head_dim": 2,
    }
    (folder / "alignment" / "reward_config.yaml").write_text(yaml.safe_dump(config))
    values = json.loads((folder / "scorer.json").read_text())
    del values["head_training"]["alignment"]  # it gives no scalar that a loss could be named for
    (folder / "scorer.json").write_text(json.dumps(values))
    return folder


def test_general_preference_gives_vectors(
    gpm_folder: Path, scorer: LlavaRewardScorer, generations: list[Generation]
) -> None:
    gpm = load(gpm_folder)
    assert gpm.identity.vector_perspectives == (Perspective.ALIGNMENT,)
    for vector, scalar in zip(gpm.score(generations[:3]), scorer.score(generations[:3]), strict=True):
        assert set(vector.rewards) == set(PERSPECTIVES) - {Perspective.ALIGNMENT}
        reward = scalar.rewards[Perspective.ALIGNMENT]
        assert vector.reward_vectors[Perspective.ALIGNMENT] == pytest.approx((reward, -2 * reward), abs=1e-4)


def test_heads_say_what_scorer_json_and_the_yaml_say(gpm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpm_folder, tmp_path / "copy")
    values = json.loads((folder / "scorer.json").read_text())
    (folder / "scorer.json").write_text(json.dumps({**values, "head_training": {"safety": "cls"}}))
    scorer = load(folder)
    alignment, safety = scorer.heads[Perspective.ALIGNMENT], scorer.heads[Perspective.SAFETY]
    assert (alignment.is_general_preference, alignment.training, alignment.tau) == (True, None, 0.1)
    assert (safety.is_general_preference, safety.training, safety.tau) == (False, HeadTraining.CLS, 0.1)
    assert scorer.heads[Perspective.OVERALL].training is None
    image = (DEMO / "golden" / "0.png").read_bytes()
    ranking = scorer.rank("a red ball", [image, image], Perspective.ALIGNMENT)
    assert [one.rank for one in ranking.ranked] == [1, 1]
    for given, message in (
        ({"safety": "rl"}, "must give"),
        ({"beauty": "bt"}, "must give"),
        ({"safety": ["bt"]}, "must give"),
        ({"alignment": "bt"}, "gives no scalar"),
    ):
        (folder / "scorer.json").write_text(json.dumps({**values, "head_training": given}))
        with pytest.raises(ConfigError, match=message):
            load(folder)


def test_golden_of_another_head_is_refused(gpm_folder: Path) -> None:
    with pytest.raises(InfrastructureError, match="alignment: expected"):
        load(gpm_folder).check_golden()


def test_heads_by_hand() -> None:
    # (1, 2) x (3, 5): 1*5 - 2*3 = -1; sigmoid(-1/0.5) = 0.119203
    assert gpm_score((1, 2), (3, 5)) == -1
    assert gpm_score((1, 2, 1, 0), (3, 5, 0, 4)) == -1 + 4
    assert preference_probability((1, 2), (3, 5), 0.5) == pytest.approx(0.1192029, abs=1e-6)
    # sigmoid((0.3 - 0.1)/0.1) = sigmoid(2) = 0.880797
    assert preference_probability((0.3,), (0.1,), 0.1) == pytest.approx(0.8807971, abs=1e-6)
    assert preference_probability((1e4,), (-1e4,), 0.1) == 1.0
    assert preference_probability((-1e4,), (1e4,), 0.1) == 0.0
    assert safe_probability(0.0) == 0.5
    with pytest.raises(ValueError, match="even length"):
        gpm_score((1, 2, 3), (1, 2, 3))


# --- identity ---


def test_identity_without_weights_equals_the_loaded_one(scorer: LlavaRewardScorer) -> None:
    assert read_identity("demo") == scorer.identity
    assert read_identity(DEMO, dtype="bfloat16").dtype == "bfloat16"
    assert scorer.identity.is_trained
    for checkpoint in scorer.identity.checkpoints.values():
        name, digest = checkpoint.split("@sha256:")
        assert (name, len(digest)) == ("demo", 64)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_hashes_follow_the_weights_they_depend_on(tmp_path: Path) -> None:
    before = read_identity("demo").checkpoints
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    assert read_identity(copy).checkpoints == before
    _flip_last_byte(copy / "safety" / "lora" / "adapter_model.bin")
    after = read_identity(copy).checkpoints
    assert {p for p in PERSPECTIVES if after[p] != before[p]} == {Perspective.SAFETY}
    _flip_last_byte(copy / "backbone" / "model.safetensors")
    assert all(read_identity(copy).checkpoints[p] != before[p] for p in PERSPECTIVES)


def test_unknown_perspective_and_device(scorer: LlavaRewardScorer) -> None:
    with pytest.raises(ConfigError, match="beauty"):
        scorer.forward([], ["beauty"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="device='nowhere'"):
        load("demo", device="nowhere")
