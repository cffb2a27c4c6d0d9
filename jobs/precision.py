"""Measures how far a mode's rewards are from the exact ones: the same inputs, scored twice, compared.

Inputs are a folder of real images and drawn scenes. The two scorers run one after the other, so that a GPU that
holds one of them is enough.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

from jobs.folder_log import Prompts, prompted_images
from jobs.precision_file import ENOUGH, Comparison, Difference, Measured, check_writable, summary, write
from model.code_version import code_version
from model.errors import ConfigError
from model.evaluation.correlation import correlation
from model.modes import EXACT
from model.perspectives import Perspective
from model.policy import Policy, check_applies, decide
from model.policy_file import load_policy
from model.scenes import SIZES, draw
from model.schema import Generation, ScoreRecord
from model.scorer import load, read_identity, resolve

REAL, SCENES = ENOUGH
_BATCH = 32
_ROWS_PER_LINE = 256  # of progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to measure, and on what. ``scenes``: how many, seeds 0 and up; ``images``: a local folder."""

    checkpoint: str
    mode: str
    policy: str
    images: Path | None = None
    prompts: Prompts | None = None
    scenes: int = 1000
    device: str = "cpu"
    dtype: str = "float32"


def measure(job: Job, say: Say) -> Measured:
    """Score everything exactly and in the mode, compare, and write it into the checkpoint's ``precision.json``.

    Fewer inputs than ``ENOUGH`` are measured too, with a warning.

    - raises: ``ConfigError`` for ``exact`` or an unknown mode, one that this checkpoint or device cannot have, a
      policy of other weights, or nothing to score
    """
    if job.mode == EXACT:
        raise ConfigError("mode 'exact' is what the others are compared with; name another one")
    folder = resolve(job.checkpoint)
    check_writable(folder)
    identity = read_identity(job.checkpoint, dtype=job.dtype, mode=job.mode)
    policy = load_policy(job.policy)
    check_applies(policy, identity.checkpoints, identity.vector_perspectives)
    sources = {REAL: lambda: _real(job), SCENES: lambda: _scenes(job.scenes)}
    # The mode first: whatever stands against it is found before the work.
    other, exact = (_scored(job, mode, sources, say) for mode in (job.mode, EXACT))
    sets = {name: compare(exact[name], other[name], policy) for name in sources if exact[name]}
    if not any(one.rows or one.lost for one in sets.values()):
        raise ConfigError("nothing to measure with: name --images FOLDER, or --scenes above 0")
    measured = Measured(
        date=datetime.now(UTC).date(),
        dtype=job.dtype,
        device=_device_name(job.device),
        checkpoints=dict(identity.checkpoints),
        preprocessing_hash=identity.preprocessing_hash,
        is_trained=identity.is_trained,
        policy_id=policy.id,
        policy_hash=policy.content_hash,
        code_version=code_version(),
        sets=sets,
    )
    path = write(folder, job.mode, measured)
    _print(measured, say)
    say(f"written to {path}")
    return measured


def _scored(
    job: Job, mode: str, sources: Mapping[str, Callable[[], Iterator[Generation]]], say: Say
) -> dict[str, list[ScoreRecord]]:
    """Every source through one scorer, which is gone when this returns."""
    scorer = load(job.checkpoint, device=job.device, dtype=job.dtype, mode=mode)
    records: dict[str, list[ScoreRecord]] = {name: [] for name in sources}
    for name, source in sources.items():
        generations, found = source(), records[name]
        while batch := list(islice(generations, _BATCH)):
            found += scorer.score(batch)
            if len(found) % _ROWS_PER_LINE == 0:
                say(f"{mode}: {len(found)} {name}")
    return records


def _real(job: Job) -> Iterator[Generation]:
    if job.images is not None:
        for row in prompted_images(job.images, job.prompts):
            yield Generation(row.generation_id, row.prompt, (job.images / row.name).read_bytes())


def _scenes(count: int) -> Iterator[Generation]:
    for seed in range(count):
        scene = draw(seed, size=SIZES[seed % len(SIZES)])
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG")
        yield Generation(f"scene-{seed}", scene.prompt, buffer.getvalue())


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


def compare(exact: Sequence[ScoreRecord], other: Sequence[ScoreRecord], policy: Policy) -> Comparison:
    """Records of the same generations in the same order.

    A row that only the mode could not score is a fault of the mode: counted, and its verdict changes to ``none``. One
    without an exact reward says nothing of the mode: counted and left out.
    """
    known = [(a, b) for a, b in zip(exact, other, strict=True) if a.error is None]
    pairs = [(a, b) for a, b in known if b.error is None]
    verdicts = [(_verdict(a, policy), _verdict(b, policy)) for a, b in known]
    changed = Counter(f"{before}->{after}" for before, after in verdicts if before != after)
    first = pairs[0][0] if pairs else None
    return Comparison(
        rows=len(pairs),
        lost=len(known) - len(pairs),
        not_scored=len(exact) - len(known),
        perspectives={
            p: _difference(p, pairs) for p in Perspective if first and (p in first.rewards or p in first.reward_vectors)
        },
        changed=dict(changed),
    )


def _verdict(record: ScoreRecord, policy: Policy) -> str:
    verdict = decide(record.rewards, policy).verdict if record.error is None else None
    return str(verdict or "none")


def _difference(perspective: Perspective, pairs: Sequence[tuple[ScoreRecord, ScoreRecord]]) -> Difference:
    is_scalar = perspective in pairs[0][0].rewards
    a, b = (np.array([_values(pair[side], perspective) for pair in pairs]) for side in (0, 1))
    differences = np.abs(a - b)
    spearman = correlation("spearman", a[:, 0], b[:, 0]).coefficient if is_scalar else None
    return Difference(spearman=spearman, largest=float(differences.max()), mean=float(differences.mean()))


def _values(record: ScoreRecord, perspective: Perspective) -> Sequence[float]:
    rewards: Mapping[Perspective, float] = record.rewards
    return (rewards[perspective],) if perspective in rewards else record.reward_vectors[perspective]


def _print(measured: Measured, say: Say) -> None:
    for name, one in measured.sets.items():
        say(f"{name}: {summary(name, one)}; {one.not_scored} left out, which could not be scored exactly")
        for perspective, found in one.perspectives.items():
            spearman = "none" if found.spearman is None else f"{found.spearman:.5f}"
            say(f"  {perspective}: Spearman {spearman}, largest difference {found.largest:.4f}, mean {found.mean:.4f}")
    for name, least in ENOUGH.items():
        rows = measured.sets[name].rows if name in measured.sets else 0
        if rows < least:
            say(f"warning: {rows} {name}, at least {least} are wanted: rare changes of verdict may have been missed")
    if not measured.is_trained:
        say("note: this checkpoint is untrained; the numbers say nothing of a trained one")
