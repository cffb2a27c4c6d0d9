"""Phi-3.5-vision without remote code: image feature assembly, projector and language model, original names.

Letters: b: samples, l: padded length, h: hidden size, k: crops, a x g: rows and columns of crops,
m: merged cells per crop side, w: width of the image tower, n: image tokens of one picture.
Source: microsoft/Phi-3.5-vision-instruct, modeling_phi3_v.py and image_embedding_phi3_v.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model.llava_reward.backbones.clip import ClipTower
from model.llava_reward.backbones.interface import Backbone, EndState, SkipCaForm, WeightNames
from model.llava_reward.backbones.lengths import Lengths
from model.llava_reward.backbones.output_rows import output_rows
from model.llava_reward.backbones.rms_norm import RmsNorm
from model.llava_reward.backbones.rope import apply_rope, rope_tables
from model.llava_reward.config import ClipConfig, Phi3VConfig, read_clip_config, read_phi3v_config
from model.llava_reward.pixels import crops_from_pixels

if TYPE_CHECKING:
    import numpy as np


class VisionTowerHolder(nn.Module):
    """Gives the tower its published place, ``img_processor.vision_model``."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.vision_model = ClipTower(config)


class VisionEncoder(nn.Module):
    """Crops to merged tokens with their separators. Frozen in every published recipe, so all perspectives share it."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.img_processor = VisionTowerHolder(config)
        merged = 4 * config.hidden_size
        self.glb_GN = nn.Parameter(torch.empty(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, merged))

    def forward(self, crops: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One sequence of merged tokens per picture.

        - crops: per picture ``(1 + a*g, 3, c, c)``, global view first; no padding crops
        - grids: per picture ``(a, g)``
        - returns: per picture ``(n, 4w)``
        """
        features = self.img_processor.vision_model(torch.cat(list(crops)))
        pieces = torch.split(merge_patches(features), [len(c) for c in crops])
        return [self._assemble(cells, grid) for cells, grid in zip(pieces, grids, strict=True)]

    def _assemble(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """``sub_glb`` order: crops as one picture, separator, global view."""
        whole = self._with_row_ends(cells[:1], (1, 1))
        parts = self._with_row_ends(cells[1:], grid)
        return torch.cat((parts, self.glb_GN[0], whole))

    def _with_row_ends(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(a*g, m, m, 4w)`` laid out as a picture, a row end after each row: ``(a*m * (g*m + 1), 4w)``."""
        (rows, columns), side = grid, cells.shape[1]
        picture = cells.reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        row_ends = self.sub_GN[0].expand(rows * side, 1, -1)
        return torch.cat((picture, row_ends), dim=1).flatten(0, 1)


def merge_patches(features: Tensor) -> Tensor:
    """Join 2x2 patches, row by row within each: ``(k, 2m, 2m, w)`` to ``(k, m, m, 4w)``."""
    crops, side, _, width = features.shape
    half = side // 2
    blocks = features.reshape(crops, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(crops, half, half, 4 * width)


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
    """Causal self-attention with rotary positions.

    Samples are padded on the right, so causality alone keeps real tokens from seeing padding: no mask is built.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.key_value_width = config.num_key_value_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, config.hidden_size + 2 * self.key_value_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _heads(self, values: Tensor, heads: int) -> Tensor:
        return values.view(*values.shape[:-1], heads, self.head_dim).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.num_key_value_heads != self.num_heads:
            repeats = self.num_heads // self.num_key_value_heads
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Every position: ``(b, l, h)`` to ``(b, l, h)``."""
        widths = (self.o_proj.in_features, self.key_value_width, self.key_value_width)
        q, k, v = self.qkv_proj(hidden).split(widths, dim=-1)
        q, k, v = (
            self._heads(q, self.num_heads),
            self._heads(k, self.num_key_value_heads),
            self._heads(v, self.num_key_value_heads),
        )
        return self._mix(apply_rope(q, *rope), apply_rope(k, *rope), v, mask=None)

    def forward_last(self, hidden: Tensor, rope: tuple[Tensor, Tensor], lengths: Lengths) -> Tensor:
        """Only the end token asks, every real token answers: ``(b, l, h)`` to ``(b, 1, h)``."""
        width = self.o_proj.in_features
        q = self._heads(output_rows(self.qkv_proj, lengths.pick_last(hidden), 0, width), self.num_heads)
        k, v = output_rows(self.qkv_proj, hidden, width, width + 2 * self.key_value_width).chunk(2, dim=-1)
        k, v = self._heads(k, self.num_key_value_heads), self._heads(v, self.num_key_value_heads)
        q = apply_rope(q, lengths.pick_last(rope[0]), lengths.pick_last(rope[1]))
        return self._mix(q, apply_rope(k, *rope), v, mask=lengths.key_mask())


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


class Phi3Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Phi3Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Phi3Mlp(config)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """``(b, l, h)`` to ``(b, l, h)``."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out

    def forward_last(self, hidden: Tensor, rope: tuple[Tensor, Tensor], lengths: Lengths) -> Tensor:
        """``(b, l, h)`` to the end tokens' ``(b, 1, h)``."""
        mixed = self.self_attn.forward_last(self.input_layernorm(hidden), rope, lengths)
        end = lengths.pick_last(hidden) + mixed
        out: Tensor = end + self.mlp(self.post_attention_layernorm(end))
        return out


class Phi3VModel(nn.Module):
    """Embeddings, projector and decoder of one perspective; the image tower stands apart and is shared."""

    def __init__(self, config: Phi3VConfig, clip: ClipConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed_tokens = ImageProjector(config, clip)
        self.layers = nn.ModuleList(Phi3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor, image_tokens: Tensor) -> Tensor:
        """Look ids up, and put the projected image tokens, in order, where an id is negative.

        - input_ids: ``(b, l)`` int64; image_tokens: ``(number of negative ids, h)``
        - returns: ``(b, l, h)``
        """
        embedded: Tensor = self.embed_tokens(input_ids.clamp(min=0))
        # Out of place, so that gradients reach both sides when this model is trained.
        slots = (input_ids < 0).unsqueeze(-1).expand_as(embedded)
        return embedded.masked_scatter(slots, image_tokens.to(embedded.dtype))

    def end_hidden(self, embedded: Tensor, rope: tuple[Tensor, Tensor], lengths: Lengths) -> Tensor:
        """Hidden state of the end token after the final norm: ``(b, l, h)`` to ``(b, h)``."""
        for layer in self.layers[:-1]:
            embedded = layer(embedded, rope)
        last = cast(Phi3Layer, self.layers[-1])
        hidden: Tensor = self.norm(last.forward_last(embedded, rope, lengths))
        return hidden.squeeze(1)


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
    """A batch after the tower. ``merged``: per sample ``(n, 4w)``; ``input_ids``: ``(b, l)``, padded on the right."""

    input_ids: Tensor
    merged: Sequence[Tensor]
    rope: tuple[Tensor, Tensor]
    lengths: Lengths


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

    def share(self, vision: nn.Module, batch: Sequence[Phi3VSample]) -> Phi3VShared:
        """The tower runs on real crops only."""
        merged = vision([item.crops for item in batch], [item.grid for item in batch])
        input_ids = pad_sequence([item.input_ids for item in batch], batch_first=True)
        counts = torch.tensor([len(item.input_ids) for item in batch], device=input_ids.device)
        lengths = Lengths(counts, input_ids.shape[1])
        return Phi3VShared(input_ids, merged, rope_tables(counts, lengths.padded, self.config.rope), lengths)

    def join(self, parts: Sequence[Phi3VShared]) -> Phi3VShared:
        ids = [row[:count] for part in parts for row, count in zip(part.input_ids, part.lengths.counts, strict=True)]
        counts = torch.cat([part.lengths.counts for part in parts])
        input_ids = pad_sequence(ids, batch_first=True)
        lengths = Lengths(counts, input_ids.shape[1])
        merged = [item for part in parts for item in part.merged]
        return Phi3VShared(input_ids, merged, rope_tables(counts, lengths.padded, self.config.rope), lengths)

    def project(self, model: nn.Module, shared: Phi3VShared) -> Sequence[Tensor]:
        projected = cast(Phi3VModel, model).vision_embed_tokens(torch.cat(list(shared.merged)))
        return cast(Sequence[Tensor], projected.split([len(m) for m in shared.merged]))

    def end_state(self, model: nn.Module, shared: Phi3VShared, image_tokens: Sequence[Tensor]) -> EndState:
        phi = cast(Phi3VModel, model)
        embedded = phi.embed(shared.input_ids, torch.cat(list(image_tokens)))
        return EndState(phi.end_hidden(embedded, shared.rope, shared.lengths), image_tokens)


def read_backbone(folder: Path) -> Phi3VBackbone:
    """From ``config.json`` and ``clip_tower.json`` (absent for the real model) in ``folder``."""
    return Phi3VBackbone(read_phi3v_config(folder / "config.json"), read_clip_config(folder / "clip_tower.json"))
