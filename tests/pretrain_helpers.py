"""A pretraining configuration small enough for tests, and samples by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from model.llava_reward.pretrain_config import PretrainConfig, read_pretrain_config
from model.llava_reward.pretrain_data import (
    SceneSamples,
)
from model.llava_reward.scene_tokenizer import build_scene_tokenizer
from model.llava_reward.small_phi3v import write_configs
from model.scene_splits import Split

SMALL: Mapping[str, Any] = yaml.safe_load("""
seed: 3
is_mixed: false
network: {crop: 28, patch: 7, num_crops: 4, tower_width: 16, tower_mlp: 24, tower_layers: 2, tower_heads: 2,
          hidden: 24, mlp: 32, layers: 2, heads: 2}
scenes: {sizes: [[64, 64], [128, 64], [64, 96]], prompt_share: 0.6, mismatch_share: 0.5, artefact_share: 0.5,
         sign_share: 0.4, more_prompts: 2, questions: 4}
tower: {batch: 4, micro_batch: 2, steps: 4, warmup: 2, rate: 2.0e-3, last_rate: 0.1, beta1: 0.9, beta2: 0.98,
        weight_decay: 0.1, clip: 1.0, fine_crops: 1}
captions: {batch: 4, micro_batch: 2, steps: 6, warmup: 2, rate: 2.0e-3, last_rate: 0.1, beta1: 0.9, beta2: 0.98,
           weight_decay: 0.1, clip: 1.0, prompt_weight: 0.5, match_weight: 3.0,
           word_weight: 1.0}
reporting: {log_steps: 1, save_seconds: 1000, validate_steps: 1000, scenes: 6}
""")


def small_config(folder: Path, **changes: Any) -> PretrainConfig:
    """The small configuration; a part's changed keys are given as a mapping."""
    values = {**SMALL, **{n: {**SMALL[n], **v} if isinstance(v, dict) else v for n, v in changes.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return read_pretrain_config(folder / "config.yaml")


def small_samples(folder: Path, split: Split = Split.TRAINING, length: int = 40, **more: int) -> SceneSamples:
    config = small_config(folder, scenes={"more_prompts": 0, "questions": 0, **more})
    write_configs(folder, config.network, build_scene_tokenizer(), is_tied=True)
    return SceneSamples(split, config.scenes, config.network, folder / "tokenizer.json", config.captions, length)
