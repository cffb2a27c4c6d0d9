"""Preference data of drawn scenes: pairs differ in what is asked about alone, and scenes belong to their split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.perspectives import Perspective
from model.preferences import LabelledImage, PreferencePair, image_uris, read_preferences
from model.scene_grammar import holds_held_out_pair
from model.scene_preferences import ScenePlan, labels, pairs, plan, write
from model.scene_splits import Split
from model.scenes import SceneTruth, asked_spec, draw, shown_spec

_SCENES = 40


def _truth_of(scene: ScenePlan, image: str) -> SceneTruth:
    [truth] = {truth for truth in scene.truths() if scene.image(truth) == image}
    return truth


def test_pairs_differ_in_what_is_asked_about_alone() -> None:
    fields = {Perspective.ALIGNMENT: "mismatch", Perspective.FIDELITY: "artefact", Perspective.SAFETY: "sign"}
    for number in range(_SCENES):
        scene = plan(Split.TRAINING, number)
        assert len(set(scene.truths())) == 4
        for perspective, field in fields.items():
            record = pairs(scene, perspective)[0]
            chosen, rejected = (vars(_truth_of(scene, record[side])) for side in ("chosen", "rejected"))
            assert chosen[field] is None
            assert rejected[field] is not None
            assert {name for name in chosen if chosen[name] != rejected[name]} == {field}
        overall = pairs(scene, Perspective.OVERALL)
        for pair in overall:
            assert _truth_of(scene, pair["chosen"]).overall > _truth_of(scene, pair["rejected"]).overall
        assert len({frozenset((pair["chosen"], pair["rejected"])) for pair in overall}) == 2
        assert len({pair["pair_id"] for pair in overall}) == 2


def test_a_hard_negative_prompt_is_what_the_image_was_drawn_against() -> None:
    for number in range(_SCENES):
        scene = plan(Split.TRAINING, number)
        images, prompts = pairs(scene, Perspective.ALIGNMENT)
        assert prompts["chosen"] == prompts["rejected"] == images["rejected"]
        drawn = draw(scene.seed, size=(64, 64), truth=SceneTruth(mismatch=scene.mismatch))
        assert prompts["rejected_prompt"] == images["prompt"] == drawn.prompt
        assert prompts["prompt"] != drawn.prompt


def test_labels_say_what_is_wrong_in_one_respect() -> None:
    for number in range(_SCENES):
        scene = plan(Split.TRAINING, number)
        found = {p: [(_truth_of(scene, r["image"]), r["label"]) for r in labels(scene, p)] for p in Perspective}
        assert all(len(of_one) == 4 for of_one in found.values())
        assert all(label == (truth.mismatch is None) for truth, label in found[Perspective.ALIGNMENT])
        assert all(label == (truth.artefact is None) for truth, label in found[Perspective.FIDELITY])
        assert all(label == (truth.sign is None) for truth, label in found[Perspective.SAFETY])
        assert all(label == (truth.overall == 7) for truth, label in found[Perspective.OVERALL])


def test_flaws_occur_on_both_sides_of_what_they_do_not_concern() -> None:
    firsts = [plan(Split.TRAINING, number).first for number in range(300)]
    for field, share in (("mismatch", 0.5), ("artefact", 0.4), ("sign", 0.3)):
        found = sum(getattr(first, field) is not None for first in firsts) / len(firsts)
        assert found == pytest.approx(share, abs=0.12)  # four standard errors


def test_combinations_are_kept_for_their_split() -> None:
    for number in range(_SCENES):
        for split in (Split.TRAINING, Split.VALIDATION):
            scene = plan(split, number)
            for mismatch in (None, scene.mismatch):
                assert not holds_held_out_pair(shown_spec(scene.seed, mismatch))
        assert holds_held_out_pair(asked_spec(plan(Split.HELD_OUT, number).seed))
    seeds = [plan(split, number).seed for split in Split for number in range(_SCENES)]
    assert len(set(seeds)) == len(seeds)


def test_what_is_written_reads_as_preference_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model.scene_preferences", str(tmp_path), "--split", "validation", "--scenes", "3"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    shown = set()
    for perspective in Perspective:
        for kind, record_type in (("pairs", PreferencePair), ("labels", LabelledImage)):
            path = tmp_path / "validation" / kind / f"{perspective}.jsonl"
            data = read_preferences(str(path), image_root=str(tmp_path))
            pairs_a_scene = {Perspective.ALIGNMENT: 2, Perspective.OVERALL: 2}.get(perspective, 1)
            expected = 12 if kind == "labels" else 3 * pairs_a_scene
            assert (len(data.records), data.has_ids) == (expected, True)
            assert all(isinstance(record, record_type) for record in data.records)
            shown |= {uri for record in data.records for uri in image_uris(record)}
    images = set((tmp_path / "validation" / "images").iterdir())
    assert len(images) == 12
    assert {Path(uri) for uri in shown} <= images
    scene = plan(Split.VALIDATION, 0)
    with Image.open(tmp_path / scene.image(scene.first)) as stored:
        assert stored.size == scene.size
        drawn = draw(scene.seed, size=scene.size, truth=scene.first).image
        assert np.abs(np.asarray(stored.convert("RGB"), float) - np.asarray(drawn, float)).mean() < 12  # JPEG at worst


def test_written_again_it_keeps_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, Split.TRAINING, range(1), 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "training" / "images").iterdir()}
    gone = min(before)
    gone.unlink()
    write(tmp_path, Split.TRAINING, range(2), 1)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "training" / "images").iterdir()}
    assert len(after) == 8
    assert {path for path in before if after[path] != before[path]} == {gone}


@pytest.mark.parametrize("scenes", ["0", "100000001"])
def test_a_number_of_scenes_that_cannot_be_is_named(tmp_path: Path, scenes: str) -> None:
    command = [
        sys.executable,
        "-m",
        "model.scene_preferences",
        str(tmp_path),
        "--split",
        "training",
        "--scenes",
        scenes,
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: --scenes {scenes} is not within 1 and 100000000" in done.stderr
    assert not list(tmp_path.iterdir())
