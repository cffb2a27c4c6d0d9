"""The benchmark of the trainer does the same work in both of its ways."""

from __future__ import annotations

from pathlib import Path

import torch

from model.llava_reward.bundle import read_bundle
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.training.batches import Stream, cut
from model.llava_reward.training.inputs import prepare, sides_of
from tests.benchmarks.train_speed import BareLoop
from tests.train_helpers import DEMO, loop_of, losses, pairs, trainable


def test_the_bare_loop_ends_where_ours_does(tmp_path: Path) -> None:
    records, preprocessor = pairs(tmp_path, 4), LlavaRewardPreprocessor(read_bundle(DEMO))
    # A constant rate, as the bare loop has it: half a cosine of a million epochs does not fall in two steps.
    settings = {"learning_rate": 1e-4, "epochs": 1e6, "micro_batch": 2, "warmup_share": 0.0}
    with loop_of(records, settings=settings) as loop:
        losses(loop, 2)
        expected = loop.state()["parameters"]
    reward, vision = trainable()
    samples = {
        i: tuple(reward.backbone.sample(prepare(side, preprocessor), torch.device("cpu")) for side in sides_of([one]))
        for i, one in enumerate(records)
    }
    first = reward.branch.value_head.weight.detach().clone()
    BareLoop(reward, vision, samples).run([cut(Stream(4, 4, 42).step(number), 2) for number in range(2)])
    for _, name, parameter in reward.trained():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=2e-5, rtol=0)
    assert float((expected["value_head.weight"] - first).abs().max()) > 5e-5  # and not where both began
