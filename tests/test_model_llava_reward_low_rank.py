"""LoRA beside one shared language model: the rewards of merged LoRA, in the memory of one language model."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.errors import ConfigError
from model.identity import same_within
from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.checkpoint import load_network
from model.llava_reward.lora import LoraPair
from model.llava_reward.low_rank import LowRankLinear, Selection, put_beside
from model.llava_reward.network import RewardNetwork
from model.llava_reward.scorer import LlavaRewardScorer
from model.perspectives import PERSPECTIVES, Perspective
from model.scenes import draw
from model.schema import Generation
from model.scorer import RawOutput, load, resolve
from tests.llava_reward_bundles import GOLDEN
from tests.llava_reward_cases import BATCH_TOLERANCE, FAMILIES, read_inputs

torch.set_num_threads(1)

DEMO = resolve("demo")
FULL, NARROW, PARTLY = Perspective.ALIGNMENT, Perspective.SAFETY, Perspective.OVERALL
VARIANTS = {
    "phi3v": ("bt_skipca", "gpm_plain", "bt_plain"),
    "qwen": ("bt_skipca", "gpm_plain", "bt_plain"),
    "llava": ("bt_plain", "gpm_plain", "bt_plain"),
}
PART = {"phi3v": "qkv_proj", "qwen": "k_proj", "llava": "k_proj"}  # the one module that an adapter changes
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


# --- the projection, by hand ---

A, B = Perspective.ALIGNMENT, Perspective.SAFETY


@pytest.fixture
def projection() -> tuple[LowRankLinear, Selection]:
    """W = [[1, 2], [3, 4], [5, 6]] with bias [0, 0, 1]; A adds 2 * [1, 0, 1]^T [1, 1], B adds nothing."""
    base = nn.Linear(2, 3)
    base.load_state_dict({"weight": torch.tensor([[1.0, 2], [3, 4], [5, 6]]), "bias": torch.tensor([0.0, 0, 1])})
    model = nn.ModuleDict({"layer": base})
    pair = LoraPair(a=torch.tensor([[1.0, 1]]), b=torch.tensor([[1.0], [0], [1]]), scale=2.0)
    selection = put_beside(model, {A: {"layer": pair}, B: {}})
    layer = model["layer"]
    assert isinstance(layer, LowRankLinear)
    return layer, selection


def test_each_group_gets_its_own_update(projection: tuple[LowRankLinear, Selection]) -> None:
    layer, selection = projection
    # Plain: [1 + 2, 3 + 4, 5 + 6 + 1] = [3, 7, 12]; A adds 2 * (1 + 1) = 4 to the first and the last.
    with_a, plain = [7.0, 7, 16], [3.0, 7, 12]
    for chosen, expected in (
        ([A, B], [with_a, plain]),
        ([B, A], [plain, with_a]),
        ([B], [plain, plain]),
        ([A, A], [with_a, with_a]),
    ):
        with selection.of(chosen):
            assert layer(torch.ones(2, 2)).tolist() == expected
            assert layer(torch.ones(2, 5, 2)).tolist() == [[row] * 5 for row in expected]
            assert output_rows(layer, torch.ones(2, 2), 1, 3).tolist() == [row[1:] for row in expected]


def test_rows_of_a_plain_projection() -> None:
    for bias in (True, False):
        plain = nn.Linear(4, 6, bias=bias)
        values = torch.randn(3, 2, 4)
        assert torch.allclose(output_rows(plain, values, 2, 5), plain(values)[..., 2:5], atol=1e-6)


def test_a_call_without_its_perspectives_is_refused(projection: tuple[LowRankLinear, Selection]) -> None:
    layer, selection = projection
    with pytest.raises(RuntimeError, match="no perspectives are chosen"):
        layer(torch.ones(2, 2))
    with selection.of([A]), pytest.raises(RuntimeError, match="another call is running"), selection.of([B]):
        pass
    with pytest.raises(RuntimeError, match="no perspectives are chosen"):  # the choice ended with its call
        layer(torch.ones(2, 2))
    with selection.of([A, B]), pytest.raises(ValueError, match="3 rows does not hold 2 groups"):
        layer(torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match="tuple"), selection.of([Perspective.OVERALL]):
        pass


def test_nothing_stands_in_for_the_weight(projection: tuple[LowRankLinear, Selection]) -> None:
    """Code that multiplied with ``.weight`` alone would forget the adapter."""
    layer, _ = projection
    assert not hasattr(layer, "weight")
    assert type(layer.base) is nn.Linear


# --- networks of each family; adapters of other ranks and with fewer targets ---


def _rewrite(adapter: Path, edit: Edit, **config: object) -> None:
    path, settings = adapter / "lora" / "adapter_model.bin", adapter / "lora" / "adapter_config.json"
    torch.save(edit(torch.load(path, weights_only=True)), path)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


def _first_three(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t[:3] if "lora_A" in n else t[:, :3]).clone() for n, t in tensors.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(family: str, tmp_path: Path) -> dict[Perspective, Path]:
    """One of rank 8, one of rank 3 with another scale, and one that changes a single module."""
    made = {
        p: Path(shutil.copytree(GOLDEN / family / variant / "adapter", tmp_path / p))
        for p, variant in zip((FULL, NARROW, PARTLY), VARIANTS[family], strict=True)
    }
    part = PART[family]
    _rewrite(made[NARROW], _first_three, r=3, lora_alpha=9)
    _rewrite(made[PARTLY], lambda t: {n: x for n, x in t.items() if f".{part}." in n}, target_modules=[part])
    return made


def read(family: str, adapters: dict[Perspective, Path], *, is_low_rank: bool) -> RewardNetwork:
    return load_network(
        GOLDEN / family / "backbone",
        adapters,
        device=torch.device("cpu"),
        dtype=torch.float32,
        family=family,
        is_low_rank=is_low_rank,
    )


@torch.inference_mode()
def largest_difference(a: RewardNetwork, b: RewardNetwork, batch: list[object], chosen: Sequence[Perspective]) -> float:
    left, right = a(batch, chosen), b(batch, chosen)
    assert list(left) == list(right) == list(chosen)
    return max(float((left[p] - right[p]).abs().max()) for p in chosen)


def test_rewards_equal_those_of_merged_adapters(family: str, adapters: dict[Perspective, Path]) -> None:
    merged, low_rank = (read(family, adapters, is_low_rank=form) for form in (False, True))
    inputs = read_inputs(GOLDEN / family, family)[:3]
    assert largest_difference(merged, low_rank, inputs, list(adapters)) <= BATCH_TOLERANCE
    for count in (1, 2, 3):
        for chosen in itertools.permutations(adapters, count):
            assert largest_difference(merged, low_rank, inputs[1:2], chosen) <= BATCH_TOLERANCE
    assert low_rank(inputs, []) == {}


def test_adapters_do_differ(family: str, adapters: dict[Perspective, Path]) -> None:
    """Or the comparison would not see one adapter in the place of another."""
    network = read(family, adapters, is_low_rank=True)
    inputs = read_inputs(GOLDEN / family, family)
    first = network.branch(FULL).model
    with torch.inference_mode():
        shared = network.backbone.share(network.vision, inputs)
        tokens = network.backbone.project(first, shared)
        ends = [end.hidden for _, end in network._ends_together(shared, list(adapters), [tokens] * 3)]
    assert all(float((a - b).abs().max()) > 0.01 for a, b in itertools.combinations(ends, 2))


def storages(network: nn.Module, pattern: str = "") -> dict[int, int]:
    """Bytes by storage, of the tensors whose names hold ``pattern``."""
    tensors = {n: t for n, t in network.state_dict().items() if re.search(pattern, n)}
    return {t.untyped_storage().data_ptr(): t.nbytes for t in tensors.values()}


def test_one_language_model_serves_all(family: str, adapters: dict[Perspective, Path]) -> None:
    merged, low_rank = (read(family, adapters, is_low_rank=form) for form in (False, True))
    alone = read(family, {FULL: adapters[FULL]}, is_low_rank=False)
    weights = r"layers\.\d+\..*_proj(\.base)?\.weight$"
    one = sum(storages(alone, weights).values())
    assert sum(storages(low_rank, weights).values()) == one
    assert sum(storages(merged, weights).values()) > 2 * one
    layers = "model.layers" if family == "phi3v" else "model.language_model.layers"
    assert len({low_rank.branch(p).get_submodule(layers) for p in adapters}) == 1
    assert not any(parameter.requires_grad for parameter in low_rank.parameters())


def test_projectors_stay_with_their_perspectives(family: str, adapters: dict[Perspective, Path]) -> None:
    network = read(family, adapters, is_low_rank=True)
    path = network.backbone.names.projector.removesuffix(".")
    one, other = (network.branch(p).get_submodule(path) for p in (FULL, NARROW))
    assert one is not other
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_an_update_of_another_shape_is_refused_by_name(family: str, adapters: dict[Perspective, Path]) -> None:
    def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat((t, t), dim=1) if "lora_A" in n else t for n, t in tensors.items()}

    _rewrite(adapters[PARTLY], wider)
    with pytest.raises(ConfigError, match=rf"adapter_model.bin: .*{PART[family]}.weight needs .*, the backbone has"):
        read(family, adapters, is_low_rank=True)


@torch.inference_mode()
def test_captions_of_one_picture_share_their_start(tmp_path: Path) -> None:
    """Stacked perspectives and captions that share a picture do not mix: groups of both, and single samples."""
    adapters = {p: GOLDEN / "phi3v" / v / "adapter" for p, v in zip((FULL, NARROW), VARIANTS["phi3v"], strict=False)}
    network = read("phi3v", adapters, is_low_rank=True)
    first, second, *_ = read_inputs(GOLDEN / "phi3v", "phi3v")
    end = int((first.input_ids < 0).nonzero()[-1]) + 1
    shorter = type(first)(torch.cat((first.input_ids[:end], first.input_ids[-3:])), first.crops, first.grid)
    batch = [shorter, second, first]
    runs = [list(run.rows) for run, _ in network.backbone.share(network.vision, batch).runs]
    assert sorted(runs) == [[0, 2], [1]]
    for chosen in ([FULL, NARROW], [NARROW, FULL], [NARROW]):
        together = network(batch, chosen)
        for row, sample in enumerate(batch):
            alone = network([sample], chosen)
            for p in chosen:
                assert (together[p][row] - alone[p][0]).abs().max() <= BATCH_TOLERANCE


# --- the scorer ---


@pytest.fixture(scope="module")
def generations() -> list[Generation]:
    images = [(DEMO / "golden" / f"{i}.png").read_bytes() for i in range(3)]
    prompts = ("a red circle above a blue square", "", "two green birds " * 8)
    return [Generation(f"g{i}", prompts[i // 3], images[i % 3]) for i in range(9)]


def png(size: tuple[int, int]) -> bytes:
    return png_of(Image.new("RGB", size, (200, 80, size[0])))


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def values(outputs: list[RawOutput], chosen: Sequence[Perspective] = PERSPECTIVES) -> np.ndarray:
    return np.array([[output.values[p] for p in chosen] for output in outputs])


def test_scorer_gives_the_same_rewards_in_either_form(generations: list[Generation]) -> None:
    merged, low_rank = (load("demo", adapters=form) for form in ("merged", "low_rank"))
    assert merged.identity == low_rank.identity
    assert merged.placement.startswith("merged: as set")
    assert low_rank.placement.startswith("low_rank: as set")
    prepared = merged.preprocess(generations)
    assert np.abs(values(merged.forward(prepared)) - values(low_rank.forward(prepared))).max() <= BATCH_TOLERANCE
    chosen = [Perspective.OVERALL, Perspective.FIDELITY]
    one, other = (values(scorer.forward(prepared, chosen), chosen) for scorer in (merged, low_rank))
    assert np.abs(one - other).max() <= BATCH_TOLERANCE
    low_rank.check_golden()


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 2000])
def test_passes_count_each_sample_once_per_perspective(generations: list[Generation], max_batch_tokens: int) -> None:
    # A picture each: captions of one picture would share a row.
    generations = [replace(g, image=png((40 + 16 * i, 64))) for i, g in enumerate(generations)]
    scorer = LlavaRewardScorer(DEMO, adapters="low_rank", max_batch_tokens=max_batch_tokens)
    seen: list[tuple[int, ...]] = []
    norm = scorer._network.get_submodule("branches.alignment.model.layers.0.input_layernorm")
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape[:2])))
    prepared = scorer.preprocess(generations)
    for chosen in (PERSPECTIVES, (Perspective.SAFETY,)):
        seen.clear()
        scorer.forward(prepared, chosen)
        assert sum(rows for rows, _ in seen) == len(prepared) * len(chosen)
        for rows, length in seen:
            assert rows == len(chosen) or rows * length <= max_batch_tokens


def test_bfloat16_stays_as_near_to_float32_in_either_form(generations: list[Generation]) -> None:
    fine = load("demo")
    prepared = fine.preprocess(generations)
    expected = values(fine.forward(prepared))
    # How far rewards spread where some scenes are flawed; those above are all alike in that.
    scenes = [draw(seed, size=(256, 256)) for seed in range(24)]
    unlike = [Generation(str(scene.seed), scene.prompt, png_of(scene.image)) for scene in scenes]
    spreads = list(values(fine.forward(fine.preprocess(unlike))).std(axis=0).flat)
    for form in ("merged", "low_rank"):
        coarse = load("demo", dtype="bfloat16", adapters=form)
        near = [same_within("bfloat16", spread) for spread in spreads]
        assert (np.abs(values(coarse.forward(prepared)) - expected).max(axis=0).ravel() < near).all()
        coarse.check_golden()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapters='both' is not known, expected one of .'auto', 'merged'"):
        load("demo", adapters="both")
