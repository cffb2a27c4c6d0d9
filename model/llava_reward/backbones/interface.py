"""What a family of base models offers to the reward network, whatever it is made of.

A backbone is built from configuration files alone. It makes two modules without storage, says which published
tensor belongs where, and runs them: the image tower once per image for all perspectives, then per perspective the
projector and the language model, up to the hidden state of the end token. It knows nothing about rewards.

Letters: b: samples, h: hidden size, n: image tokens of one sample.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    import torch

SampleT = TypeVar("SampleT")
SharedT = TypeVar("SharedT")


@dataclass(frozen=True)
class EndState:
    """What the head reads.

    - hidden: ``(b, h)``, the end token after the final norm
    - image_tokens: per sample ``(n, h)``, as they entered the language model
    """

    hidden: Tensor
    image_tokens: Sequence[Tensor]


@dataclass(frozen=True)
class SkipCaForm:
    """How a family's released SkipCA differs: the epsilon of its norm, and whether it has any image key at all."""

    norm_eps: float
    has_image_keys: bool


@dataclass(frozen=True)
class WeightNames:
    """Published tensor names against those of the modules built here, in which ``model.`` is a perspective's part.

    - renames: pattern and replacement; the first pattern that is found at the start of a name applies
    - unused: published names that no reward depends on
    - vision: prefix of the image tower's tensors, after renaming
    - projector: prefix of the projector's tensors, after renaming; each adapter stores its own
    - layers: prefix of the language model's layers, after renaming
    - projections: the layers' weights that LoRA may change, by submodule
    """

    renames: tuple[tuple[str, str], ...]
    unused: re.Pattern[str]
    vision: str
    projector: str
    layers: str
    projections: Mapping[str, tuple[str, ...]]

    def rename(self, published: str) -> str:
        """The name here of a published tensor or module."""
        for pattern, replacement in self.renames:
            renamed, found = re.subn(rf"\A(?:{pattern})", replacement, published)
            if found:
                return renamed
        return published


class Backbone(ABC, Generic[SampleT, SharedT]):
    """One family with the sizes of one configuration. ``skip_ca`` is None where the family has no SkipCA."""

    hidden_size: int
    names: WeightNames
    skip_ca: SkipCaForm | None
    num_layers: int

    @abstractmethod
    def build_vision(self) -> nn.Module:
        """The image tower, shared by all perspectives; called under the device ``meta``."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Projector and language model of one perspective; called under the device ``meta``."""

    @abstractmethod
    def sample(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> SampleT:
        """Prepared arrays of one generation to one sample on the device, normalised."""

    @abstractmethod
    def share(self, vision: nn.Module, batch: Sequence[SampleT]) -> SharedT:
        """Everything that all perspectives have in common: the tower runs here, once per image."""

    @abstractmethod
    def join(self, parts: Sequence[SharedT]) -> SharedT:
        """Batches that went through the tower one by one as one batch, in order: the tower need not run again."""

    @abstractmethod
    def project(self, model: nn.Module, shared: SharedT) -> Sequence[Tensor]:
        """Image tokens as they enter the language model, per sample ``(n, h)``.

        They depend on the projector alone, so perspectives with equal projectors share them.
        """

    @abstractmethod
    def end_state(self, model: nn.Module, shared: SharedT, image_tokens: Sequence[Tensor]) -> EndState:
        """One perspective's end tokens; each equals that of its sample alone. ``image_tokens``: of ``project``."""
