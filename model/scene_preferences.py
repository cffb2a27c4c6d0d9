"""Preference data of drawn scenes: ``python -m model.scene_preferences OUT --split training --scenes 4000``.

    OUT/training/pairs/alignment.jsonl, fidelity.jsonl, safety.jsonl, overall.jsonl    image paths start at OUT
    OUT/training/labels/…                                                              the same; 1: without the flaw
    OUT/training/images/                                       four of each scene, as PNG, JPEG or WebP

The four images of a scene differ in one truth each from the first: in whether it is what the prompt asks for, in an
artefact, in a prohibited sign. So the two images of a pair share prompt, layout and all flaws but the one that is
asked about. Further keys of each record, kept as its group, say what the flaw is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from model.perspectives import Perspective
from model.scene_flaws import Artefact, ProhibitedSign
from model.scene_grammar import Mismatch, SceneSpec, possible_mismatches
from model.scene_splits import Split, belongs, candidate_seeds
from model.scenes import SIZES, SceneTruth, asked_spec, draw, possible_artefacts, prompt_of, shown_spec

# The sizes that are scored, and about half of them: noise and edges look different after shrinking.
_SIZES = (*SIZES, (256, 256), (384, 256), (256, 384), (320, 320))
# As services store images; both images of a pair alike, so that no format tells which is preferred.
_FORMATS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "jpg": ("JPEG", {"quality": 75}),
    "jpeg": ("JPEG", {"quality": 90}),
    "webp": ("WEBP", {"quality": 85, "method": 0}),
}
# How often the first image of a scene has each flaw. Half of the pairs of a perspective then have one in common.
_MISMATCH_SHARE, _ARTEFACT_SHARE, _SIGN_SHARE = 0.5, 0.4, 0.3
_MAX_SCENES = 10**8

Record = dict[str, Any]


@dataclass(frozen=True)
class ScenePlan:
    """One scene of which four images are drawn: ``first``, and that with each of the flaws turned on or off."""

    split: Split
    seed: int
    size: tuple[int, int]
    suffix: str
    first: SceneTruth
    mismatch: Mismatch
    artefact: Artefact
    sign: ProhibitedSign

    def turned(self, perspective: Perspective) -> SceneTruth:
        """``first`` with the flaw of that perspective (not ``OVERALL``) there if it was not, and gone if it was."""
        first = self.first
        if perspective is Perspective.ALIGNMENT:
            return replace(first, mismatch=None if first.mismatch else self.mismatch)
        if perspective is Perspective.FIDELITY:
            return replace(first, artefact=None if first.artefact else self.artefact)
        return replace(first, sign=None if first.sign else self.sign)

    def truths(self) -> tuple[SceneTruth, ...]:
        """The four, ``first`` first."""
        return (self.first, *(self.turned(p) for p in _TURNING))

    def image(self, truth: SceneTruth) -> str:
        """Path of one of the four images, from the folder of the data."""
        flaws = (value or "none" for value in (truth.mismatch, truth.artefact, truth.sign))
        return f"{self.split}/images/{self.seed}-{'-'.join(flaws)}.{self.suffix}"


_TURNING = (Perspective.ALIGNMENT, Perspective.FIDELITY, Perspective.SAFETY)


def plan(split: Split, number: int) -> ScenePlan:
    """Scene ``number`` (from 0) of a split; no scene of ``Split.HELD_OUT`` asks for known combinations only."""
    # Behind all that pretraining has drawn, so that no perspective is taught on what its backbone was.
    for seed in candidate_seeds(split, _MAX_SCENES + number):
        random = Random(f"preferences:{seed}")  # noqa: S311  reproducible, not secret
        asked = asked_spec(seed)
        mismatch = random.choice(possible_mismatches(asked))
        shown = shown_spec(seed, mismatch)
        if belongs(split, asked, asked) and belongs(split, asked, shown):
            return _plan(split, seed, mismatch, (asked, shown), random)
    raise AssertionError(f"no candidate fits {split} {number}")


def _plan(split: Split, seed: int, mismatch: Mismatch, specs: tuple[SceneSpec, SceneSpec], random: Random) -> ScenePlan:
    artefact = random.choice(possible_artefacts(*specs, is_teaching=True))
    sign = random.choice(list(ProhibitedSign))
    first = SceneTruth(
        mismatch if random.random() < _MISMATCH_SHARE else None,
        artefact if random.random() < _ARTEFACT_SHARE else None,
        sign if random.random() < _SIGN_SHARE else None,
    )
    return ScenePlan(split, seed, random.choice(_SIZES), random.choice(list(_FORMATS)), first, mismatch, artefact, sign)


def pairs(scene: ScenePlan, perspective: Perspective) -> list[Record]:
    """The preference pairs of a scene: one; for alignment and overall two."""
    prompt = prompt_of(scene.seed, asked_spec(scene.seed))
    if perspective is Perspective.OVERALL:
        ordered = sorted(scene.truths(), key=lambda truth: -truth.overall)  # no two of them are alike
        random = Random(f"overall:{scene.seed}")  # noqa: S311  reproducible, not secret
        return [
            _pair(scene, "images", prompt, (better, worse), f"{better.overall} over {worse.overall}", number)
            for number, (better, worse) in enumerate(random.sample([*combinations(ordered, 2)], 2))
        ]
    good, bad = sorted((scene.first, scene.turned(perspective)), key=lambda truth: -truth.overall)
    if perspective is not Perspective.ALIGNMENT:
        flaw = scene.artefact if perspective is Perspective.FIDELITY else scene.sign
        return [_pair(scene, "images", prompt, (good, bad), flaw)]
    # Of the other image the prompt that describes it is right, and the one it was drawn against a hard negative.
    right = prompt_of(scene.seed, shown_spec(scene.seed, scene.mismatch))
    return [
        _pair(scene, "images", prompt, (good, bad), scene.mismatch),
        _pair(scene, "prompts", right, (bad, bad), scene.mismatch) | {"rejected_prompt": prompt},
    ]


def labels(scene: ScenePlan, perspective: Perspective) -> list[Record]:
    """The four images with label 1 where nothing is wrong in that respect; for ``OVERALL`` in none."""
    prompt, best = prompt_of(scene.seed, asked_spec(scene.seed)), SceneTruth().grade(perspective)
    return [
        {"image_id": f"{scene.seed}-{number}", "prompt": prompt, "image": scene.image(truth)}
        | {"label": int(truth.grade(perspective) == best), "size": _size(scene)}
        for number, truth in enumerate(scene.truths())
    ]


def _pair(
    scene: ScenePlan, name: str, prompt: str, truths: tuple[SceneTruth, SceneTruth], flaw: str, number: int = 0
) -> Record:
    chosen, rejected = (scene.image(truth) for truth in truths)
    pair = {"pair_id": f"{scene.seed}-{name}-{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | {"flaw": flaw, "kind": name, "size": _size(scene)}


def _size(scene: ScenePlan) -> str:
    return f"{scene.size[0]}x{scene.size[1]}"


def draw_images(scene: ScenePlan, out: Path) -> None:
    """The four images, those that are there already left alone. Their folder must exist."""
    name, options = _FORMATS[scene.suffix]
    for truth in scene.truths():
        path = out / scene.image(truth)
        if not path.exists():
            partial_path = path.with_suffix(".partial")
            draw(scene.seed, size=scene.size, truth=truth).image.save(partial_path, name, **options)
            partial_path.replace(path)


def write(out: Path, split: Split, scenes: Iterable[int], processes: int) -> None:
    """Images first, then the record files, each whole or not at all; run again it draws what is missing."""
    (out / split / "images").mkdir(parents=True, exist_ok=True)
    plans = [plan(split, number) for number in scenes]
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(partial(draw_images, out=out), plans, chunksize=16):
            pass
    for kind, records_of in (("pairs", pairs), ("labels", labels)):
        (out / split / kind).mkdir(exist_ok=True)
        for perspective in Perspective:
            path = out / split / kind / f"{perspective}.jsonl"
            partial_path = path.with_suffix(".partial")
            lines = (json.dumps(record) + "\n" for scene in plans for record in records_of(scene, perspective))
            partial_path.write_text("".join(lines), encoding="utf-8")
            partial_path.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the data of all splits")
    parser.add_argument("--split", type=Split, choices=list(Split), required=True)
    parser.add_argument("--scenes", type=int, required=True, help="how many; more give the same ones, and others")
    parser.add_argument("--processes", type=int, default=1, help="that draw")
    args = parser.parse_args()
    if not 0 < args.scenes <= _MAX_SCENES:
        parser.error(f"--scenes {args.scenes} is not within 1 and {_MAX_SCENES}")
    write(args.out, args.split, range(args.scenes), args.processes)
    print(f"{args.out / args.split}: {args.scenes} scenes of {args.split}, {4 * args.scenes} images")


if __name__ == "__main__":
    main()
