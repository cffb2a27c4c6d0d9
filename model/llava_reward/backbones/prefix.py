"""Many captions of one picture: what stands before the captions goes through the language model once.

Under causal attention the start of the text and the image tokens see no caption, so they come out the same for
every caption. The captions stand one behind the other in one sequence, each seeing what stands before all of them
and itself; its positions go on from the picture, as if it stood there alone.

Letters: b: sequences, l: their length, m: captions of one picture, p: tokens before them (image included),
t: length of the joined sequence, h: hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.llava_reward.backbones.layers import Attention, Layout
from model.llava_reward.backbones.lengths import Lengths
from model.llava_reward.backbones.pictures import Pictures

_LEAST_BLOCK = 512  # tokens; smaller products would leave a device idle. Estimated, not measured.


@dataclass(frozen=True)
class Block:
    """Whole captions, tokens ``start`` to ``stop`` of the sequence.

    - mask: ``(stop - start, p + stop - start)`` bool, what they see of the tokens before all captions and of the block
    """

    start: int
    stop: int
    mask: Tensor


@dataclass(frozen=True)
class Joined:
    """Captions one behind the other.

    - before: p; ends: ``(m,)`` int64, where the end tokens stand
    - own: ``(m, t)`` bool, true where a token is the caption's own or stands before all captions
    """

    before: int
    blocks: Sequence[Block]
    ends: Tensor
    own: Tensor

    def mix(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In blocks, or each caption would be compared with all others, only to be masked."""
        p = self.before
        first_k, first_v = k[:, :, :p], v[:, :, :p]
        parts = [attention.mix(q[:, :, :p], first_k, first_v, mask=None)]
        for block in self.blocks:
            span = slice(block.start, block.stop)
            keys = torch.cat((first_k, k[:, :, span]), dim=2)
            values = torch.cat((first_v, v[:, :, span]), dim=2)
            parts.append(attention.mix(q[:, :, span], keys, values, mask=block.mask))
        return torch.cat(parts, dim=1)

    def pick_last(self, values: Tensor) -> Tensor:
        """The end tokens' rows of ``(b, ..., t, d)``: ``(b, ..., m, d)``."""
        return values[..., self.ends, :]

    def key_mask(self) -> Tensor:
        """``(m, t)`` bool."""
        return self.own

    def stacked(self, times: int) -> Joined:
        """It says nothing of single sequences, so it holds for any number of them."""
        return self


@dataclass(frozen=True)
class Run:
    """Samples that go through the language model at once.

    - rows: of the batch, in the order of their end tokens
    - shown: rows whose image tokens go where the ids are negative, in order
    - input_ids: ``(b, l)``; positions: ``(1, l)``, where each token stands in its own sample
    - lengths: ``(b,)`` int64, tokens of the longest sample of each sequence
    """

    rows: Sequence[int]
    shown: Sequence[int]
    input_ids: Tensor
    positions: Tensor
    lengths: Tensor
    layout: Layout

    def stacked(self, times: int, count: int) -> Run:
        """The same for a batch of ``count`` samples ``times`` over, one copy behind the other."""
        return Run(
            [row + count * i for i in range(times) for row in self.rows],
            [row + count * i for i in range(times) for row in self.shown],
            self.input_ids.repeat(times, 1),
            self.positions,
            self.lengths.repeat(times),
            self.layout.stacked(times),
        )


def tokens_before(input_ids: Tensor) -> int:
    """Tokens of one sample up to its last image token, which has a negative id."""
    return int((input_ids < 0).nonzero()[-1]) + 1


def runs_of(ids: Sequence[Tensor], pictures: Pictures, form: Callable[[int], Hashable] = lambda _: None) -> list[Run]:
    """Captions of one picture together, all other samples side by side.

    - ids: per sample ``(length,)``
    - form: of a sample's length, what decides how positions are rotated: only samples of one form share anything
    """
    groups: dict[Hashable, list[int]] = {}
    for row, picture in enumerate(pictures.numbers):
        # Only looked at where a picture repeats: reading ids waits for the device.
        is_repeated = pictures.numbers.count(picture) > 1
        start = tuple(ids[row][: tokens_before(ids[row])].tolist()) if is_repeated else ()
        groups.setdefault((picture, start, form(len(ids[row]))), []).append(row)
    alone = [rows[0] for rows in groups.values() if len(rows) == 1]
    runs = [_joined(ids, rows) for rows in groups.values() if len(rows) > 1]
    return [_side_by_side(ids, alone), *runs] if alone else runs


def in_order(runs: Sequence[Run], parts: Sequence[Tensor]) -> Tensor:
    """What each run gave, ``(rows, h)``, in the order of the batch."""
    rows = [row for run in runs for row in run.rows]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return torch.cat(list(parts))[torch.tensor(order, device=parts[0].device)]


def _side_by_side(ids: Sequence[Tensor], rows: list[int]) -> Run:
    input_ids = pad_sequence([ids[row] for row in rows], batch_first=True)
    counts = torch.tensor([len(ids[row]) for row in rows], device=input_ids.device)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return Run(rows, rows, input_ids, positions, counts, Lengths(counts, input_ids.shape[1]))


def _joined(ids: Sequence[Tensor], rows: list[int]) -> Run:
    device, before = ids[rows[0]].device, tokens_before(ids[rows[0]])
    own = [len(ids[row]) - before for row in rows]
    counts = torch.tensor(own)
    caption = torch.cat((torch.full((before,), -1), torch.arange(len(rows)).repeat_interleave(counts)))  # (t,)
    sees = (caption == torch.arange(len(rows))[:, None]) | (caption < 0)
    ends = (counts.cumsum(0) + before - 1).to(device)
    blocks = [_block(caption, before, *span, device) for span in _spans(own, before)]
    positions = torch.cat([torch.arange(before), *(torch.arange(before, before + n) for n in own)]).to(device)
    joined = torch.cat([ids[rows[0]][:before], *(ids[row][before:] for row in rows)])
    lengths = torch.tensor([before + max(own)], device=device)
    layout = Joined(before, blocks, ends, sees.to(device))
    return Run(rows, rows[:1], joined[None], positions[None], lengths, layout)


def _spans(own: Sequence[int], before: int) -> list[tuple[int, int]]:
    """Start and stop of blocks: as many captions as have not more tokens than stand before them, at least one."""
    limit = max(before, _LEAST_BLOCK)
    spans: list[tuple[int, int]] = []
    for count in own:
        start, stop = spans[-1] if spans else (before, before)
        if spans and stop - start + count <= limit:
            spans[-1] = (start, stop + count)
        else:
            spans.append((stop, stop + count))
    return spans


def _block(caption: Tensor, before: int, start: int, stop: int, device: torch.device) -> Block:
    owner = caption[start:stop]
    itself = (owner[:, None] == owner).tril()
    return Block(start, stop, torch.cat((itself.new_ones(len(owner), before), itself), dim=1).to(device))
