"""Small real problems for the trainer: drawn pictures, the shipped backbone, and a loop around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.bundle import read_bundle
from model.llava_reward.checkpoint import load_untrained
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.training.inputs import Feeder, Tower
from model.llava_reward.training.loop import Loop, LoopSettings
from model.llava_reward.training.lora import LoraSpec
from model.llava_reward.training.objective import make_objective
from model.llava_reward.training.parallel import Workers
from model.llava_reward.training.trainable import TrainableReward, make_trainable
from model.preferences import LabelledImage, PreferencePair
from model.scorer import SHIPPED

CPU = torch.device("cpu")
DEMO = SHIPPED / "demo"
_GOOD, _BAD = (200, 60, 40), (40, 70, 200)


def draw(folder: Path, count: int) -> list[tuple[Path, Path]]:
    """Pairs of pictures: on a red ground, which is to be preferred, and on a blue one."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        noise = np.random.default_rng(number)
        pair = []
        for name, ground in (("good", _GOOD), ("bad", _BAD)):
            pixels = np.full((56, 56, 3), ground, dtype=np.uint8)
            x, y = noise.integers(0, 40, 2)
            pixels[y : y + 16, x : x + 16] = noise.integers(0, 256, 3)
            pair.append(folder / f"{number}-{name}.png")
            if not pair[-1].exists():
                Image.fromarray(pixels).save(pair[-1])
        paths.append((pair[0], pair[1]))
    return paths


def pairs(folder: Path, count: int) -> list[PreferencePair]:
    """Rates 1 and 0, for losses with a margin."""
    return [
        PreferencePair(f"pair-{i}", "a square", "a square", str(good), str(bad), 1.0, 0.0, {})
        for i, (good, bad) in enumerate(draw(folder, count))
    ]


def labelled(folder: Path, count: int) -> list[LabelledImage]:
    """Twice ``count`` images: label 1 on red, 0 on blue."""
    return [
        LabelledImage(f"image-{i}-{label}", "a square", str(path), label, {})
        for i, pair in enumerate(draw(folder, count))
        for path, label in zip(pair, (1, 0), strict=True)
    ]


def trainable(
    folder: Path = DEMO,
    *,
    loss: str = "bt",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    has_checkpointing: bool = False,
    has_skip_ca: bool = True,
    skip_ca_keys: str | None = None,
    seed: int = 1,
) -> tuple[TrainableReward, torch.nn.Module]:
    """A fresh perspective on the backbone of a bundle, and its image tower."""
    bundle = read_bundle(folder)
    backbone = read_backbone(bundle.family, bundle.backbone, skip_ca_keys=skip_ca_keys or bundle.skip_ca_keys)
    objective = make_objective(loss, has_skip_ca=has_skip_ca)
    vision, branch = load_untrained(backbone, bundle.backbone, objective.head, device=CPU, dtype=dtype)
    reward = make_trainable(
        backbone,
        branch,
        objective.build(),
        lora=LoraSpec(4, 8.0, dropout),
        dtype=dtype,
        seed=seed,
        has_checkpointing=has_checkpointing,
    )
    return reward, vision


@contextmanager
def loop_of(
    records: Sequence[Any],
    *,
    folder: Path = DEMO,
    loss: str = "bt",
    cache_bytes: int = 1 << 30,
    eval_records: Sequence[Any] = (),
    has_margin: bool = False,
    workers: Workers | None = None,
    has_skip_ca: bool = True,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Loop]:
    """A loop with the shipped backbone; ``settings`` over small ones, ``options`` as for ``trainable``."""
    torch.set_num_threads(1)
    reward, vision = trainable(folder, loss=loss, has_skip_ca=has_skip_ca, **options)
    tower = Tower(reward.backbone, vision, CPU, cache_bytes)
    objective = make_objective(loss, has_skip_ca=has_skip_ca, has_margin=has_margin)
    small = {"epochs": 2, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-3}
    with Feeder(tower, LlavaRewardPreprocessor(read_bundle(folder)), threads=1) as feeder:
        given = LoopSettings(**{**small, **(settings or {})})
        yield Loop(reward, objective, feeder, records, given, workers or Workers(), eval_records)


def losses(loop: Loop, stop_at: int | None = None) -> list[float]:
    """Run, and give the loss of every step."""
    loop.run(lambda line: None, stop_at)
    return [line["loss"] for line in loop.history]
