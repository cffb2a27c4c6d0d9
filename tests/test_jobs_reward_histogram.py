"""The drawing of rewards, read back as XML."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from jobs.reward_histogram import reward_histogram


def _bars(svg: ElementTree.Element, kind: str) -> list[tuple[float, float, float]]:
    """x, top and height of each."""
    bars = svg.findall(f"g[@class='{kind}']/rect")
    return [(float(bar.get("x", "")), float(bar.get("y", "")), float(bar.get("height", ""))) for bar in bars]


def test_bars_are_shares_of_their_kind_from_one_scale() -> None:
    svg = ElementTree.fromstring(reward_histogram([0.0, 1.0, 1.0, 1.0], [0.0], [(0.5, "0.5 review")]))
    # 48 bars of 15 pixels. Shares: flawless 1/4 at 0 and 3/4 at 1, flawed 1 at 0, which fills its 60 pixels.
    assert _bars(svg, "flawless") == [(0.5, 67.0, 15.0), (705.5, 37.0, 45.0)]
    assert _bars(svg, "flawed") == [(0.5, 82.0, 60.0)]
    mark = svg.find("line[@class='mark']")
    assert mark is not None
    assert (mark.get("x1"), mark.get("x2")) == ("360.0", "360.0")
    assert [text.text for text in svg.findall("text")] == ["0.5 review", "0.00", "1.00"]
    assert svg.get("aria-label") == "Rewards of 4 flawless and 1 flawed scenes as bars"


@pytest.mark.parametrize(("flawless", "flawed"), [([2.0, 2.0], []), ([], [2.0])])
def test_one_kind_alone_and_equal_rewards(flawless: list[float], flawed: list[float]) -> None:
    svg = ElementTree.fromstring(reward_histogram(flawless, flawed, []))
    assert [height for _, _, height in _bars(svg, "flawless") + _bars(svg, "flawed")] == [60.0]


def test_a_threshold_outside_widens_the_range_and_an_infinite_one_is_left_out() -> None:
    svg = ElementTree.fromstring(reward_histogram([0.0], [0.0], [(-3.0, "<low>"), (math.inf, "never")]))
    assert [text.text for text in svg.findall("text")] == ["<low>", "-3.00", "0.00"]
