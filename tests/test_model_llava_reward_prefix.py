"""Many captions of one picture: the reward of each alone, the picture computed once, and never the wrong one."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.errors import ConfigError
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.prefix import Joined, runs_of
from model.llava_reward.backbones.qwen import mrope_positions
from model.llava_reward.checkpoint import load_network
from model.llava_reward.network import RewardNetwork
from model.llava_reward.scorer import LlavaRewardScorer
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import RawOutput, load, resolve
from tests.llava_reward_bundles import GOLDEN, write_bundle
from tests.llava_reward_cases import BATCH_TOLERANCE, FAMILIES, read_inputs

torch.set_num_threads(2)

# Without SkipCA and with it, one projector each; two heads of different size.
VARIANTS = {"phi3v": ("bt_plain", "bt_skipca"), "qwen": ("gpm_plain", "bt_skipca"), "llava": ("bt_plain", "gpm_plain")}
ADAPTERS = {"qwen": ("bt_plain", "bt_skipca"), "llava": ("bt_plain", "gpm_plain")}
P = (Perspective.ALIGNMENT, Perspective.SAFETY)
TOWER_INPUT = {"phi3v": "crops", "qwen": "patches", "llava": "tiles"}


# --- the network ---


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def network(family: str) -> RewardNetwork:
    folder = GOLDEN / family
    return load_network(
        folder / "backbone",
        {p: folder / variant / "adapter" for p, variant in zip(P, VARIANTS[family], strict=True)},
        device=torch.device("cpu"),
        dtype=torch.float32,
        family=family,
        skip_ca_keys="image_tokens" if family == "qwen" else None,
    )


def caption(sample: Any, seed: int, length: int) -> Any:
    """The sample with other words behind its picture, and the same end token."""
    before = int((sample.input_ids < 0).nonzero()[-1]) + 1
    words = torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(sample, input_ids=torch.cat((sample.input_ids[:before], words, sample.input_ids[-1:])))


def apart(sample: Any, family: str) -> Any:
    """The same sample with a tensor of its own for its picture."""
    name = TOWER_INPUT[family]
    return dataclasses.replace(sample, **{name: getattr(sample, name).clone()})


@torch.inference_mode()
def rewards(network: RewardNetwork, batch: list[Any]) -> Tensor:
    return torch.cat([values for _, values in sorted(network(batch, P).items())], dim=1)


@pytest.fixture(scope="module")
def mixture(family: str) -> list[Any]:
    """Captions of 1 to 700 words of three pictures, in no order; the last picture has one caption."""
    first, second, *_, third = read_inputs(GOLDEN / family, family)
    made = [caption(first, i, n) for i, n in enumerate((3, 1, 40, 12))]
    made += [caption(second, i, n) for i, n in enumerate((8, 20, 700))]
    made.append(caption(third, 9, 5))
    return [made[i] for i in (4, 0, 7, 2, 6, 1, 5, 3)]


def test_captions_of_one_picture_have_their_rewards_alone(
    network: RewardNetwork, family: str, mixture: list[Any]
) -> None:
    alone = torch.cat([rewards(network, [item]) for item in mixture])
    together = rewards(network, mixture)
    assert (together - alone).abs().max() <= BATCH_TOLERANCE
    assert (rewards(network, [apart(item, family) for item in mixture]) - alone).abs().max() <= BATCH_TOLERANCE
    assert rewards(network, mixture[::-1]).flip(0).sub(alone).abs().max() <= BATCH_TOLERANCE
    assert alone.std(0).min() > 0.01  # rewards that all captions share would pass the above


def through(network: RewardNetwork, perspective: Perspective, shared: Any) -> Tensor:
    """Rewards of a batch after the tower, with gradients."""
    branch = network.branch(perspective)
    tokens = network.backbone.project(branch.model, shared)
    rewarded: Tensor = branch(network.backbone.end_state(branch.model, shared, tokens))
    return rewarded


def test_batches_joined_after_the_tower_have_their_rewards(network: RewardNetwork, mixture: list[Any]) -> None:
    with torch.inference_mode():
        parts = [network.backbone.share(network.vision, part) for part in (mixture[:3], mixture[3:4], mixture[4:])]
        joined = network.backbone.join(parts)
        for perspective in P:
            alone = torch.cat([network([item], P)[perspective] for item in mixture])
            assert (through(network, perspective, joined) - alone).abs().max() <= BATCH_TOLERANCE


def test_gradients_of_captions_that_share_a_picture_are_those_of_each_alone(
    network: RewardNetwork, mixture: list[Any]
) -> None:
    """The projector's: they pass through every layer, and through what the captions compute together."""
    batch = [item for item in mixture if len(item.input_ids) < 500]
    path = network.backbone.names.projector.removesuffix(".")
    parameters = list(network.branch(P[1]).get_submodule(path).requires_grad_(True).parameters())

    def gradients(items: list[Any]) -> list[Tensor]:
        rewarded = through(network, P[1], network.backbone.share(network.vision, items))
        return [*torch.autograd.grad(rewarded.sum(), parameters)]

    together = gradients(batch)
    alone = [sum(parts) for parts in zip(*(gradients([item]) for item in batch), strict=True)]
    network.requires_grad_(False)
    for one, other in zip(together, alone, strict=True):
        assert isinstance(other, Tensor)
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_tokens_before_the_captions_run_once(network: RewardNetwork, family: str, mixture: list[Any]) -> None:
    """Every MLP but the last sees each token once; the last sees end tokens alone."""
    ids = [item.input_ids for item in mixture]
    before = [int((one < 0).nonzero()[-1]) + 1 for one in ids]
    groups = {(1, 3, 5, 7), (0, 4, 6), (2,)}  # rows of the mixture, by picture
    wanted = sum(before[rows[0]] + sum(len(ids[r]) - before[r] for r in rows) for rows in groups)
    for perspective in P:
        path = network.backbone.names.layers.removesuffix(".")
        layers: Any = network.branch(perspective).get_submodule(path)
        with counted(layers[0].mlp) as first, counted(layers[-1].mlp) as last, torch.inference_mode():
            network(mixture, [perspective])
        assert sum(shape[0] * shape[1] for shape in first) == wanted
        assert sum(shape[0] * shape[1] for shape in last) == len(mixture)


def test_a_wrong_picture_is_noticed(network: RewardNetwork, family: str, mixture: list[Any]) -> None:
    """What the comparisons above would show if captions were given another picture's tokens."""
    name = TOWER_INPUT[family]
    pictures = {getattr(item, name).shape: getattr(item, name) for item in mixture}
    swapped = [dataclasses.replace(item, **{name: pictures[getattr(item, name).shape].flip(0)}) for item in mixture]
    moved = (rewards(network, mixture) - rewards(network, swapped)).abs()
    assert moved.max(0).values.min() > 100 * BATCH_TOLERANCE


@contextmanager
def counted(module: nn.Module) -> Iterator[list[torch.Size]]:
    """Shapes of the first argument of every real call."""
    calls: list[torch.Size] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    try:
        yield calls
    finally:
        handle.remove()


# --- sequences ---


def test_positions_and_blocks_by_hand() -> None:
    # Two tokens stand before captions of 2, 1 and 600 tokens; blocks end at 512 tokens or with the caption.
    ids = [torch.tensor([7, -1, *range(n)]) for n in (2, 1, 600)]
    (run,) = runs_of(ids, Pictures.of([None] * 3))
    layout = run.layout
    assert isinstance(layout, Joined)
    assert run.input_ids[0, :5].tolist() == [7, -1, 0, 1, 0]
    assert run.positions[0, :7].tolist() == [0, 1, 2, 3, 2, 2, 3]
    assert (layout.before, layout.ends.tolist(), run.lengths.tolist()) == (2, [3, 4, 604], [602])
    assert [(block.start, block.stop) for block in layout.blocks] == [(2, 5), (5, 605)]
    assert layout.blocks[0].mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert layout.key_mask()[:, :6].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]


def test_only_equal_starts_and_rotary_forms_are_joined() -> None:
    one = object()
    ids = [torch.tensor(values) for values in ([1, -1, 2], [3, -1, 2], [1, -1, 4, 5, 6], [1, -1, 4], [1, -1, 2])]
    runs = runs_of(ids, Pictures.of([one, one, one, one, object()]), lambda length: length > 4)
    assert [list(run.rows) for run in runs] == [[1, 2, 4], [0, 3]]


@pytest.mark.parametrize("lengths", [(30, 9), (9, 30)])
def test_qwen_positions_of_joined_captions(lengths: tuple[int, int], tmp_path: Path) -> None:
    folder = GOLDEN / "qwen"
    sample = read_inputs(folder, "qwen")[0]
    batch = [caption(sample, i, n) for i, n in enumerate(lengths)]
    network = load_network(
        folder / "backbone", {P[0]: folder / "bt_plain" / "adapter"}, device=torch.device("cpu"), dtype=torch.float32,
        family="qwen",
    )  # fmt: skip
    with torch.inference_mode():
        ((run, positions),) = network.backbone.share(network.vision, batch).runs
    rows, columns = (side // 2 for side in sample.grid)
    for row, end in zip(run.rows, run.layout.ends.tolist(), strict=True):  # type: ignore[attr-defined]
        own = mrope_positions(batch[row].input_ids, rows, columns)
        words = lengths[row] + 1
        assert torch.equal(positions[:, 0, end + 1 - words : end + 1], own[:, -words:])


# --- the scorer ---


@pytest.fixture(scope="module", params=["demo", "qwen", "llava"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaRewardScorer:
    if request.param == "demo":
        return LlavaRewardScorer(resolve("demo"))
    adapters = dict(zip(("alignment", "safety"), ADAPTERS[request.param], strict=True))
    folder = tmp_path_factory.mktemp("prefix") / request.param
    return LlavaRewardScorer(write_bundle(folder, request.param, adapters))


def png(changed: int = 0) -> bytes:
    """A picture of 224x112, which ``changed`` moves by one value at one place."""
    pixels = np.random.default_rng(5).integers(0, 256, (112, 224, 3), dtype=np.uint8)
    pixels[50, 60, 1] ^= changed
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


CAPTIONS = ("a red ball", "", "blue " * 60, "a red ball", "two cubes on a table")


def generations(count: int = 2) -> list[Generation]:
    """Each caption of each of ``count`` pictures that hardly differ, pictures alternating."""
    return [Generation(f"{c}-{i}", text, png(255 * i)) for c, text in enumerate(CAPTIONS) for i in range(count)]


def values(outputs: list[RawOutput]) -> np.ndarray:
    return np.array([[x for _, row in sorted(output.values.items()) for x in row] for output in outputs])


def test_the_scorer_groups_what_shows_one_picture(scorer: LlavaRewardScorer) -> None:
    prepared = scorer.preprocess(generations())
    alone = values([scorer.forward([item])[0] for item in prepared])
    together = scorer.forward(prepared)
    assert np.abs(values(together) - alone).max() <= BATCH_TOLERANCE
    assert [output.generation_id for output in together] == [item.generation_id for item in prepared]
    # The two pictures' rewards differ by more than the tolerance, so a mix-up would show.
    assert np.abs(alone[::2] - alone[1::2]).max() > 10 * BATCH_TOLERANCE


def test_the_tower_sees_each_picture_once(scorer: LlavaRewardScorer) -> None:
    prepared = scorer.preprocess(generations())
    tower = getattr(scorer._network.vision, "img_processor", scorer._network.vision)  # phi3v: behind its list of crops
    tower = getattr(tower, "vision_model", tower)
    with counted(tower) as one:
        scorer.forward(prepared[:1])
    with counted(tower) as all_of_them:
        scorer.forward(prepared)
    assert len(all_of_them) == len(one) == 1
    assert all_of_them[0][0] == 2 * one[0][0]


def test_equal_generations_are_computed_once(scorer: LlavaRewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = scorer.preprocess(generations())  # captions 0 and 3 are the same
    seen = []
    prefix_of = scorer._network.backbone.prefix_of
    monkeypatch.setattr(scorer._network.backbone, "prefix_of", lambda arrays: seen.append(1) or prefix_of(arrays))
    outputs = scorer.forward(prepared)
    assert len(seen) == 8
    assert outputs[0].values == outputs[6].values
    assert outputs[1].values == outputs[7].values
    assert outputs[0].values != outputs[1].values


def test_long_captions_have_their_own_rotary_form(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("demo"), tmp_path / "demo")
    path = folder / "backbone" / "config.json"
    config = json.loads(path.read_text())
    config["original_max_position_embeddings"] = 120  # about 60 stand before the captions; some are beyond it
    path.write_text(json.dumps(config))
    scorer = LlavaRewardScorer(folder)
    texts = ("a", "blue", "red " * 80, "", "green " * 90, "two " * 100)
    prepared = scorer.preprocess([Generation(str(i), text, png()) for i, text in enumerate(texts)])
    lengths = [len(item.arrays["input_ids"]) for item in prepared]
    assert sum(length > 120 for length in lengths) == 3
    assert len({scorer._network.backbone.prefix_of(item.arrays).key for item in prepared}) == 2
    alone = values([scorer.forward([item])[0] for item in prepared])
    assert np.abs(values(scorer.forward(prepared)) - alone).max() <= BATCH_TOLERANCE


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "qwen", "qwen", {"safety": "bt_plain"})
    path = folder / "backbone" / "config.json"
    config = json.loads(path.read_text())
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    path.write_text(json.dumps({**config, **window}))
    with pytest.raises(ConfigError, match="sliding_window=64 is not supported"):
        load(folder)
