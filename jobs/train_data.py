"""The data of a training run: read, checked before any work, and written down so that a continuation sees the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.train_config import TrainConfig, defaults
from model.errors import ConfigError
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.training.base import Base
from model.llava_reward.training.card import DataFacts
from model.llava_reward.training.inputs import find_unusable
from model.llava_reward.training.loop import margin_of
from model.llava_reward.training.objective import Objective
from model.preferences import LabelledImage, PreferenceData, PreferencePair, Record, read_preferences

RUN_FILE = "run.json"
MAX_NAMED = 10  # unusable images that an error names; more are counted


@dataclass(frozen=True)
class TrainingData:
    """Usable records. ``facts``: of all records as read, with how many were left out."""

    records: tuple[Record, ...]
    facts: DataFacts


def read_training_data(
    config: TrainConfig, base: Base, objective: Objective, say: Callable[[str], None]
) -> tuple[TrainingData, TrainingData | None]:
    """Training and held-out records whose images can all be used.

    Every image is read and prepared once, before any step; a continuation of the same run trusts that.

    - raises: ``ConfigError`` for data of the wrong kind, with only one label, without rates where margins are wanted,
      with images that cannot be used (unless ``skip_unusable``), or other than those that the run began with
    """
    given = [_read(config, uri, objective) for uri in (config.data, config.eval_data) if uri is not None]
    run = _begun(config, given)
    if run is None:
        skipped = [_unusable(config, data, base, say) for data in given]
        run = {"settings": config.decisive(), "data": [data.sha256 for data in given], "unusable": skipped}
        path = config.folder / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    parts = [_usable(data, faults) for data, faults in zip(given, run["unusable"], strict=True)]
    _check_labels(config.data, parts[0].records)
    return parts[0], parts[1] if len(parts) > 1 else None


def _read(config: TrainConfig, uri: str, objective: Objective) -> PreferenceData:
    data = read_preferences(uri, image_root=config.image_root, fields=config.map, labels=config.labels)
    if data.kind != objective.kind:
        raise ConfigError(f"{uri} holds {data.kind} data, but loss={config.loss} takes {objective.kind}")
    _check_labels(uri, data.records)
    if objective.has_margin:
        for record in data.records:
            assert isinstance(record, PreferencePair)
            margin_of(record)
    return data


def _check_labels(uri: str, records: tuple[Record, ...]) -> None:
    labels = [record.label for record in records if isinstance(record, LabelledImage)]
    for label in (0, 1):
        if labels and label not in labels:
            raise ConfigError(f"{uri}: all {len(labels)} records have label {1 - label}; add some of label {label}")
    if not records:
        raise ConfigError(f"{uri}: no record is left to use")


def _begun(config: TrainConfig, given: list[PreferenceData]) -> dict[str, Any] | None:
    """What the run in this folder began with, if there is one. Raises ``ConfigError`` where it was another."""
    path = config.folder / RUN_FILE
    if not path.exists():
        if (path.parent / "scorer.json").exists():
            raise ConfigError(f"{path.parent} holds a checkpoint that was not trained there; give another --output")
        return None
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # A run from before a setting was invented had its default.
    old, new = defaults() | run["settings"], config.decisive()
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        values = ", ".join(f"{key}={new.get(key)!r} (was {old.get(key)!r})" for key in changed)
        raise ConfigError(f"{path.parent} holds a run with other settings: {values}; give another --output")
    if run["data"] != [data.sha256 for data in given]:
        raise ConfigError(f"{config.data} has changed since the run in {path.parent} began; give another --output")
    return run


def _unusable(config: TrainConfig, data: PreferenceData, base: Base, say: Callable[[str], None]) -> Mapping[str, str]:
    say(f"checking the images of {len(data.records)} records of {data.source}")
    threads = max(config.prepare_threads, 2)
    faults = find_unusable(data.records, LlavaRewardPreprocessor(base.bundle), threads)
    if not faults:
        return {}
    named = "; ".join(f"{error.message} ({error.code})" for error in list(faults.values())[:MAX_NAMED])
    more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    summary = f"{data.source}: {len(faults)} of {len(data.records)} records cannot be used: {named}{more}"
    if not config.skip_unusable:
        raise ConfigError(f"{summary}. Mend them, or leave them out with skip_unusable: true")
    say(f"left out: {summary}")
    return {str(place): f"{error.code}: {error.message}" for place, error in faults.items()}


def _usable(data: PreferenceData, faults: Mapping[str, str]) -> TrainingData:
    records = tuple(record for place, record in enumerate(data.records) if str(place) not in faults)
    ones = [record.label for record in records if isinstance(record, LabelledImage)]
    majority = max(sum(ones), len(ones) - sum(ones)) / len(ones) if ones else None
    skipped = len(data.records) - len(records)
    return TrainingData(records, DataFacts(data.source, data.kind, len(data.records), data.sha256, skipped, majority))
