"""Projections in eight bits: their error against float, and rewards through the whole scorer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.errors import ConfigError, ErrorCode
from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.checkpoint import load_network
from model.llava_reward.network import RewardNetwork
from model.llava_reward.quantized import EightBitLinear, quantize, round_rows
from model.llava_reward.scorer import LlavaRewardScorer
from model.modes import FP8, INT8
from model.perspectives import PERSPECTIVES, Perspective
from model.schema import Generation
from model.scorer import Prepared, load, resolve
from tests.llava_reward_bundles import write_bundle
from tests.test_model_llava_reward_processor import png

torch.set_num_threads(2)

FORMATS = [torch.int8, torch.float8_e4m3fn]
# Rewards of the demo checkpoint spread by 0.4 to 0.5; over 1,200 inputs int8 was 0.09 off at most.
NEAR = 0.25
SIZES = [(300, 300), (120, 400), (64, 48), (500, 220), (256, 256), (90, 90)]
GENERATIONS = [Generation(str(i), f"a red ball {'and a cube ' * i}", png(*size)) for i, size in enumerate(SIZES)]


def layer(inputs: int = 96, outputs: int = 48, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def tokens(rows: int = 37, width: int = 96) -> Tensor:
    """Rows of very different size, as after a norm with a few large channels."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    values[:, 3] *= 20
    return values * torch.logspace(-4, 4, rows)[:, None]


def error_bound(values: Tensor, weight: Tensor, eight_bits: torch.dtype) -> Tensor:
    """Worst case of |sum (x + dx)(w + dw) - sum x w| = sum |x||dw| + |w||dx| + |dx||dw|, ``(r, o)``.

    int8: an entry is off by half a step at most, and a step is the row's largest / 127. float8 e4m3: by half a unit
    of 4 significant bits, 1/16 of itself, or below its normal range by 2^-10 of what the scale brings to 1; its
    product is bfloat16, off by 1/256.
    """

    def off(rows: Tensor) -> Tensor:
        largest = rows.abs().amax(-1, keepdim=True)
        if eight_bits is torch.int8:
            return (largest / 127 / 2).expand_as(rows)
        return rows.abs() / 16 + largest / 448 * 2**-10

    dx, dw, x, w = off(values), off(weight), values.abs(), weight.abs()
    bound = x @ dw.T + dx @ w.T + dx @ dw.T
    return bound if eight_bits is torch.int8 else bound + ((x @ w.T) + bound) / 256


@pytest.mark.parametrize("eight_bits", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_no_output_is_further_off_than_rounding_explains(eight_bits: torch.dtype, has_bias: bool) -> None:
    linear, values = layer(bias=has_bias), tokens()
    off = (EightBitLinear(linear, eight_bits)(values) - linear(values)).abs()
    assert bool((off <= 1.001 * error_bound(values, linear.weight, eight_bits) + 1e-6).all())
    # and typically far less: errors of 96 terms add up like noise
    assert float((off / linear(values).abs().amax(-1, keepdim=True)).mean()) < 0.02


@pytest.mark.parametrize("eight_bits", FORMATS)
@torch.inference_mode()
def test_a_token_depends_on_no_other(eight_bits: torch.dtype) -> None:
    linear, values = EightBitLinear(layer(), eight_bits), tokens()
    whole = linear(values)
    assert torch.equal(torch.cat([linear(row[None]) for row in values]), whole)
    assert torch.equal(linear(values.view(1, 37, 96))[0], whole)


@pytest.mark.parametrize("eight_bits", FORMATS)
@torch.inference_mode()
def test_part_of_the_outputs(eight_bits: torch.dtype) -> None:
    values = tokens()
    for linear in (layer(bias=True), EightBitLinear(layer(bias=True), eight_bits)):
        whole = linear(values)
        for start, stop in ((0, 16), (16, whole.shape[-1])):
            part = output_rows(linear, values, start, stop)
            assert torch.allclose(part, whole[..., start:stop], rtol=1e-5, atol=1e-5)


def test_rounding_uses_the_whole_range_and_loses_nothing_that_is_not_finite() -> None:
    values = torch.tensor([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 0.0], [1.0, float("inf"), 0.0]])
    rounded, scales = round_rows(values, torch.int8)
    assert rounded[0].tolist() == [64, -127, 0]  # 0.5 * 127 = 63.5, to even
    assert rounded[1].tolist() == [0, 0, 0]
    assert scales[:, 0].isfinite().tolist() == [True, True, False, False]
    assert float(round_rows(values[:1], torch.float8_e4m3fn)[0].float()[0, 1]) == -448.0


def demo_network(dtype: torch.dtype = torch.float32) -> RewardNetwork:
    folder = resolve("demo")
    adapters = {p: folder / p for p in PERSPECTIVES}
    return load_network(folder / "backbone", adapters, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize("mode", [INT8, FP8])
def test_only_the_language_models_projections_are_rounded(mode: str) -> None:
    network = demo_network()
    linears = {name for name, module in network.named_modules() if type(module) is nn.Linear}
    quantize(network, mode)
    rounded = {name for name, module in network.named_modules() if isinstance(module, EightBitLinear)}
    expected = {
        f"branches.{p}.model.layers.{n}.{part}"
        for p in PERSPECTIVES
        for n in range(4)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert rounded == expected
    assert linears - rounded == {name for name, module in network.named_modules() if type(module) is nn.Linear}


def test_weights_that_perspectives_share_stay_shared() -> None:
    network = demo_network()
    first, second = (network.branch(p).get_submodule("model.layers.0.self_attn") for p in PERSPECTIVES[:2])
    second.o_proj.weight = nn.Parameter(first.o_proj.weight.data, requires_grad=False)
    quantize(network, INT8)
    assert second.o_proj is first.o_proj
    assert second.qkv_proj is not first.qkv_proj


def test_widths_that_no_kernel_takes_stay_as_they_are() -> None:
    network = demo_network()
    network.branch(PERSPECTIVES[0]).set_submodule("model.layers.0.mlp.down_proj", layer(100, 128))
    quantize(network, INT8)
    assert type(network.branch(PERSPECTIVES[0]).get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear


def rewards(scorer: LlavaRewardScorer, generations: list[Generation]) -> Tensor:
    records = scorer.score(generations)
    assert all(record.error is None for record in records)
    return torch.tensor([[record.rewards[p] for p in record.rewards] for record in records])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_from_file_to_reward(dtype: str) -> None:
    exact, int8 = load("demo", dtype=dtype), load("demo", dtype=dtype, mode=INT8)
    int8.check_golden()
    together = rewards(int8, GENERATIONS)
    assert 0 < float((together - rewards(exact, GENERATIONS)).abs().max()) < NEAR
    # Not 1e-5: where attention differs in the last digit between batches, a value may be rounded the other way.
    alone = torch.cat([rewards(int8, [one]) for one in GENERATIONS])
    torch.testing.assert_close(alone, together, atol=5e-2, rtol=0)
    assert torch.equal(rewards(int8, GENERATIONS), together)


def test_eight_bits_have_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded differs with the form, so memory must not choose it, and a choice against it is refused."""
    monkeypatch.setattr("model.llava_reward.adapter_form.free_bytes", lambda device: 1)
    assert load("demo").placement.startswith("low_rank: merged is over")
    assert load("demo", mode=INT8).placement.startswith("merged: as set")
    with pytest.raises(ConfigError, match="adapters='low_rank' does not go with mode='int8'"):
        load("demo", mode=INT8, adapters="low_rank")


@torch.inference_mode()
def test_fp8_arithmetic_gives_near_rewards() -> None:
    """On a CPU by hand: ``load`` refuses it there, because it is slow, not because it is wrong."""
    networks = [demo_network(torch.bfloat16), demo_network(torch.bfloat16)]
    quantize(networks[1], FP8)
    prepared = load("demo").preprocess(GENERATIONS)
    samples = [networks[0].backbone.sample(one.arrays, torch.device("cpu")) for one in prepared]
    exact, fp8 = (network(samples, list(PERSPECTIVES)) for network in networks)
    for perspective in PERSPECTIVES:
        assert 0 < float((fp8[perspective] - exact[perspective]).abs().max()) < 2 * NEAR


def test_a_reward_that_is_not_finite_stays_so() -> None:
    scorer = load("demo", mode=INT8)
    network = scorer._network  # type: ignore[attr-defined]
    network.branch(Perspective.SAFETY).model.embed_tokens.weight.data[:] = float("nan")
    [output] = scorer.forward(scorer.preprocess(GENERATIONS[:1]))
    assert output.error is not None
    assert output.error.code is ErrorCode.NON_FINITE_REWARD


@pytest.mark.parametrize(("family", "adapters"), [("qwen", {"safety": "bt_skipca"}), ("llava", {"safety": "bt_plain"})])
def test_int8_of_the_other_families(tmp_path: Path, family: str, adapters: dict[str, str]) -> None:
    folder = write_bundle(tmp_path / family, family, adapters)
    exact, int8 = LlavaRewardScorer(folder), LlavaRewardScorer(folder, mode=INT8)
    assert any(isinstance(module, EightBitLinear) for module in int8._network.modules())
    a, b = rewards(exact, GENERATIONS[:3]), rewards(int8, GENERATIONS[:3])
    assert 0 < float((a - b).abs().max()) < NEAR


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("mode", "dtype"), [(INT8, "float32"), (INT8, "bfloat16"), (FP8, "bfloat16")])
def test_modes_on_a_gpu(mode: str, dtype: str) -> None:
    exact = load("demo", device="cuda", dtype=dtype)
    scorer = load("demo", device="cuda", dtype=dtype, mode=mode)
    scorer.check_golden()
    empty: list[Prepared] = []
    assert scorer.forward(empty) == []
    for batch in (GENERATIONS, GENERATIONS[:1]):
        assert float((rewards(scorer, batch) - rewards(exact, batch)).abs().max()) < NEAR
