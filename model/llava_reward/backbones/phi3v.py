"""Phi-3.5-vision without remote code: image feature assembly, projector and language model, original names.

Letters: b: samples, l: padded length, h: hidden size, k: crops, a x g: rows and columns of crops,
m: merged cells per crop side, w: width of the image tower, n: image tokens of one picture.
Source: microsoft/Phi-3.5-vision-instruct, modeling_phi3_v.py and image_embedding_phi3_v.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.backbones.interface import Backbone, EndState, SkipCaForm, WeightNames
from model.llava_reward.backbones.layers import Layer, Layout, Rope, attend, embed, end_hidden
from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.backbones.phi3v_vision import VisionEncoder
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.prefix import Run, in_order, runs_of
from model.llava_reward.backbones.rms_norm import RmsNorm
from model.llava_reward.backbones.rope import apply_rope, rope_tables
from model.llava_reward.config import ClipConfig, Phi3VConfig, read_clip_config, read_phi3v_config
from model.llava_reward.pixels import crops_from_pixels

if TYPE_CHECKING:
    import numpy as np


class ImageProjector(nn.Module):
    """Merged tokens to language-model embeddings; each perspective has its own."""

    def __init__(self, config: Phi3VConfig, clip: ClipConfig) -> None:
        super().__init__()
        self.img_projection = nn.Sequential(
            nn.Linear(4 * clip.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, merged: Tensor) -> Tensor:
        projected: Tensor = self.img_projection(merged)
        return projected


class Phi3Attention(nn.Module):
    """Causal self-attention with rotary positions, in the steps of ``layers.Attention``."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.key_value_width = config.num_key_value_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, config.hidden_size + 2 * self.key_value_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _heads(self, values: Tensor, heads: int) -> Tensor:
        return values.view(*values.shape[:-1], heads, self.head_dim).transpose(1, 2)

    def heads_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, positions applied: each ``(b, heads, l, d)``."""
        widths = (self.o_proj.in_features, self.key_value_width, self.key_value_width)
        q, k, v = self.qkv_proj(hidden).split(widths, dim=-1)
        k, v = self._heads(k, self.num_key_value_heads), self._heads(v, self.num_key_value_heads)
        return apply_rope(self._heads(q, self.num_heads), *rope), apply_rope(k, *rope), v

    def keys_of(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values alone, as ``heads_of`` gives them."""
        start = self.o_proj.in_features
        k, v = output_rows(self.qkv_proj, hidden, start, start + 2 * self.key_value_width).chunk(2, dim=-1)
        k, v = self._heads(k, self.num_key_value_heads), self._heads(v, self.num_key_value_heads)
        return apply_rope(k, *rope), v

    def query_of(self, hidden: Tensor, rope: Rope) -> Tensor:
        """Queries alone, as ``heads_of`` gives them."""
        q = output_rows(self.qkv_proj, hidden, 0, self.o_proj.in_features)
        return apply_rope(self._heads(q, self.num_heads), *rope)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention and its output projection, ``(b, l, h)``; causal where no mask is given."""
        out: Tensor = self.o_proj(attend(q, k, v, mask))
        return out


class Phi3Mlp(nn.Module):
    """Gated MLP; the first half of ``gate_up_proj`` is the gate."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        out: Tensor = self.down_proj(up * F.silu(gate))
        return out


class Phi3Layer(Layer):
    """Norms, attention and MLP of one layer."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Phi3Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Phi3Mlp(config)


class Phi3VModel(nn.Module):
    """Embeddings, projector and decoder of one perspective; the image tower stands apart and is shared."""

    def __init__(self, config: Phi3VConfig, clip: ClipConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed_tokens = ImageProjector(config, clip)
        self.layers = nn.ModuleList(Phi3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def end_hidden(self, embedded: Tensor, rope: Rope, layout: Layout) -> Tensor:
        """Hidden states of the end tokens after the final norm: ``(b, l, h)`` to one row of ``h`` each."""
        return end_hidden(cast(Sequence[Layer], self.layers), self.norm, embedded, rope, layout)


@dataclass(frozen=True)
class Phi3VSample:
    """One sample on the device, without any padding.

    - input_ids: ``(length,)`` int64, negative where an image token goes, the end token last
    - crops: ``(1 + rows*columns, 3, c, c)`` normalised, global view first
    - grid: rows and columns of crops
    """

    input_ids: Tensor
    crops: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Phi3VShared:
    """A batch after the tower.

    - merged: per picture ``(n, 4w)``; pictures: which of them each sample shows; ids: per sample ``(length,)``
    - runs: what goes through the language model at once, and the rotary tables of each
    """

    merged: Sequence[Tensor]
    pictures: Pictures
    ids: Sequence[Tensor]
    runs: Sequence[tuple[Run, Rope]]


class Phi3VBackbone(Backbone[Phi3VSample, Phi3VShared]):
    """Phi-3.5-vision behind the backbone interface."""

    # The epsilon is fixed in the released code, whatever the backbone's own value.
    skip_ca = SkipCaForm(norm_eps=1e-5, has_image_keys=True)

    def __init__(self, config: Phi3VConfig, clip: ClipConfig) -> None:
        self.config, self.clip = config, clip
        self.hidden_size, self.num_layers = config.hidden_size, config.num_hidden_layers
        last = rf".*vision_model\.encoder\.layers\.{clip.feature_layers}\..*"
        self.names = WeightNames(
            # The embeddings have a second name; files hold either or both.
            renames=((r"model\.vision_embed_tokens\.wte\.", "model.embed_tokens."),),
            unused=re.compile(
                rf"lm_head\.weight|.*vision_model\.post_layernorm\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq|{last}"
            ),
            vision="model.vision_embed_tokens.",
            projector="model.vision_embed_tokens.img_projection.",
            layers="model.layers.",
            projections={"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")},
        )

    def build_vision(self) -> VisionEncoder:
        return VisionEncoder(self.clip)

    def build_model(self) -> Phi3VModel:
        return Phi3VModel(self.config, self.clip)

    def sample(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> Phi3VSample:
        """``pixels``: ``(H, W, 3)`` uint8, multiples of the crop side; ``input_ids``: ``(length,)`` int32."""
        pixels = torch.tensor(arrays["pixels"], device=device)
        ids = torch.tensor(arrays["input_ids"], device=device, dtype=torch.long)
        side = self.clip.image_size
        grid = (pixels.shape[0] // side, pixels.shape[1] // side)
        return Phi3VSample(ids, crops_from_pixels(pixels[None], side)[0], grid)

    def rope_form(self, length: int) -> bool:
        """The rotary factors are others for long samples."""
        return length > self.config.rope.original_max_positions

    def share(self, vision: nn.Module, batch: Sequence[Phi3VSample]) -> Phi3VShared:
        """The tower runs on real crops only, and once per picture."""
        pictures = Pictures.of([item.crops for item in batch])
        shown = pictures.once(batch)
        merged = vision([item.crops for item in shown], [item.grid for item in shown])
        return self._after_tower(merged, pictures, [item.input_ids for item in batch])

    def join(self, parts: Sequence[Phi3VShared]) -> Phi3VShared:
        pictures = Pictures.joined([part.pictures for part in parts])
        merged = [one for part in parts for one in part.merged]
        return self._after_tower(merged, pictures, [ids for part in parts for ids in part.ids])

    def _after_tower(self, merged: Sequence[Tensor], pictures: Pictures, ids: Sequence[Tensor]) -> Phi3VShared:
        """A batch whose pictures the tower has seen: per picture ``(n, 4w)``, per sample ``(length,)``."""
        runs = runs_of(ids, pictures, self.rope_form)
        tables = [rope_tables(run.lengths, run.positions, self.config.rope) for run in runs]
        return Phi3VShared(merged, pictures, ids, list(zip(runs, tables, strict=True)))

    def project(self, model: nn.Module, shared: Phi3VShared) -> Sequence[Tensor]:
        projected = cast(Phi3VModel, model).vision_embed_tokens(torch.cat(list(shared.merged)))
        return shared.pictures.each(projected.split([len(merged) for merged in shared.merged]))

    def stack(self, shared: Phi3VShared, times: int) -> Phi3VShared:
        count = len(shared.pictures.numbers)
        runs = [
            (run.stacked(times, count), (rope[0].repeat(times, 1, 1, 1), rope[1].repeat(times, 1, 1, 1)))
            for run, rope in shared.runs
        ]
        return replace(shared, runs=runs)

    def end_state(self, model: nn.Module, shared: Phi3VShared, image_tokens: Sequence[Tensor]) -> EndState:
        phi, parts = cast(Phi3VModel, model), []
        for run, rope in shared.runs:
            embedded = embed(phi.embed_tokens, run.input_ids, torch.cat([image_tokens[row] for row in run.shown]))
            parts.append(phi.end_hidden(embedded, rope, run.layout))
        return EndState(in_order([run for run, _ in shared.runs], parts), image_tokens)


def read_backbone(folder: Path) -> Phi3VBackbone:
    """From ``config.json`` and ``clip_tower.json`` (absent for the real model) in ``folder``."""
    return Phi3VBackbone(read_phi3v_config(folder / "config.json"), read_clip_config(folder / "clip_tower.json"))
