"""Finds the backbone of a family by name, and imports only what that family needs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.llava_reward.backbones.interface import Backbone


def read_backbone(family: str, folder: Path, *, skip_ca_keys: str | None = None) -> Backbone[Any, Any]:
    """The backbone that the configuration in ``folder`` describes; no weights are read.

    - family: one of ``model.llava_reward.config.FAMILIES``
    - skip_ca_keys: for qwen, what SkipCA attends to; see ``model.llava_reward.config.QWEN_SKIP_CA_KEYS``
    - raises: ``ConfigError`` if the configuration is malformed or of another family, or transformers is missing
    """
    try:
        module = importlib.import_module(f"model.llava_reward.backbones.{family}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ConfigError(f"family={family!r} needs transformers; pip install -e '.[transformers]'") from error
    options = {} if skip_ca_keys is None else {"skip_ca_keys": skip_ca_keys}
    backbone: Backbone[Any, Any] = module.read_backbone(folder, **options)
    return backbone
