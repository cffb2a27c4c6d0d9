"""A reward for FK steering: ``reward_fn(images, prompts) -> list[float]`` over any scorer.

The public Fk-Diffusion-Steering code decodes its particles at some steps, hands them over as PIL images with their
prompts (one caption, repeated; 4 images at a time by default), and resamples by exp(lambda * reward). So the reward
must be a scalar, and every image must have one: a particle without a reward cannot be weighed.

Source: github.com/zacharyhorvitz/Fk-Diffusion-Steering, text_to_image. The LLaVA-Reward authors' own settings are
not published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

from PIL import Image

from model.errors import ConfigError, InputError
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import Scorer

RewardFn = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]


def make_reward_fn(scorer: Scorer, perspective: Perspective = Perspective.OVERALL) -> RewardFn:
    """A function of images and their prompts, in the same number, to rewards: unbounded, higher is better.

    One call is one batch; keep it on the thread that made the scorer.

    - raises: ``ConfigError`` if the scorer lacks the perspective, or has no scalar reward for it. The function raises
      ``ValueError`` for unequal numbers, and ``InputError`` naming the first image that cannot be scored
    """
    head = scorer.heads.get(perspective)
    if head is None:
        raise ConfigError(f"{scorer.identity.name} has no {perspective}; it has {', '.join(scorer.heads)}")
    if head.is_general_preference:
        raise ConfigError(
            f"{perspective} of {head.checkpoint} is a general-preference head: it compares images and gives none a "
            "number, and FK steering needs one; use a Bradley-Terry checkpoint"
        )

    def reward_fn(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images with {len(prompts)} prompts; give one prompt for each image")
        pairs = zip(images, prompts, strict=True)
        generations = [Generation(str(index), prompt, _encoded(image)) for index, (image, prompt) in enumerate(pairs)]
        records = scorer.score(generations, [perspective])
        for record in records:
            if (error := record.error) is not None:
                raise InputError(error.code, error.stage, f"image {record.generation_id}: {error.message}")
        return [record.rewards[perspective] for record in records]

    return reward_fn


def _encoded(image: Image.Image) -> bytes:
    """The same pixels as a file, since scorers take files. Level 1: this runs between two denoising steps."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
