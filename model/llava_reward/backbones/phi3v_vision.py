"""Phi-3.5-vision's image tower and the assembly of its features; the projector behind them is elsewhere.

Letters: k: crops, c: crop side in pixels, a x g: rows and columns of crops, m: merged cells per crop side,
w: width of the image tower, n: image tokens of one picture.
Source: microsoft/Phi-3.5-vision-instruct, image_embedding_phi3_v.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.llava_reward.backbones.clip import ClipTower
from model.llava_reward.config import ClipConfig


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
        return [self.assemble(cells, grid) for cells, grid in zip(self.see(crops), grids, strict=True)]

    def see(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """The tower alone: per picture ``(k, 3, c, c)`` to ``(k, m, m, 4w)``."""
        features = self.img_processor.vision_model(torch.cat(list(crops)))
        return list(torch.split(merge_patches(features), [len(c) for c in crops]))

    def assemble(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """One picture's cells, ``(1 + a*g, m, m, 4w)``, in ``sub_glb`` order: crops as one picture, separator, global
        view. Returns ``(n, 4w)``."""
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
