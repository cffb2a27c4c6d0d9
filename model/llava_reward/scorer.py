"""LLaVA-Reward behind the scorer interface: batches, memory, and records.

Which samples share a pass is decided in ``passes.py``; what a pass computes is in ``network.py``, what a row becomes
before it in ``processor.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.errors import ConfigError, ErrorCode, Stage
from model.golden import check_golden
from model.llava_reward.adapter_form import choose_form
from model.llava_reward.bundle import read_bundle, read_heads, read_identity
from model.llava_reward.checkpoint import load_network
from model.llava_reward.passes import IDS, Cost, picture_numbers, plan_passes
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.quantized import check_device, quantize
from model.meaning import Head
from model.modes import EXACT, ROUNDED_MODES
from model.perspectives import Perspective
from model.ranking import Ranking, rank_images
from model.schema import Generation, RowError, ScoreRecord
from model.scorer import Prepared, RawOutput, to_records

# Tokens of one pass, padding included. On a CPU a pass should fit its caches: 2048 to 4096 were fastest, 16384 took
# a fifth longer (tests/benchmarks/README.md).
MAX_BATCH_TOKENS_CPU = 4096
# Estimated, not measured: at hidden size 3072 in bfloat16 one token takes about 0.2 MB of activations and image
# features, so a pass stays under 4 GB; below some thousand tokens a GPU would idle.
MAX_BATCH_TOKENS_GPU = 16384


class LlavaRewardScorer:
    """Scores generations from the perspectives of one bundle. One thread at a time may call ``forward``."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        mode: str = EXACT,
        adapters: str = "auto",
        max_batch_tokens: int | None = None,
    ) -> None:
        bundle = read_bundle(folder, mode=mode)
        self._folder = folder
        self._device = _device(device)
        check_device(mode, self._device)
        default = MAX_BATCH_TOKENS_CPU if self._device.type == "cpu" else MAX_BATCH_TOKENS_GPU
        self._max_batch_tokens = max_batch_tokens or default
        self._preprocessor = LlavaRewardPreprocessor(bundle)
        self.preprocessing_hash = self._preprocessor.preprocessing_hash
        # Before the network is built: it compares the files with their hashes.
        self.identity = read_identity(folder, dtype=dtype, mode=mode, preprocessing_hash=self.preprocessing_hash)
        asked = "merged" if mode in ROUNDED_MODES else adapters  # eight bits have one form, see check_mode
        form = choose_form(bundle, asked, device=self._device, dtype=getattr(torch, dtype))
        self.placement = form.reason
        self._network = load_network(
            bundle.backbone,
            bundle.adapters,
            device=self._device,
            dtype=getattr(torch, dtype),
            family=bundle.family,
            skip_ca_keys=bundle.skip_ca_keys,
            is_low_rank=form.is_low_rank,
        )
        if mode in ROUNDED_MODES:
            quantize(self._network, mode)
        self.perspectives: tuple[Perspective, ...] = bundle.perspectives
        self.heads: Mapping[Perspective, Head] = read_heads(bundle, self.identity)

    def preprocess(self, generations: Iterable[Generation]) -> list[Prepared]:
        """The CPU step; see ``LlavaRewardPreprocessor.preprocess``."""
        return self._preprocessor.preprocess(generations)

    def forward(self, batch: Sequence[Prepared], perspectives: Sequence[Perspective] | None = None) -> list[RawOutput]:
        """The device step, in passes of at most ``max_batch_tokens`` tokens (see ``plan_passes``).

        Captions of one picture share what does not depend on them, and equal generations are computed once.

        - perspectives: those to score; all of the bundle by default
        - returns: one output per item, in order, whatever the passes were
        - raises: ``ConfigError`` for a perspective that the bundle does not have
        """
        wanted = self._wanted(perspectives)
        scorable = [i for i, item in enumerate(batch) if item.error is None]
        pictures = dict(zip(scorable, picture_numbers([batch[i].arrays for i in scorable]), strict=True))
        first_of: dict[tuple[int, bytes], int] = {}  # equal generations stand for one another
        stands_in = {i: first_of.setdefault((pictures[i], batch[i].arrays[IDS].tobytes()), i) for i in scorable}
        values: dict[int, dict[Perspective, tuple[float, ...]]] = {}
        # One language model takes all perspectives at once, so that each sample stands in the pass that often.
        times = max(1, len(wanted)) if self._network.is_low_rank else 1
        for indices in self._passes(
            {i: pictures[i] for i in first_of.values()}, batch, self._max_batch_tokens // times
        ):
            rows = self._run([batch[i] for i in indices], [pictures[i] for i in indices], wanted)
            values.update(zip(indices, rows, strict=True))
        return [
            RawOutput(item.generation_id, image=item.image, error=item.error)
            if item.error is not None
            else _output(item, values[stands_in[index]])
            for index, item in enumerate(batch)
        ]

    def postprocess(self, outputs: Sequence[RawOutput]) -> list[ScoreRecord]:
        """Records, one per output; general-preference checkpoints fill ``reward_vectors``."""
        return to_records(outputs, self.identity.vector_perspectives)

    def score(
        self, generations: Iterable[Generation], perspectives: Sequence[Perspective] | None = None
    ) -> list[ScoreRecord]:
        """``postprocess(forward(preprocess(generations)))``."""
        return self.postprocess(self.forward(self.preprocess(generations), perspectives))

    def rank(self, prompt: str, images: Sequence[bytes], perspective: Perspective) -> Ranking:
        """See ``model.ranking.rank_images``."""
        return rank_images(self, prompt, images, perspective)

    def check_golden(self) -> None:
        """Score the bundle's ``golden.json``; see ``model.golden.check_golden``."""
        check_golden(self, self._folder)

    def _wanted(self, perspectives: Sequence[Perspective] | None) -> tuple[Perspective, ...]:
        wanted = self.perspectives if perspectives is None else tuple(dict.fromkeys(perspectives))
        unknown = sorted(set(wanted) - set(self.perspectives))
        if unknown:
            have = [p.value for p in self.perspectives]
            raise ConfigError(
                f"perspectives {[str(p) for p in unknown]} are not in checkpoint {self.identity.name}: {have}"
            )
        return wanted

    def _passes(self, pictures: Mapping[int, int], batch: Sequence[Prepared], max_tokens: int) -> list[list[int]]:
        """``pictures``: index into ``batch`` to the number of its picture."""
        costs = {}
        for index, picture in pictures.items():
            prefix = self._network.backbone.prefix_of(batch[index].arrays)
            costs[index] = Cost(len(batch[index].arrays[IDS]), prefix.length, (picture, prefix.key))
        return plan_passes(costs, max_tokens)

    @torch.inference_mode()
    def _run(
        self, batch: Sequence[Prepared], pictures: Sequence[int], wanted: Sequence[Perspective]
    ) -> list[dict[Perspective, tuple[float, ...]]]:
        backbone = self._network.backbone
        shown: dict[int, Any] = {}  # the first sample of each picture
        samples = []
        for item, picture in zip(batch, pictures, strict=True):
            if picture in shown:
                samples.append(backbone.with_picture_of(item.arrays, shown[picture]))
            else:
                samples.append(shown.setdefault(picture, backbone.sample(item.arrays, self._device)))
        rewards = self._network(samples, wanted)
        rows = {p: values.float().tolist() for p, values in rewards.items()}
        return [{p: tuple(rows[p][i]) for p in wanted} for i in range(len(batch))]


def _output(item: Prepared, values: dict[Perspective, tuple[float, ...]]) -> RawOutput:
    bad = [p.value for p, row in values.items() if not all(map(math.isfinite, row))]
    if bad:
        message = f"reward of {', '.join(bad)} is not a finite number; score it in float32"
        return RawOutput(
            item.generation_id, image=item.image, error=RowError(ErrorCode.NON_FINITE_REWARD, Stage.SCORE, message)
        )
    return RawOutput(item.generation_id, values, item.image)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a torch device, such as cpu or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported, expected cpu, cuda or cuda:<number>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch finds no CUDA device; use device=cpu")
    return device


def load_scorer(folder: Path, *, device: str, dtype: str, mode: str, adapters: str) -> LlavaRewardScorer:
    """The scorer of the bundle in ``folder``."""
    return LlavaRewardScorer(folder, device=device, dtype=dtype, mode=mode, adapters=adapters)
