"""What a family of base models offers to the reward network, whatever it is made of.

A backbone is built from configuration files alone. It makes two modules without storage, says which published
tensor belongs where, and runs them: the image tower once per image for all perspectives, then per perspective the
projector and the language model, up to the hidden state of the end token. It knows nothing about rewards.

Letters: b: samples, h: hidden size, n: image tokens of one sample.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

SampleT = TypeVar("SampleT")
SharedT = TypeVar("SharedT")


@dataclass(frozen=True)
class EndState:
    """What the head reads.

    - hidden: ``(b, h)``, the end token after the final norm
    - image_tokens: per sample ``(n, h)``, as they entered the language model; one tensor for samples of one picture
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


@dataclass(frozen=True)
class Prefix:
    """Tokens before a caption. Samples of one picture with equal keys compute them once; ``length`` counts them."""

    length: int
    key: Hashable


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

    def with_picture_of(self, arrays: Mapping[str, np.ndarray], other: SampleT) -> SampleT:
        """The sample of ``arrays``, known to show the picture of ``other``, which both then hold once.

        Samples made so share whatever does not depend on their captions.
        """
        known: Any = other
        ids = torch.tensor(arrays["input_ids"], device=known.input_ids.device, dtype=torch.long)
        made: SampleT = replace(known, input_ids=ids)
        return made

    def prefix_of(self, arrays: Mapping[str, np.ndarray]) -> Prefix:
        """What captions of one picture have in common, and which of them have it in common."""
        ids = arrays["input_ids"]
        length = int((ids < 0).nonzero()[0][-1]) + 1
        return Prefix(length, (ids[:length].tobytes(), self.rope_form(len(ids))))

    def rope_form(self, length: int) -> Hashable:
        """Equal for samples of these lengths whose positions are rotated alike."""
        return None

    @abstractmethod
    def share(self, vision: nn.Module, batch: Sequence[SampleT]) -> SharedT:
        """Everything that all perspectives have in common: the tower runs here, once per picture."""

    @abstractmethod
    def join(self, parts: Sequence[SharedT]) -> SharedT:
        """Batches that went through the tower one by one as one batch, in order: the tower need not run again."""

    @abstractmethod
    def project(self, model: nn.Module, shared: SharedT) -> Sequence[Tensor]:
        """Image tokens as they enter the language model, per sample ``(n, h)``, one tensor for one picture.

        They depend on the projector alone, so perspectives with equal projectors share them.
        """

    @abstractmethod
    def stack(self, shared: SharedT, times: int) -> SharedT:
        """The batch ``times`` over, one copy behind the other, for ``end_state`` of as many perspectives at once."""

    @abstractmethod
    def end_state(self, model: nn.Module, shared: SharedT, image_tokens: Sequence[Tensor]) -> EndState:
        """One perspective's end tokens; each equals that of its sample alone.

        - shared: of ``share``, or of ``stack``; then the end tokens of that many perspectives, one behind the other
        - image_tokens: of ``project``, those of each perspective behind the other
        """
