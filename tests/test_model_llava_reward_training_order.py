"""Which records a step sees, and at which rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ConfigError
from model.llava_reward.training.batches import Stream, check_division, cut, shard
from model.llava_reward.training.schedule import learning_rate_factor


@given(count=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_record_comes_once_an_epoch(count: int, batch: int, seed: int) -> None:
    stream = Stream(count, batch, seed)
    steps = -(-3 * count // batch)  # enough for three epochs
    order = [index for number in range(steps) for index in stream.step(number)]
    assert all(len(stream.step(number)) == batch for number in range(steps))
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = Stream(100, 100, 7)
    assert stream.step(0) != stream.step(1)
    assert stream.step(0) != Stream(100, 100, 8).step(0)
    assert stream.step(0) == Stream(100, 100, 7).step(0)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]))
def test_workers_share_a_step_without_rest(world: int, micro: int) -> None:
    step = Stream(50, 16, 1).step(3)
    parts = [cut(shard(step, rank, world), micro) for rank in range(world)]
    assert [index for part in parts for piece in part for index in piece] == step
    assert all(len(piece) == micro for part in parts for piece in part)


def test_steps_are_counted_and_divided() -> None:
    assert Stream(10, 4, 0).total_steps(3) == 7  # 30 records, the last two left
    assert Stream(10, 4, 0).epoch_of(4) == 2.0  # 20 of 10
    with pytest.raises(ConfigError, match="batch_size=31 is more than epochs=3 of 10 records"):
        Stream(10, 31, 0).total_steps(3)
    with pytest.raises(ConfigError, match="batch_size=6 is no multiple of micro_batch=2 times workers=2"):
        check_division(6, 2, 2)


def test_the_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 3) for step in range(100)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])  # three steps of warm-up, then the cosine from 1
    assert factors[51] == pytest.approx(0.5, abs=0.01)  # half way between 3 and 100
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert learning_rate_factor(0, 1, 1) == 1.0
    assert learning_rate_factor(0, 5, 0) == 1.0
    assert learning_rate_factor(5, 5, 0, 0.1) == pytest.approx(0.1)
