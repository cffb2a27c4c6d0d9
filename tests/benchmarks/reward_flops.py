"""Floating-point operations of phi3v rewards, counted from sizes; a multiply-add is two. No torch arithmetic.

Letters as in ``reward_models``. Only matrix products count, and causal attention counts the half that it needs.
"""

from __future__ import annotations

from tests.benchmarks.reward_models import SLOTS, Scale


def flops_straightforward(scale: Scale, image_tokens: int, length: int) -> dict[str, float]:
    """One perspective of one image, by component: every slot, every position, LoRA beside the weights."""
    lm, hidden = scale.config, scale.config.hidden_size
    shapes = _projections(scale)
    return {
        "tower": SLOTS * _crop(scale),
        "projector": _projector(scale, image_tokens),
        "LM linear": 2.0 * length * lm.num_hidden_layers * sum(i * o for i, o in shapes),
        "LoRA": 2.0 * length * lm.num_hidden_layers * scale.lora_rank * sum(i + o for i, o in shapes),
        "LM attention": 2.0 * length**2 * hidden * lm.num_hidden_layers,
        "SkipCA": 2.0 * hidden**2 * (length + 2 * image_tokens) + 4.0 * length * image_tokens * hidden,
    }


def flops_ours(scale: Scale, crops: int, image_tokens: int, length: int, perspectives: int) -> dict[str, float]:
    """All perspectives of one image, by component; each has a projector of its own.

    - crops: real ones, the global view included
    """
    lm, hidden = scale.config, scale.config.hidden_size
    qkv, *others = _projections(scale)
    every = sum(i * o for i, o in (qkv, *others))
    # The last layer: keys and values everywhere, the rest for the end token.
    last = length * qkv[0] * (qkv[1] - hidden) + hidden * hidden + sum(i * o for i, o in others)
    layers = lm.num_hidden_layers - 1
    parts = {
        "projector": _projector(scale, image_tokens),
        "LM linear": 2.0 * (layers * length * every + last),
        "LoRA": 0.0,
        "LM attention": 2.0 * length**2 * hidden * layers + 4.0 * length * hidden,
        "SkipCA": 6.0 * hidden**2 + 4.0 * image_tokens * hidden,
    }
    return {"tower": crops * _crop(scale), **{name: perspectives * value for name, value in parts.items()}}


def _projections(scale: Scale) -> list[tuple[int, int]]:
    """In and out widths of a layer's qkv_proj, o_proj, gate_up_proj and down_proj."""
    lm, hidden = scale.config, scale.config.hidden_size
    qkv = hidden + 2 * lm.num_key_value_heads * lm.head_dim
    return [(hidden, qkv), (hidden, hidden), (hidden, 2 * lm.intermediate_size), (lm.intermediate_size, hidden)]


def _projector(scale: Scale, image_tokens: int) -> float:
    width, hidden = 4 * scale.clip.hidden_size, scale.config.hidden_size
    return 2.0 * image_tokens * (width * hidden + hidden**2)


def _crop(scale: Scale) -> float:
    """The tower on one crop."""
    clip = scale.clip
    patches, width = clip.patches_per_side**2, clip.hidden_size
    tokens = patches + 1
    linear = 2.0 * tokens * (4 * width**2 + 2 * width * clip.intermediate_size)
    embedding = 2.0 * patches * 3 * clip.patch_size**2 * width
    return embedding + clip.feature_layers * (linear + 4.0 * tokens**2 * width)
