"""The reward of a sample is its own: whatever it is scored with, it is that of the sample alone.

All three families, batches of 1 to 32 that hypothesis draws: any order, repeated items, any mix of picture sizes and
prompt lengths, rows that cannot be scored in between, any perspectives, any size of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ConfigError, ErrorCode
from model.identity import same_within
from model.llava_reward.scorer import MAX_BATCH_TOKENS_CPU, LlavaRewardScorer
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import Prepared, resolve
from tests.batch_mix import BAD, PROMPTS, SIZES, mixed_generations, png, single_values, values_of
from tests.benchmarks.batch_invariance import moved, random_scores
from tests.llava_reward_bundles import ADAPTERS, write_bundle

# Prompts are bytes to the tiny tokenizers of the other families, so that theirs are three times as long.
COUNTS = {"demo": 40, "qwen": 14, "llava": 20}
MOST = 32
FLOAT32 = same_within("float32", 0.0)
BAD_CODES = (ErrorCode.IMAGE_NOT_AN_IMAGE, ErrorCode.IMAGE_TRUNCATED, ErrorCode.BAD_PROMPT)


@dataclass(frozen=True)
class Pool:
    """One scorer, its samples with the bad ones behind them, and the values of each good one alone."""

    scorer: LlavaRewardScorer
    prepared: list[Prepared]
    alone: np.ndarray
    columns: dict[Perspective, list[int]]

    def difference(self, chosen: list[int], perspectives: list[Perspective], max_batch_tokens: int) -> np.ndarray:
        """Of the good ones among the chosen, ``(samples, values)``; each bad one must come out as bad, in its place."""
        self.scorer._max_batch_tokens = max_batch_tokens
        outputs = self.scorer.forward([self.prepared[i] for i in chosen], perspectives)
        assert [output.generation_id for output in outputs] == [self.prepared[i].generation_id for i in chosen]
        assert [output.error for output in outputs] == [self.prepared[i].error for i in chosen]
        columns = [column for perspective in perspectives for column in self.columns[perspective]]
        good = [(i, output) for i, output in zip(chosen, outputs, strict=True) if i < len(self.alone)]
        return np.array([np.abs(values_of(output, perspectives) - self.alone[i, columns]) for i, output in good])


def make_pool(folder: Path, count: int, dtype: str = "float32") -> Pool:
    scorer = LlavaRewardScorer(folder, dtype=dtype)
    generations = mixed_generations(count)
    alone = single_values(scorer, generations)
    columns: dict[Perspective, list[int]] = {}
    for perspective in scorer.perspectives:
        width = 2 if perspective in scorer.identity.vector_perspectives else 1
        start = sum(map(len, columns.values()))
        columns[perspective] = list(range(start, start + width))
    assert alone.shape == (count, sum(map(len, columns.values())))
    assert alone.std(axis=0).min() > 0.2  # rewards that all inputs share would pass every test here
    return Pool(scorer, scorer.preprocess([*generations, *BAD]), alone, columns)


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {"demo": resolve("demo")}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = write_bundle(tmp_path_factory.mktemp("batches") / name, name, ADAPTERS[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="module")
def pools(bundle_of: Callable[[str], Path]) -> dict[str, Pool]:
    return {name: make_pool(bundle_of(name), count) for name, count in COUNTS.items()}


def test_the_pool_is_as_mixed_as_it_says(pools: dict[str, Pool]) -> None:
    generations = mixed_generations(min(COUNTS.values()))
    assert {g.prompt for g in generations} == set(PROMPTS)
    facts = [prepared.image for prepared in pools["demo"].prepared[: len(generations)]]
    assert {(image.width, image.height) for image in facts if image is not None} == set(SIZES)
    for name, pool in pools.items():
        lengths = [len(prepared.arrays["input_ids"]) for prepared in pool.prepared[: COUNTS[name]]]
        assert max(lengths) > 4 * min(lengths), name
        errors = [prepared.error for prepared in pool.prepared[COUNTS[name] :]]
        assert tuple(error.code for error in errors if error is not None) == BAD_CODES


def batches_of(name: str) -> st.SearchStrategy[list[int]]:
    """Of one to 32 with equal chance: lists alone would mostly be short."""
    indices = st.integers(0, COUNTS[name] + len(BAD) - 1)
    return st.integers(1, MOST).flatmap(lambda size: st.lists(indices, min_size=size, max_size=size))


def some_of(pool: Pool) -> st.SearchStrategy[list[Perspective]]:
    return st.lists(st.sampled_from(pool.scorer.perspectives), min_size=1, unique=True)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data(), batch=batches_of("demo"), max_batch_tokens=st.sampled_from([1, 600, MAX_BATCH_TOKENS_CPU]))
def test_any_batch_of_the_demo_gives_the_rewards_of_samples_alone(
    pools: dict[str, Pool], data: st.DataObject, batch: list[int], max_batch_tokens: int
) -> None:
    pool = pools["demo"]
    assert pool.difference(batch, data.draw(some_of(pool)), max_batch_tokens).max(initial=0.0) <= FLOAT32


@pytest.mark.parametrize("name", ["qwen", "llava"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_batch_of_the_other_families_too(pools: dict[str, Pool], name: str, data: st.DataObject) -> None:
    pool = pools[name]
    batch = data.draw(batches_of(name))
    assert pool.difference(batch, data.draw(some_of(pool)), MAX_BATCH_TOKENS_CPU).max(initial=0.0) <= FLOAT32


@pytest.mark.parametrize("name", ["demo", "qwen", "llava"])
def test_one_pass_with_the_longest_and_the_shortest(pools: dict[str, Pool], name: str) -> None:
    """All in one pass, however much padding that is: none of the scorer's own grouping by length."""
    pool = pools[name]
    order = sorted(range(COUNTS[name]), key=lambda i: len(pool.prepared[i].arrays["input_ids"]))
    batch = [order[0], order[-1], *order[1:4]]
    assert pool.difference(batch, list(pool.scorer.perspectives), 2**20).max() <= FLOAT32


def test_a_prompt_beyond_the_original_positions_changes_no_other_reward(bundle_of: Callable[[str], Path]) -> None:
    """Of 2048 tokens and more the position factors are others, which padding up to that length must not bring about."""
    scorer = LlavaRewardScorer(resolve("demo"), max_batch_tokens=2**20)
    long = Generation("long", "a cat " * 1000, png(np.random.default_rng(3), 64, 64))
    prepared = scorer.preprocess([*mixed_generations(4), long])
    assert len(prepared[-1].arrays["input_ids"]) > 2048
    alone = np.array([values_of(scorer.forward([item])[0], scorer.perspectives) for item in prepared])
    together = np.array([values_of(output, scorer.perspectives) for output in scorer.forward(prepared)])
    assert np.abs(together - alone).max() <= FLOAT32


# --- bfloat16 ---


@pytest.mark.parametrize("name", ["demo", "qwen", "llava"])
def test_bfloat16_stays_within_its_bound(bundle_of: Callable[[str], Path], name: str) -> None:
    pool = make_pool(bundle_of(name), 11, "bfloat16")
    rng = np.random.default_rng(5)
    for size in (MOST, 7):
        batch = rng.integers(0, len(pool.alone), size).tolist()
        largest = pool.difference(batch, list(pool.scorer.perspectives), MAX_BATCH_TOKENS_CPU).max(axis=0)
        assert all(largest <= [same_within("bfloat16", spread) for spread in pool.alone.std(axis=0)])


def test_bfloat16_through_as_many_layers_as_the_real_model(subtests: pytest.Subtests) -> None:
    in_bfloat16, in_float32 = random_scores(128, 32, torch.device("cpu"), torch.bfloat16, count=8)
    for dtype, score in (("bfloat16", in_bfloat16), ("float32", in_float32)):
        with subtests.test(dtype):
            alone, largest = moved(score, count=8, batches=1, most=12)
            assert all(largest <= [same_within(dtype, spread) for spread in alone.std(axis=0)])


def test_rewards_in_bfloat16_are_not_rounded_to_it() -> None:
    """Or a reward near 10 could only move by 0.0625, which is beyond the bound."""
    scorer = LlavaRewardScorer(resolve("demo"), dtype="bfloat16")
    rewards = torch.tensor(single_values(scorer, mixed_generations(6))).float()
    assert (rewards != rewards.bfloat16().float()).float().mean() > 0.9


def test_bounds_by_hand() -> None:
    assert same_within("float32", 3.0) == 1e-5
    assert same_within("bfloat16", 0.5) == same_within("bfloat16", 0.0) == 5e-2
    assert same_within("bfloat16", 3.0) == pytest.approx(0.3)  # a tenth of the spread
    assert [same_within("float32", 0.1, mode) for mode in ("exact", "few_crops", "int8")] == [1e-5, 1e-5, 5e-2]
    assert same_within("float32", 3.0, "int8") == same_within("bfloat16", 3.0)
    with pytest.raises(ConfigError, match="dtype=float16"):
        same_within("float16", 1.0)
