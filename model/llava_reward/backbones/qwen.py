"""Qwen2.5-VL from transformers: tower, merger (the projector) and language model, without ``lm_head``.

Letters: b: samples, l: padded length, h: hidden size, p: patches, w: width of the tower, n: image tokens = p/4.
Source: Qwen/Qwen2.5-VL-7B-Instruct; transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from model.llava_reward.backbones import decoder
from model.llava_reward.backbones.interface import Backbone, EndState, SkipCaForm, WeightNames
from model.llava_reward.backbones.layers import embed
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.prefix import Run, in_order, runs_of
from model.llava_reward.config import read_json
from model.llava_reward.model_config import QWEN_RELEASED_KEYS, read_qwen_config
from model.llava_reward.pixels import patches_from_pixels

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class QwenSample:
    """One sample on the device, without any padding.

    - input_ids: ``(length,)`` int64, negative where an image token goes, the end token last
    - patches: ``(p, 3*t*s*s)`` normalised, in blocks of 2x2 that become one token; t: temporal, s: patch size
    - grid: rows and columns of patches
    """

    input_ids: Tensor
    patches: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class QwenShared:
    """A batch after the tower.

    - features: ``(p of all pictures, w)``, blocks of 2x2 together; grids: per picture, rows and columns of its tokens
    - pictures: which of them each sample shows; ids: per sample ``(length,)``
    - runs: what goes through the language model at once, and the position ids of each, ``(3, b, l)``
    """

    features: Tensor
    grids: Sequence[tuple[int, int]]
    pictures: Pictures
    ids: Sequence[Tensor]
    runs: Sequence[tuple[Run, Tensor]]


class BlocksOnly(nn.Module):
    """Stands where the tower has its merger: joins 2x2 patches and leaves the projection to each perspective."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor) -> Tensor:
        """``(p, w)`` to ``(n, 4w)``."""
        return hidden.reshape(len(hidden) // self.block, -1)


class QwenModel(nn.Module):
    """Merger and language model of one perspective, named as in transformers 5."""

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        merger = qwen2_5_vl.Qwen2_5_VLPatchMerger(
            dim=vision.out_hidden_size, context_dim=vision.hidden_size, spatial_merge_size=vision.spatial_merge_size
        )
        self.visual = nn.ModuleDict({"merger": merger})
        self.language_model = qwen2_5_vl.Qwen2_5_VLTextModel._from_config(
            config.text_config, attn_implementation="sdpa"
        )
        decoder.rebuild_rope(self.language_model)
        decoder.take_apart(self.language_model)


def mrope_positions(input_ids: Tensor, rows: int, columns: int) -> Tensor:
    """Time, row and column of every token of one sample with one image: ``(length,)`` to ``(3, length)``.

    Text counts on in all three; the image's tokens share one time and spread over rows and columns; the text behind
    it goes on after the largest of them.

    - rows, columns: of image tokens
    """
    device = input_ids.device
    start = int((input_ids < 0).int().argmax())
    count, resume = rows * columns, start + max(rows, columns)
    grid = torch.arange(count, device=device)
    image = torch.stack((torch.zeros_like(grid), grid // columns, grid % columns)) + start
    behind = torch.arange(resume, resume + len(input_ids) - start - count, device=device)
    before = torch.arange(start, device=device)
    return torch.cat((before.expand(3, -1), image, behind.expand(3, -1)), dim=1)


def _shared(
    features: Tensor, grids: Sequence[tuple[int, int]], pictures: Pictures, ids: Sequence[Tensor]
) -> QwenShared:
    sizes = pictures.each(grids)
    runs = [(run, _position_ids(run, ids, sizes)) for run in runs_of(ids, pictures)]
    return QwenShared(features, grids, pictures, ids, runs)


def _position_ids(run: Run, ids: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """``(3, b, l)``. The first sample of a run stands for all that follow its tokens with captions of their own.

    - ids, sizes: per sample
    """
    every = []
    for row in run.shown:
        own = mrope_positions(ids[row], *sizes[row])  # (3, length)
        # Behind the image all three count on, however long the caption.
        offset = own[:, -1:] - (len(ids[row]) - 1)
        behind = run.positions + offset  # (3, l)
        known = run.positions[0].clamp(max=own.shape[1] - 1)
        every.append(torch.where(run.positions < own.shape[1], own[:, known], behind))
    return torch.stack(every, dim=1)


class QwenBackbone(Backbone[QwenSample, QwenShared]):
    """Qwen2.5-VL behind the backbone interface."""

    names = WeightNames(
        # Names up to transformers 4 and those since 5, which all become the latter.
        renames=(
            (r"(?:model\.)?visual\.", "model.visual."),
            (r"model\.(?:language_model\.)?", "model.language_model."),
        ),
        unused=re.compile(r"lm_head\.weight|.*\.inv_freq"),
        vision="model.visual.",
        projector="model.visual.merger.",
        layers="model.language_model.layers.",
        projections=decoder.PROJECTIONS,
    )

    def __init__(self, config: Qwen2_5_VLConfig, skip_ca_keys: str) -> None:
        self.config = config
        self.hidden_size, self.num_layers = config.text_config.hidden_size, config.text_config.num_hidden_layers
        self.merge_size: int = config.vision_config.spatial_merge_size
        # The released code looks for keys by an id that no image token has, and so finds none.
        self.skip_ca = SkipCaForm(norm_eps=1e-6, has_image_keys=skip_ca_keys != QWEN_RELEASED_KEYS)

    def build_vision(self) -> nn.Module:
        tower = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            self.config.vision_config, attn_implementation="sdpa"
        )
        decoder.rebuild_rope(tower)
        tower.merger = BlocksOnly(self.merge_size**2)
        return cast(nn.Module, tower)

    def build_model(self) -> QwenModel:
        return QwenModel(self.config)

    def sample(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> QwenSample:
        """``pixels``: ``(H, W, 3)`` uint8, multiples of two patches; ``input_ids``: ``(length,)`` int32."""
        pixels = torch.tensor(arrays["pixels"], device=device)
        ids = torch.tensor(arrays["input_ids"], device=device, dtype=torch.long)
        vision = self.config.vision_config
        size = vision.patch_size
        patches = patches_from_pixels(pixels, size, self.merge_size, vision.temporal_patch_size)
        return QwenSample(ids, patches, (pixels.shape[0] // size, pixels.shape[1] // size))

    def share(self, vision: nn.Module, batch: Sequence[QwenSample]) -> QwenShared:
        """The tower keeps images apart by their grids, so one call takes all of them."""
        pictures = Pictures.of([item.patches for item in batch])
        shown = pictures.once(batch)
        grids = torch.tensor([(1, *item.grid) for item in shown], device=batch[0].input_ids.device)
        patches = torch.cat([item.patches for item in shown])
        merged = vision(patches.to(next(vision.parameters()).dtype), grid_thw=grids).pooler_output  # (n, 4w)
        features = merged.reshape(-1, merged.shape[-1] // self.merge_size**2)
        sizes = [(item.grid[0] // self.merge_size, item.grid[1] // self.merge_size) for item in shown]
        return _shared(features, sizes, pictures, [item.input_ids for item in batch])

    def join(self, parts: Sequence[QwenShared]) -> QwenShared:
        pictures = Pictures.joined([part.pictures for part in parts])
        grids = [grid for part in parts for grid in part.grids]
        features = torch.cat([part.features for part in parts])
        return _shared(features, grids, pictures, [ids for part in parts for ids in part.ids])

    def project(self, model: nn.Module, shared: QwenShared) -> Sequence[Tensor]:
        projected = cast(QwenModel, model).visual["merger"](shared.features)
        return shared.pictures.each(projected.split([rows * columns for rows, columns in shared.grids]))

    def stack(self, shared: QwenShared, times: int) -> QwenShared:
        count = len(shared.pictures.numbers)
        runs = [(run.stacked(times, count), ids.repeat(1, times, 1)) for run, ids in shared.runs]
        return replace(shared, runs=runs)

    def end_state(self, model: nn.Module, shared: QwenShared, image_tokens: Sequence[Tensor]) -> EndState:
        language_model, parts = cast(QwenModel, model).language_model, []
        for run, position_ids in shared.runs:
            shown = torch.cat([image_tokens[row] for row in run.shown])
            embedded = embed(language_model.embed_tokens, run.input_ids, shown)
            parts.append(decoder.end_hidden(language_model, embedded, position_ids, run.layout))
        return EndState(in_order([run for run, _ in shared.runs], parts), image_tokens)


def read_backbone(folder: Path, *, skip_ca_keys: str = QWEN_RELEASED_KEYS) -> QwenBackbone:
    """From ``config.json`` in ``folder``, as published or as transformers 5 writes it."""
    path = folder / "config.json"
    read_qwen_config(path)
    return QwenBackbone(decoder.build_config(path, Qwen2_5_VLConfig, read_json(path)), skip_ca_keys)
