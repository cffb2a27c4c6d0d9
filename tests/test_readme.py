"""The Python examples of the README run as they stand there, and give what their comments say."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def example(word: str) -> str:
    (found,) = [text for text in EXAMPLES if word in text]
    return found


def run(text: str, **given: Any) -> dict[str, Any]:
    # The same names as in the README: what a reader has at hand is given, everything else is in the text.
    exec(compile(text, str(README), "exec"), given)
    return given


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.new("RGB", (64 + 32 * i, 64), colour) for i, colour in enumerate(("red", "teal", "white"))]


def test_ranking(images: list[Image.Image]) -> None:
    files = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    names = run(example("scorer.rank"), file_a=files[0], file_b=files[1], file_c=files[2])
    best = names["ranking"].best
    assert best.index in (0, 1, 2)
    assert 0.5 < best.tournament_score.value < 1


def test_fk_steering(images: list[Image.Image]) -> None:
    names = run(example("make_reward_fn"), images=images, caption="a red ball")
    assert len(set(names["rewards"])) == 3
    assert all(type(reward) is float for reward in names["rewards"])


def test_every_example_is_run() -> None:
    assert len(EXAMPLES) == 2
