"""Device side of preprocessing: uint8 pictures to what the image towers take, normalised.

Letters: b: pictures of one size, H, W: height and width in pixels, c: side of a crop, a x g: rows and columns of
crops, s: patch side, m: patches per merged side, t: frames per patch, p: patches.
Source: image_processing_phi3_v.py of microsoft/Phi-3.5-vision-instruct; transformers,
models/qwen2_vl/image_processing_qwen2_vl.py and models/llava_next/image_processing_llava_next.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# CLIP's, which all three families use.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: Tensor) -> Tensor:
    """``(b, H, W, 3)`` uint8 to ``(b, 3, H, W)`` float32 with CLIP's mean and deviation."""
    mean = torch.tensor(_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def crops_from_pixels(pixels: Tensor, crop_size: int) -> Tensor:
    """phi3v: a global view followed by the crops in row-major order.

    - pixels: ``(b, H, W, 3)`` uint8, multiples of ``crop_size``
    - returns: ``(b, 1 + a*g, 3, c, c)`` float32
    """
    values = normalised(pixels)
    # Interpolated after normalising, without clamping and without antialias: the model was trained so.
    whole = F.interpolate(values, size=(crop_size, crop_size), mode="bicubic", align_corners=False)
    height, width = values.shape[2:]
    grid = values.reshape(len(values), 3, height // crop_size, crop_size, width // crop_size, crop_size)
    crops = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat((whole[:, None], crops), dim=1)


def patches_from_pixels(pixels: Tensor, patch_size: int, merge_size: int, frames: int) -> Tensor:
    """qwen: one picture as patches, in blocks of ``m x m`` that become one token; a still fills all frames.

    - pixels: ``(H, W, 3)`` uint8, multiples of ``m*s``
    - returns: ``(p, 3*t*s*s)`` float32
    """
    values = normalised(pixels[None])[0]
    height, width = values.shape[1:]
    block = merge_size * patch_size
    grid = values.reshape(
        3, height // block, merge_size, patch_size, width // block, merge_size, patch_size
    )  # (3, rows, m, s, columns, m, s)
    patches = grid.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # (p, 3, s, s)
    return patches[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
