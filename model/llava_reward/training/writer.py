"""A trained perspective as files, in the layout in which LLaVA-Reward is published, with what makes it loadable.

<out>/<perspective>/reward_config.yaml, pytorch_model.bin, lora/adapter_config.json, lora/adapter_model.bin
<out>/golden.json, golden/    drawn pictures with their rewards
<out>/MODEL_CARD.md           what it was trained on and how it went
<out>/scorer.json             names the backbone and the adapter; written last: with it the folder is whole
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import ConfigError
from model.golden import GOLDEN_FILE
from model.llava_reward import golden_file
from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.config import write_json
from model.llava_reward.lora import layer_projections
from model.llava_reward.losses import LearnableTau
from model.llava_reward.training.base import Base
from model.llava_reward.training.lora import LoraSpec
from model.llava_reward.training.objective import Objective
from model.llava_reward.training.trainable import GROUPS, HEAD, LORA, TEMPERATURE, group_of
from model.perspectives import Perspective

SCORER_FILE, CARD_FILE = "scorer.json", "MODEL_CARD.md"

_VALUES = "value_head.weight"

# Names here to published ones, the first that fits; the other way round stands in each backbone's renames.
_PUBLISHED = {
    "phi3v": (),
    "qwen": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "llava": (
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
    ),
}


@dataclass(frozen=True)
class Trained:
    """Parameters by name, whole and in float32, and what they belong to."""

    perspective: Perspective
    base: Base
    objective: Objective
    lora: LoraSpec
    parameters: Mapping[str, Tensor]


def published_name(family: str, name: str) -> str:
    """The published name of a tensor or module of a branch."""
    for here, published in _PUBLISHED[family]:
        if name.startswith(here):
            return published + name.removeprefix(here)
    return name


def write_adapter(out: Path, trained: Trained, backbone: Backbone[Any, Any], dtype: torch.dtype) -> None:
    """The adapter folder of one perspective in ``out``.

    - dtype: of the stored tensors
    - raises: ``ConfigError`` if a trained value is not a finite number
    """
    family, names = trained.base.family, backbone.names
    head: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for name, tensor in trained.parameters.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name} holds values that are not finite; nothing is written")
        group, stored = group_of(name, names.projector), tensor.to(dtype).contiguous()
        assert group in GROUPS, f"{name} is frozen"
        if group == LORA:
            lora[f"{published_name(family, name)}.weight"] = stored
        elif group != TEMPERATURE:
            head[published_name(family, name)] = stored
    (out / "lora").mkdir(parents=True, exist_ok=True)
    torch.save(head, out / "pytorch_model.bin")
    torch.save(lora, out / "lora" / "adapter_model.bin")
    write_json(out / "lora" / "adapter_config.json", _lora_config(trained, backbone))
    (out / "reward_config.yaml").write_text(_reward_config(trained), encoding="utf-8")


def at_temperature(parameters: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """The same with rewards divided by ``temperature``; the head must give one value."""
    return {**parameters, _VALUES: parameters[_VALUES] / temperature}


def _reward_config(trained: Trained) -> str:
    head = trained.objective.head
    values = {
        "add_cross_attention": str(head.has_skip_ca).lower(),
        "general_preference_tau": repr(_tau(trained)),
        "is_general_preference": str(head.is_general_preference).lower(),
        "value_head_dim": str(head.value_head_dim),
    }
    return "".join(f"{key}: {value}\n" for key, value in values.items())


def _tau(trained: Trained) -> float:
    """The temperature that preferences are read with: the learnt one, where the loss learns it."""
    theta = trained.parameters.get("loss.tau.theta")
    if theta is None:
        return trained.objective.head.tau
    tau = getattr(trained.objective.build(), "tau", None)
    assert isinstance(tau, LearnableTau)
    return float(F.softplus(tau.sign * theta).clamp(min=tau.least))


def _lora_config(trained: Trained, backbone: Backbone[Any, Any]) -> dict[str, Any]:
    """As PEFT 0.13 writes it: last names of modules for phi3v, whole paths for the others."""
    family, paths = trained.base.family, layer_projections(backbone)
    last_names = sorted({path.rsplit(".", 1)[1] for path in paths})
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": trained.lora.rank,
        "lora_alpha": trained.lora.alpha,
        "lora_dropout": trained.lora.dropout,
        "target_modules": last_names if family == "phi3v" else sorted(published_name(family, p) for p in paths),
        "init_lora_weights": "gaussian",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def scorer_values(trained: Trained, name: str) -> dict[str, Any]:
    """``scorer.json`` of a bundle of the backbone and this one adapter; add other adapters by hand."""
    base, perspective = trained.base, str(trained.perspective)
    values: dict[str, Any] = {
        "system": "llava_reward",
        "family": base.family,
        "name": name,
        "licence": base.licence,
        "is_trained": True,
        "backbone": base.entry,
        "adapters": {perspective: perspective},
        **base.options,
    }
    if trained.objective.training is not None:
        values["head_training"] = {perspective: str(trained.objective.training)}
    return values


def write_golden(out: Path, scorer: Mapping[str, Any], device: str) -> None:
    """``golden.json`` of a folder that has no ``scorer.json`` yet: the trained perspective scores three drawn pictures.

    So it is also the proof that what was written can be loaded.
    """
    place = out / ".golden"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    elsewhere = {perspective: f"../{folder}" for perspective, folder in scorer["adapters"].items()}
    write_scorer(place, {**scorer, "adapters": elsewhere})
    golden_file.write_golden(place, device=device)
    shutil.rmtree(out / "golden", ignore_errors=True)
    (place / "golden").rename(out / "golden")
    (place / GOLDEN_FILE).replace(out / GOLDEN_FILE)
    shutil.rmtree(place)


def write_scorer(out: Path, values: Mapping[str, Any]) -> None:
    """``scorer.json``, appearing whole or not at all."""
    temporary = out / f".{SCORER_FILE}"
    write_json(temporary, values)
    temporary.replace(out / SCORER_FILE)


def group_changes(
    trained: Mapping[str, Tensor], initial: Mapping[str, Tensor], projector: str
) -> dict[str, tuple[int, float]]:
    """Per group: how many parameters it has, and the root mean square of how far they moved."""
    changes: dict[str, tuple[int, float]] = {}
    squares: dict[str, float] = {}
    for name, tensor in trained.items():
        group = group_of(name, projector) or HEAD
        count, _ = changes.get(group, (0, 0.0))
        squares[group] = squares.get(group, 0.0) + float((tensor.double() - initial[name].double()).pow(2).sum())
        changes[group] = (count + tensor.numel(), 0.0)
    return {group: (count, math.sqrt(squares[group] / count)) for group, (count, _) in changes.items()}
