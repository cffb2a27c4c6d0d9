"""The speed benchmark counts the work that it says, and both of its ways give the same rewards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.llava_reward.config import ClipConfig
from model.perspectives import Perspective
from tests.benchmarks.adapter_forms import held_bytes, low_rank
from tests.benchmarks.reward_flops import flops_ours, flops_straightforward
from tests.benchmarks.reward_models import SCALES, STEPS, Built, build, make_sample, rewards_by_steps
from tests.benchmarks.reward_speed import one_by_one
from tests.benchmarks.reward_timing import largest_difference, ours
from tests.llava_reward_cases import BATCH_TOLERANCE

torch.set_num_threads(2)

CPU, WANTED = torch.device("cpu"), list(Perspective)
# Two layers, and crops of 28 pixels that take one image token each instead of 144.
TINY = dataclasses.replace(
    SCALES["cpu"],
    config=dataclasses.replace(SCALES["cpu"].config, num_hidden_layers=2),
    clip=ClipConfig(32, 64, 3, 2, 28, 14, 1e-5),
)


@pytest.fixture(scope="module")
def built() -> Built:
    return build(TINY, WANTED, CPU)


@pytest.mark.parametrize(("crops", "tokens", "plain", "four"), [(17, 2509, 27.4, 83.8), (13, 1921, 22.3, 63.7)])
def test_full_size_work_is_the_known_one(crops: int, tokens: int, plain: float, four: float) -> None:
    """TFLOP. At 768x512: the tower 4.76 once, four times 19.5 - 4.76 = 14.74, in all 63.7."""
    length = tokens + 45
    assert sum(flops_straightforward(SCALES["full"], tokens, length).values()) / 1e12 == pytest.approx(plain, rel=0.02)
    assert sum(flops_ours(SCALES["full"], crops, tokens, length, 4).values()) / 1e12 == pytest.approx(four, rel=0.02)


def test_cpu_scale_keeps_the_share_of_the_tower() -> None:
    parts = flops_straightforward(SCALES["cpu"], 2509, 2554)
    language = parts["LM linear"] + parts["LoRA"] + parts["LM attention"]
    assert language / parts["tower"] == pytest.approx(3.4, rel=0.05)


@pytest.mark.parametrize(("size", "crops", "tokens"), [((1024, 1024), 17, 2509), ((768, 512), 13, 1921)])
def test_samples_have_the_real_counts(size: tuple[int, int], crops: int, tokens: int) -> None:
    sample = make_sample(Built(SCALES["cpu"], None, {}), *size, CPU, 0)  # type: ignore[arg-type]
    assert (len(sample.crops), int((sample.input_ids < 0).sum())) == (crops, tokens)


@torch.inference_mode()
def test_all_ways_give_the_same_rewards(built: Built) -> None:
    samples = [make_sample(built, *size, CPU, seed) for seed, size in enumerate([(64, 64), (90, 60), (40, 300)])]
    expected = one_by_one(built, samples, WANTED, ())
    assert len({float(values[0]) for values in expected.values()}) == len(WANTED)
    for batch in (1, 3):
        assert largest_difference(ours(built, samples, WANTED, batch), expected) <= BATCH_TOLERANCE
    for count in range(1, len(STEPS) + 1):
        assert largest_difference(one_by_one(built, samples, WANTED, STEPS[:count]), expected) <= BATCH_TOLERANCE


@torch.inference_mode()
def test_a_step_less_changes_the_work(built: Built) -> None:
    """The straightforward way really runs every slot, once per perspective."""
    seen: list[int] = []
    tower = built.network.vision.get_submodule("img_processor.vision_model")
    hook = tower.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    sample = make_sample(built, 90, 60, CPU, 0)
    rewards_by_steps(built, sample, WANTED, ())
    rewards_by_steps(built, sample, WANTED, STEPS)
    hook.remove()
    assert seen == [17] * 4 + [13]


@torch.inference_mode()
def test_both_forms_of_adapters_give_the_same_rewards(built: Built) -> None:
    samples = [make_sample(built, *size, CPU, seed) for seed, size in enumerate([(64, 64), (90, 60)])]
    beside = low_rank(built)
    assert beside.is_low_rank
    assert largest_difference(built.network(samples, WANTED), beside(samples, WANTED)) <= BATCH_TOLERANCE
    assert held_bytes(beside) < held_bytes(built.network)
