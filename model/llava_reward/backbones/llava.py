"""LLaVA-1.6 (LLaVA-NeXT): projector, anyres packing and language model from transformers, the tower from ``clip.py``.

The tower is the same CLIP that phi3v has, and ours leaves out its last layer, which no reward reads.

Letters: b: samples, l: padded length, h: hidden size, k: tiles, c: tile side, p: patches per tile side,
w: width of the tower, n: image tokens of one picture.
Source: llava-hf/llava-v1.6-vicuna-13b-hf; transformers, models/llava_next/modeling_llava_next.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llava_next import modeling_llava_next as llava_next
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig

from model.llava_reward.backbones import decoder
from model.llava_reward.backbones.clip import ClipTower
from model.llava_reward.backbones.interface import Backbone, EndState, WeightNames
from model.llava_reward.backbones.layers import embed
from model.llava_reward.backbones.pictures import Pictures
from model.llava_reward.backbones.prefix import Run, in_order, runs_of
from model.llava_reward.config import ClipConfig, read_json
from model.llava_reward.model_config import read_llava_config
from model.llava_reward.pixels import normalised

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LlavaSample:
    """One sample on the device, without any padding.

    - input_ids: ``(length,)`` int64, negative where an image token goes, the end token last
    - tiles: ``(1 + rows*columns, 3, c, c)`` normalised, the whole picture first
    - image_size: height and width of the picture before any resizing: they decide which patches are padding
    """

    input_ids: Tensor
    tiles: Tensor
    image_size: tuple[int, int]


@dataclass(frozen=True)
class LlavaShared:
    """A batch after the tower.

    - features: ``(tiles of all pictures, p*p, w)``; tiles, image_sizes: per picture
    - pictures: which of them each sample shows; ids: per sample ``(length,)``
    - runs: what goes through the language model at once
    """

    features: Tensor
    tiles: Sequence[int]
    image_sizes: Sequence[tuple[int, int]]
    pictures: Pictures
    ids: Sequence[Tensor]
    runs: Sequence[Run]


class LlavaBackbone(Backbone[LlavaSample, LlavaShared]):
    """LLaVA-1.6 behind the backbone interface."""

    # The released forward has no such branch, and cannot even build its layers.
    skip_ca = None

    def __init__(self, config: LlavaNextConfig, clip: ClipConfig) -> None:
        self.config, self.clip = config, clip
        self.hidden_size, self.num_layers = config.text_config.hidden_size, config.text_config.num_hidden_layers
        last = rf".*vision_tower\.(?:vision_model\.)?encoder\.layers\.{clip.feature_layers}\..*"
        self.names = WeightNames(
            # Names up to transformers 4 and those since 5, which all become the latter.
            renames=(
                (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
                (r"(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
                (r"(?:model\.)?image_newline", "model.image_newline"),
                (r"(?:language_model\.model|model\.language_model)\.", "model.language_model."),
            ),
            unused=re.compile(rf".*lm_head\.weight|.*\.post_layernorm\..*|.*\.position_ids|.*\.inv_freq|{last}"),
            vision="model.vision_tower.",
            projector="model.multi_modal_projector.",
            layers="model.language_model.layers.",
            projections=decoder.PROJECTIONS,
        )

    def build_vision(self) -> ClipTower:
        return ClipTower(self.clip)

    def build_model(self) -> nn.Module:
        """``LlavaNextModel`` without its tower: projector, packing, language model."""
        model = llava_next.LlavaNextModel._from_config(self.config, attn_implementation="sdpa")
        model.vision_tower = nn.Identity()
        decoder.rebuild_rope(model.language_model)
        decoder.take_apart(model.language_model)
        return cast(nn.Module, model)

    def sample(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> LlavaSample:
        """``pixels``: ``(tiles, c, c, 3)`` uint8; ``image_size``: ``(2,)``; ``input_ids``: ``(length,)`` int32."""
        tiles = normalised(torch.tensor(arrays["pixels"], device=device))
        ids = torch.tensor(arrays["input_ids"], device=device, dtype=torch.long)
        height, width = arrays["image_size"].tolist()
        return LlavaSample(ids, tiles, (height, width))

    def share(self, vision: nn.Module, batch: Sequence[LlavaSample]) -> LlavaShared:
        pictures = Pictures.of([item.tiles for item in batch])
        shown = pictures.once(batch)
        features = vision(torch.cat([item.tiles for item in shown])).flatten(1, 2)
        ids, sizes = [item.input_ids for item in batch], [item.image_size for item in shown]
        tiles = [len(item.tiles) for item in shown]
        return LlavaShared(features, tiles, sizes, pictures, ids, runs_of(ids, pictures))

    def join(self, parts: Sequence[LlavaShared]) -> LlavaShared:
        pictures = Pictures.joined([part.pictures for part in parts])
        ids = [own for part in parts for own in part.ids]
        tiles = [count for part in parts for count in part.tiles]
        sizes = [size for part in parts for size in part.image_sizes]
        features = torch.cat([part.features for part in parts])
        return LlavaShared(features, tiles, sizes, pictures, ids, runs_of(ids, pictures))

    def project(self, model: nn.Module, shared: LlavaShared) -> Sequence[Tensor]:
        llava = cast(Any, model)
        projected = llava.multi_modal_projector(shared.features).split(list(shared.tiles))
        # Drops the patches that only show padding, and ends every row with the learned separator, which no adapter
        # stores or changes.
        tokens, _ = llava.pack_image_features(projected, shared.image_sizes, "default", llava.image_newline)
        return shared.pictures.each(tokens)

    def stack(self, shared: LlavaShared, times: int) -> LlavaShared:
        return replace(shared, runs=[run.stacked(times, len(shared.pictures.numbers)) for run in shared.runs])

    def end_state(self, model: nn.Module, shared: LlavaShared, image_tokens: Sequence[Tensor]) -> EndState:
        language_model, parts = cast(Any, model).language_model, []
        for run in shared.runs:
            shown = torch.cat([image_tokens[row] for row in run.shown])
            embedded = embed(language_model.embed_tokens, run.input_ids, shown)
            parts.append(decoder.end_hidden(language_model, embedded, run.positions, run.layout))
        return EndState(in_order(shared.runs, parts), image_tokens)


def read_backbone(folder: Path) -> LlavaBackbone:
    """From ``config.json`` in ``folder``, as published or as transformers 5 writes it."""
    path = folder / "config.json"
    config = decoder.build_config(path, LlavaNextConfig, read_json(path))
    return LlavaBackbone(config, read_llava_config(path).clip)
