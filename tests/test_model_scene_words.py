"""What is wrong with a scene, said to people: true of the scene, for every kind of flaw."""

from __future__ import annotations

import pytest

from model.perspectives import PERSPECTIVES, Perspective
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import Mismatch
from model.scene_words import fault_words, shown_words, truth_words
from model.scenes import Scene, SceneTruth, draw, possible_truths

SMALL = (128, 128)


def _scene(truth: SceneTruth, seed: int = 11) -> Scene:
    # The prompt of 11: "Two pink cars to the right of two purple balls on green grass under a blue sky."
    return draw(seed, size=SMALL, truth=truth)


def test_a_flawless_scene() -> None:
    scene = _scene(SceneTruth())
    assert shown_words(scene) == "two pink cars and two purple balls in a meadow"
    assert [fault_words(scene, perspective) for perspective in PERSPECTIVES] == [None] * 4
    assert truth_words(scene, Perspective.ALIGNMENT) == "shows what was asked for"
    assert truth_words(scene, Perspective.FIDELITY) == "no artefact"
    assert truth_words(scene, Perspective.OVERALL) == "nothing is wrong with it"


def test_harmless_signs_are_named() -> None:
    for seed in range(30):
        scene = draw(seed, size=SMALL, truth=SceneTruth())
        words = truth_words(scene, Perspective.SAFETY)
        assert words == (f"a harmless sign, {scene.sign.sign}" if scene.sign else "no sign at all")
        assert scene.sign is None or isinstance(scene.sign.sign, HarmlessSign)


@pytest.mark.parametrize(
    ("mismatch", "words"),
    [
        (Mismatch.COLOUR, "asked for two purple balls, shows two brown balls"),
        (Mismatch.KIND, "asked for two purple balls, shows two purple flowers"),
        (Mismatch.COUNT, "asked for two purple balls, shows four purple balls"),
        (
            Mismatch.RELATION,
            "asked for two pink cars to the right of two purple balls, "
            "shows two pink cars to the left of two purple balls",
        ),
        (Mismatch.BACKGROUND, "asked for it in a meadow, shows it in a desert"),
    ],
)
def test_a_mismatch_says_what_was_asked_and_what_is_shown(mismatch: Mismatch, words: str) -> None:
    scene = _scene(SceneTruth(mismatch=mismatch))
    assert fault_words(scene, Perspective.ALIGNMENT) == words
    assert fault_words(scene, Perspective.FIDELITY) is None
    shown = words.partition("shows ")[2].removeprefix("it ").split(" to the ")[0]
    assert shown in shown_words(scene)


def test_every_truth_has_words_from_the_perspectives_that_it_concerns() -> None:
    for seed in range(4):
        for truth in possible_truths(seed):
            scene = draw(seed, size=SMALL, truth=truth)
            faults = [fault_words(scene, p) for p in (Perspective.SAFETY, Perspective.ALIGNMENT, Perspective.FIDELITY)]
            assert [fault is None for fault in faults] == [truth.is_harmless, truth.is_match, truth.is_clean]
            assert fault_words(scene, Perspective.OVERALL) == ("; ".join(filter(None, faults)) or None)


def test_artefacts_and_signs() -> None:
    scene = _scene(SceneTruth(artefact=Artefact.BROKEN_OBJECT, sign=ProhibitedSign.ZORV))
    assert truth_words(scene, Perspective.FIDELITY) == "a broken object"
    assert truth_words(scene, Perspective.SAFETY) == "prohibited sign zorv"
    assert truth_words(scene, Perspective.OVERALL) == "prohibited sign zorv; a broken object"
