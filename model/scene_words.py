"""Says of a drawn scene, in words for people, what it shows and what is wrong with it from each perspective."""

from __future__ import annotations

from model.perspectives import Perspective
from model.scene_flaws import Artefact
from model.scene_grammar import SceneSpec, noun_phrase, place_phrase
from model.scenes import Scene

_ARTEFACTS = {
    Artefact.NOISE: "noise",
    Artefact.BANDING: "banding",
    Artefact.BLOCKING: "blocking, as after far too strong compression",
    Artefact.BLUR: "blur",
    Artefact.BROKEN_OBJECT: "a broken object",
    Artefact.WRONG_ANATOMY: "a person with wrong anatomy",
}
_JUDGED_ALONE = (Perspective.SAFETY, Perspective.ALIGNMENT, Perspective.FIDELITY)  # the worst flaw first


def shown_words(scene: Scene) -> str:
    """What is in the image: ``two red balls and a blue box on a beach``."""
    *others, last = [noun_phrase(group) for group in scene.shown.groups]
    things = f"{', '.join(others)} and {last}" if others else last
    return f"{things} {place_phrase(scene.shown.background)}"


def fault_words(scene: Scene, perspective: Perspective) -> str | None:
    """What is wrong with the scene from that perspective; None where nothing is. Overall: all that is wrong."""
    if perspective is Perspective.ALIGNMENT:
        return None if scene.truth.is_match else _mismatch_words(scene.asked, scene.shown)
    if perspective is Perspective.FIDELITY:
        return None if scene.truth.artefact is None else _ARTEFACTS[scene.truth.artefact]
    if perspective is Perspective.SAFETY:
        return None if scene.truth.sign is None else f"prohibited sign {scene.truth.sign}"
    found = [words for one in _JUDGED_ALONE if (words := fault_words(scene, one)) is not None]
    return "; ".join(found) or None


def truth_words(scene: Scene, perspective: Perspective) -> str:
    """What is true of the scene from that perspective, be it right or wrong."""
    fault = fault_words(scene, perspective)
    if fault is not None:
        return fault
    if perspective is Perspective.ALIGNMENT:
        return "shows what was asked for"
    if perspective is Perspective.FIDELITY:
        return "no artefact"
    if perspective is Perspective.SAFETY:
        return f"a harmless sign, {scene.sign.sign}" if scene.sign else "no sign at all"
    return "nothing is wrong with it"


def _mismatch_words(asked: SceneSpec, shown: SceneSpec) -> str:
    if asked.background is not shown.background:
        return f"asked for it {place_phrase(asked.background)}, shows it {place_phrase(shown.background)}"
    if asked.relation is not shown.relation:
        first, second = (noun_phrase(group) for group in asked.groups[:2])
        return f"asked for {first} {asked.relation} {second}, shows {first} {shown.relation} {second}"
    before, after = next(pair for pair in zip(asked.groups, shown.groups, strict=True) if pair[0] != pair[1])
    return f"asked for {noun_phrase(before)}, shows {noun_phrase(after)}"
