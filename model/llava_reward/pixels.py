"""Device side of preprocessing: the padded uint8 picture to normalised crops.

Letters: b: pictures of one size, H, W: multiples of the crop side c, a x g: rows and columns of crops.
Source: image_processing_phi3_v.py of microsoft/Phi-3.5-vision-instruct.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def crops_from_pixels(pixels: Tensor, crop_size: int) -> Tensor:
    """Normalise, and cut into a global view followed by the crops in row-major order.

    - pixels: ``(b, H, W, 3)`` uint8
    - returns: ``(b, 1 + a*g, 3, c, c)`` float32
    """
    mean = torch.tensor(_CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(_CLIP_STD, device=pixels.device).view(3, 1, 1)
    values = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    # Interpolated after normalising, without clamping and without antialias: the model was trained so.
    whole = F.interpolate(values, size=(crop_size, crop_size), mode="bicubic", align_corners=False)
    height, width = values.shape[2:]
    grid = values.reshape(len(values), 3, height // crop_size, crop_size, width // crop_size, crop_size)
    crops = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat((whole[:, None], crops), dim=1)
