"""The image tower of phi3v: CLIP ViT, up to the last layer but one, with its original tensor names.

Letters: k: crops, c: crop side in pixels, p: patches per side, w: width of the tower.
Source: openai/clip-vit-large-patch14-336 as read by modeling_phi3_v.py (feature ``hidden_states[-2]``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.llava_reward.config import ClipConfig


class ClipEmbeddings(nn.Module):
    """Patches, class token and learned positions."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches_per_side**2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``(k, 3, c, c)`` to ``(k, p*p + 1, w)``, class token first."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens: Tensor = torch.cat((class_token, patches), dim=1) + self.position_embedding.weight
        return tokens


class ClipAttention(nn.Module):
    """Full self-attention."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(k, p*p + 1, w)`` to the same shape."""
        q, k, v = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out_proj(mixed)
        return out


class ClipMlp(nn.Module):
    """Two linear layers around quick-GELU."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.fc1(hidden)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class ClipLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class ClipEncoder(nn.Module):
    """Holds the layers under their published name. The last published layer is not built: nothing reads it."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.feature_layers))


class ClipTower(nn.Module):
    """Crops to patch features."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt so in the files
        self.encoder = ClipEncoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features before the last layer, without the class token and without the closing norm.

        - pixel_values: ``(k, 3, c, c)``, float, normalised with CLIP's mean and deviation
        - returns: ``(k, p, p, w)``
        """
        hidden = self.pre_layrnorm(self.embeddings(pixel_values.to(self.embeddings.class_embedding.dtype)))
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        side = self.config.patches_per_side
        features: Tensor = hidden[:, 1:].unflatten(1, (side, side))
        return features
