"""Captions say what the image shows, and can be read back."""

from __future__ import annotations

import pytest

from model.scene_captions import Arrangement, Caption, Field, answer, caption_of, parse_caption
from model.scene_flaws import Artefact, HarmlessSign, ProhibitedSign
from model.scene_grammar import Background, Colour, Group, Kind, Mismatch, Style
from model.scenes import Scene, SceneTruth, asked_spec, draw

SMALL = (96, 96)


def _middle(scene: Scene, group: Group) -> tuple[float, float]:
    """Mean middle of a group's things, in pixels."""
    things = [thing for thing in scene.things if thing.group == group]
    assert len(things) == group.count
    return (
        sum(thing.left + thing.side / 2 for thing in things) / len(things),
        sum(thing.top + thing.side / 2 for thing in things) / len(things),
    )


def test_captions_are_true() -> None:
    arrangements = set()
    for seed in range(200):
        scene = draw(seed, size=SMALL)
        caption = caption_of(scene, has_prompt=True)
        assert sorted(caption.groups, key=repr) == sorted(scene.shown.groups, key=repr)
        assert (caption.background, caption.style) == (scene.shown.background, scene.shown.style)
        assert (caption.artefact, caption.mismatch) == (scene.truth.artefact, scene.truth.mismatch)
        if scene.truth.sign is not None:
            assert caption.sign is scene.truth.sign
        assert caption.sign == (scene.sign.sign if scene.sign else None)
        # reading order, by where the things are in the image
        middles = [_middle(scene, group) for group in caption.groups]
        axis = {Arrangement.ROW: 0, Arrangement.COLUMN: 1, Arrangement.ALONE: 0}[caption.arrangement]
        assert middles == sorted(middles, key=lambda middle: middle[axis])
        assert (caption.arrangement is Arrangement.ALONE) == (len(middles) == 1)
        arrangements.add(caption.arrangement)
    assert arrangements == set(Arrangement)


def test_captions_read_back() -> None:
    for seed in range(200):
        caption = caption_of(draw(seed, size=SMALL), has_prompt=seed % 2 == 0)
        assert parse_caption(caption.text()) == caption


def test_words_of_a_caption() -> None:
    caption = Caption(
        (Group(Kind.PERSON, Colour.RED, 2), Group(Kind.BOX, Colour.ORANGE, 1)),
        Arrangement.COLUMN,
        Background.NIGHT,
        Style.FLAT,
        HarmlessSign.ARROW,
        Artefact.WRONG_ANATOMY,
        has_prompt=True,
        mismatch=Mismatch.COUNT,
    )
    assert caption.text() == "wrong count, wrong anatomy, arrow, two people in red, an orange box, column, night, flat"
    assert caption.words()[3:5] == [
        [(Field.COUNT, "two"), (Field.KIND, "people"), (None, "in"), (Field.COLOUR, "red")],
        [(Field.COUNT, "an"), (Field.COLOUR, "orange"), (Field.KIND, "box")],
    ]


def test_a_caption_without_prompt_tells_nothing_of_it() -> None:
    seed = next(seed for seed in range(100) if draw(seed, size=SMALL).truth.mismatch)
    caption = caption_of(draw(seed, size=SMALL), has_prompt=False)
    assert caption.mismatch is None
    assert Field.MATCH not in {field for part in caption.words() for field, _ in part}


@pytest.mark.parametrize("text", ["", "none, none, a red ball", "none, none, five red balls, alone, night, flat"])
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(text)


def test_harmless_signs_are_named_and_placed() -> None:
    found = set()
    for seed in range(120):
        scene = draw(seed, size=SMALL, truth=SceneTruth())
        if scene.sign is not None:
            found.add(scene.sign.sign)
            bare = draw(seed, size=SMALL, truth=SceneTruth(sign=ProhibitedSign.MURN))
            assert bare.sign is not None
            assert bare.sign.sign is ProhibitedSign.MURN
            # the same place, and the sign is nowhere else
            assert (bare.sign.left, bare.sign.top) == (scene.sign.left, scene.sign.top)
    assert found == set(HarmlessSign)


def test_one_thing_is_flawed_where_things_are() -> None:
    for seed in range(60):
        scene = draw(seed, size=SMALL, truth=SceneTruth(artefact=Artefact.BROKEN_OBJECT))
        assert sum(thing.is_flawed for thing in scene.things) == 1
        assert not any(thing.is_flawed for thing in draw(seed, size=SMALL, truth=SceneTruth()).things)
        assert len(scene.things) == sum(group.count for group in asked_spec(seed).groups)


def test_an_answer_tells_colour_number_and_place() -> None:
    first, second, third = (
        Group(Kind.BALL, Colour.RED, 1),
        Group(Kind.CUP, Colour.BLUE, 3),
        Group(Kind.CAR, Colour.PINK, 2),
    )

    def told(arrangement: Arrangement, *groups: Group) -> list[tuple[str, ...]]:
        caption = Caption(groups, arrangement, Background.SNOW, Style.FLAT, None, None)
        return [answer(caption, group.kind) for group in groups]

    assert told(Arrangement.ALONE, second) == [("blue", "three", "alone")]
    assert told(Arrangement.ROW, first, second) == [("red", "one", "left"), ("blue", "three", "right")]
    assert [words[2] for words in told(Arrangement.COLUMN, first, second, third)] == ["above", "column", "below"]
    assert [words[2] for words in told(Arrangement.ROW, first, second, third)] == ["left", "row", "right"]
    caption = Caption((first,), Arrangement.ALONE, Background.SNOW, Style.FLAT, None, None)
    assert answer(caption, Kind.HOUSE) == ("none",)
