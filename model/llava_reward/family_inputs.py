"""What the CPU step needs to know of a family; nothing about prompts, errors or bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from model.llava_reward.prompt_tokens import PromptText


class FamilyInputs(Protocol):
    """A family's text, its limits, and its way with pictures.

    - max_positions, max_image_tokens: of the language model, and of the image that takes most
    - facts: everything that decides ``picture``, as JSON values, for the preprocessing hash
    """

    @property
    def text(self) -> PromptText: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def max_image_tokens(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, object]: ...

    def picture(self, image: Image.Image) -> tuple[dict[str, np.ndarray], int]:
        """An RGB image to compact arrays, and the number of image tokens it takes.

        - raises: ``InputError`` image_too_narrow
        """
        ...
