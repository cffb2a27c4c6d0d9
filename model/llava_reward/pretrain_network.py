"""A small phi3v that learns to caption: the reward's own tower, projector and layers, with two heads for training.

The language-model head is the embedding itself, so it adds no weights; the heads that say what each cell of the image
shows, and whether the image contradicts a prompt, are dropped with training. What is written is a backbone folder in
the published layout.

Letters: b: samples, n: tokens, h: hidden size, k: crops, c: side of a crop, m: cells per side of a crop,
v: labels of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model.errors import ConfigError
from model.llava_reward.backbones.layers import Attention, embed, every_token
from model.llava_reward.backbones.phi3v import read_backbone
from model.llava_reward.backbones.phi3v_vision import merge_patches
from model.llava_reward.backbones.rope import rope_tables
from model.llava_reward.pixels import crops_from_pixels
from model.llava_reward.pretrain_data import LABELS, NO_WORD, SHARED, Sample, cells_by_crop

_STORED = torch.bfloat16
_VISION = "model.vision_embed_tokens."


@dataclass(frozen=True)
class SeenSample:
    """A sample whose image the tower has seen: ``cells`` is ``(k, m, m, 4w)``, w the width of the tower."""

    sample: Sample
    cells: Tensor


@dataclass(frozen=True)
class Predictions:
    """What a batch was asked and what the network said.

    - losses: ``(asked,)`` cross-entropy of each asked token, in nats; guesses: ``(asked,)`` the likeliest ids
    - asked: ``(b, n)`` bool, the tokens that were asked; weights: ``(asked,)``
    - wrong: ``(words,)`` logits of the prompts' tokens that the prompt up to there contradicts the image; is_wrong:
      ``(words,)`` float32, whether it does; ends: ``(words,)`` bool, which are end tokens
    """

    losses: Tensor
    guesses: Tensor
    asked: Tensor
    weights: Tensor
    wrong: Tensor
    is_wrong: Tensor
    ends: Tensor


@dataclass(frozen=True)
class TextSight:
    """Which token sees which: ``mask`` is ``(b, 1, n, n)`` bool."""

    mask: Tensor

    @classmethod
    def of(cls, texts: Tensor) -> TextSight:
        """From ``Sample.texts``, padded: ``(b, n)``."""
        sees = (texts[:, None, :] == SHARED) | (texts[:, None, :] == texts[:, :, None])
        return cls(sees.tril()[:, None])

    def mix(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of all tokens: ``(b, n, h)``."""
        return attention.mix(q, k, v, mask=self.mask)


class Bf16Linear(nn.Linear):
    """Multiplies in bfloat16 and answers in float32; weights, optimizer and all else stay in float32.

    Twice as fast where the processor has such instructions. Autocast would take attention along, whose backward pass
    is three times slower in bfloat16 on a CPU.
    """

    def forward(self, values: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(values.bfloat16(), self.weight.bfloat16(), bias).float()


class PretrainNetwork(nn.Module):
    """Backbone and training heads.

    - folder: holds the backbone's configuration files (``small_phi3v.py``)
    - is_mixed: multiply in bfloat16
    """

    def __init__(self, folder: Path, seed: int, *, is_mixed: bool = False) -> None:
        super().__init__()
        self.backbone = read_backbone(folder)
        with torch.device("meta"):
            vision, model = self.backbone.build_vision(), self.backbone.build_model()
        self.vision = vision.to_empty(device="cpu")
        self.model = model.to_empty(device="cpu")
        self.cells = nn.Linear(4 * self.backbone.clip.hidden_size, len(LABELS))
        self.words = nn.Linear(self.backbone.hidden_size, 1)
        _initialise(self, torch.Generator().manual_seed(seed))
        if is_mixed:
            for module in self.modules():
                if type(module) is nn.Linear:
                    module.__class__ = Bf16Linear  # same weights, same names

    def tower_parts(self) -> frozenset[nn.Parameter]:
        """Parameters of the image tower and of the head that says what its cells show."""
        return frozenset((*self.vision.img_processor.parameters(), *self.cells.parameters()))

    def crops(self, samples: Sequence[Sample], fine: int | None) -> tuple[Tensor, Tensor]:
        """Global view and crops of samples, ``(k, 3, c, c)``, and the labels of their cells, ``(k, m*m, v)`` float32.

        - fine: crops of a sample at most, in its ``crop_order``; None: all
        """
        side, merged, crops, labels = self.backbone.clip.image_size, self.backbone.clip.merged_per_side, [], []
        for sample in samples:
            places = torch.from_numpy(np.append(0, 1 + sample.crop_order[:fine]))
            crops.append(crops_from_pixels(torch.from_numpy(sample.pixels)[None], side)[0][places])
            labels.append(torch.from_numpy(cells_by_crop(sample, side, merged)).float()[places])
        return torch.cat(crops), torch.cat(labels)

    def cell_logits(self, crops: Tensor) -> Tensor:
        """What the cells of crops show, by the tower alone: ``(k, 3, c, c)`` to ``(k, m*m, v)``."""
        merged = merge_patches(self.vision.img_processor.vision_model(crops))
        logits: Tensor = self.cells(merged.flatten(1, 2))
        return logits.float()

    @torch.no_grad()
    def see(self, samples: Sequence[Sample]) -> list[SeenSample]:
        """The tower, without gradients."""
        side = self.backbone.clip.image_size
        crops = [crops_from_pixels(torch.from_numpy(sample.pixels)[None], side)[0] for sample in samples]
        return [SeenSample(*pair) for pair in zip(samples, self.vision.see(crops), strict=True)]

    def forward(self, seen: Sequence[SeenSample]) -> Predictions:
        """One pass of all but the tower, over samples of any lengths."""
        samples, side = [one.sample for one in seen], self.backbone.clip.image_size
        grids = [(sample.pixels.shape[0] // side, sample.pixels.shape[1] // side) for sample in samples]
        merged = [self.vision.assemble(one.cells, grid) for one, grid in zip(seen, grids, strict=True)]
        ids, texts = _padded([s.input_ids for s in samples]), _padded([s.texts for s in samples], SHARED)
        embedded = embed(self.model.embed_tokens, ids, self.model.vision_embed_tokens(torch.cat(merged)))
        hidden = self._all_positions(embedded, _padded([s.positions for s in samples]), TextSight.of(texts))
        weights = _padded([s.weights for s in samples])
        asked = weights > 0
        # The state before a token predicts it.
        said = hidden[:, :-1][asked[:, 1:]] @ self.model.embed_tokens.weight.T
        losses = F.cross_entropy(said.float(), ids[asked], reduction="none")
        labels = _padded([s.wrong for s in samples], NO_WORD)
        words = labels != NO_WORD
        wrong = self.words(hidden[words])[:, 0].float()
        goes_on = words[:, 1:] & (texts[:, 1:] == texts[:, :-1])
        ends = (words & ~F.pad(goes_on, (0, 1)))[words]
        return Predictions(losses, said.argmax(-1), asked, weights[asked], wrong, labels[words].float(), ends)

    def _all_positions(self, hidden: Tensor, positions: Tensor, sight: TextSight) -> Tensor:
        """Of all tokens, ``(b, n, h)`` to ``(b, n, h)`` after the final norm. positions: ``(b, n)``."""
        rope = rope_tables(positions.amax(1) + 1, positions, self.backbone.config.rope)
        for layer in self.model.layers:
            hidden = layer(every_token, hidden, rope, sight)
        normed: Tensor = self.model.norm(hidden)
        return normed

    def read(self, folder: Path) -> None:
        """The weights of a backbone; training heads stay as they are. Raises ``ConfigError`` if its sizes differ."""
        stored = load_file(folder / "model.safetensors")
        tensors = self._tensors()
        if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in tensors.items()}:
            raise ConfigError(f"{folder} holds a backbone of other sizes than the configuration's network")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])

    def _tensors(self) -> dict[str, Tensor]:
        """The backbone's weights by published name; the tensors themselves, not copies."""
        vision = {f"{_VISION}{name}": t for name, t in self.vision.state_dict().items()}
        return vision | {f"model.{name}": t for name, t in self.model.state_dict().items()}

    def write(self, folder: Path) -> None:
        """The trained backbone in bfloat16 beside its configuration files, whole or not at all."""
        stored = {name: t.detach().to(_STORED).contiguous() for name, t in sorted(self._tensors().items())}
        partial = folder / "model.safetensors.partial"
        save_file(stored, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # the library keeps it to its owner; a checkpoint is there to be read
        partial.replace(folder / "model.safetensors")


def _padded(values: Sequence[np.ndarray], padding: float = 0) -> Tensor:
    """One row a sample, padded on the right."""
    return pad_sequence([torch.from_numpy(one) for one in values], batch_first=True, padding_value=padding)


def _initialise(network: PretrainNetwork, generator: torch.Generator) -> None:
    """Gaussians that keep activations near one; what is added to the residual stream starts small."""
    depth = {"vision": network.backbone.clip.feature_layers, "model": network.backbone.num_layers}
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if parameter.dim() == 1 and "class_embedding" not in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else len(parameter)
            scale = 1 / math.sqrt(fan_in)
            if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                scale /= math.sqrt(2 * depth[name.split(".")[0]])
            elif name.endswith(("_GN", "position_embedding.weight", "class_embedding")):
                scale = 0.02 if "embedding" in name else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
