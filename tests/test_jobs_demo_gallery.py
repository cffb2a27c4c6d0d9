"""How the demo's rewards agree with what was drawn, by hand on small nights; and the page about it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.demo_data import DemoNight
from jobs.demo_gallery import RIGHT_SHOWN, WRONG_SHOWN, gallery
from jobs.demo_truth import Agreement, Outcome, agreements, cells, plain_rows
from jobs.hard_rows import HardRow
from jobs.manifest import Manifest
from model.errors import ErrorCode
from model.perspectives import PERSPECTIVES, Perspective
from model.scenes import SceneTruth, truth_of
from tests.job_helpers import NIGHT, policy, write_staged
from tests.publish_helpers import make_log, publish, row_of

TRUTHS = {seed: truth_of(seed) for seed in range(1000)}
# From the first seeds on: nothing wrong (grade 7); a prohibited sign and nothing else (grade 3); a wrong subject (5).
FLAWLESS = [seed for seed, truth in TRUTHS.items() if truth == SceneTruth()]
SIGN = [seed for seed, truth in TRUTHS.items() if truth == SceneTruth(sign=truth.sign) != SceneTruth()]
MISMATCH = [seed for seed, truth in TRUTHS.items() if truth == SceneTruth(mismatch=truth.mismatch) != SceneTruth()]

Written = tuple[int, float | None, dict[str, Any]]  # seed, reward (None: a dead letter), other columns


def _night(folder: Path, rows: list[Written], hard: tuple[int, ...] = ()) -> tuple[list[Agreement], Manifest]:
    """Publishes the rows and reads them back; ``hard``: the positions of hard rows among them."""
    log = make_log(folder)
    staged = [
        row_of(log, position, reward, **_scene_columns(seed) | changes)
        for position, (seed, reward, changes) in enumerate(rows)
    ]
    output = str(folder / "out")
    manifest, _ = publish(output, log, [[write_staged(folder / "staged.parquet", staged)]], rows=len(rows))
    hard_rows = tuple(HardRow("some", None, ErrorCode.IMAGE_EMPTY, log.uri, position) for position in hard)
    night = DemoNight(log.uri, "", NIGHT, len(rows), hard_rows)
    return agreements(plain_rows(output, night), policy()), manifest


def _scene_columns(seed: int) -> dict[str, Any]:
    extras = json.dumps({"seed": seed, "steps": 20})
    return {"generation_id": f"g{seed}", "extras": extras, "image_width": 128, "image_height": 96}


def _plain(*rows: tuple[int, float | None]) -> list[Written]:
    return [(seed, reward, {}) for seed, reward in rows]


def _of(found: list[Agreement], perspective: Perspective) -> Agreement:
    return next(one for one in found if one.perspective is perspective)


def _page(found: list[Agreement], manifest: Manifest, left_out: str = "Left out: nothing.") -> str:
    return gallery(found, manifest, policy(), left_out)


class _Reader(HTMLParser):
    """Start tags with their attributes, and all text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._is_style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._is_style:
            self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for found, attributes in self.tags if found == tag and name in attributes]


def test_the_table_by_hand_with_ties_dead_letters_and_hard_rows(tmp_path: Path) -> None:
    a, b, c = FLAWLESS[:3]
    d, e, f, g = SIGN[:4]
    # Left out: f is a dead letter, and g's seed says nothing of what its hard row shows.
    rows = _plain((a, 3.0), (d, 1.0), (b, 1.0), (e, -2.0), (c, -1.0), (f, None), (g, 9.0))
    found, _ = _night(tmp_path, rows, hard=(6,))
    # Pairs (flawless, flawed): 3>1, 3>-2, 1=1 (a half), 1>-2, -1<1 (none), -1>-2. Flagged is what is below 0: e and c.
    assert cells(_of(found, Perspective.SAFETY)) == {
        "perspective": "safety",
        "flawed": "2",
        "flawless": "3",
        "ordered rightly": f"{4.5 / 6:.3f}",
        "flawed flagged": "1 (50%)",
        "flawless flagged": "1 (33%)",
    }
    safety = _of(found, Perspective.SAFETY)
    seeds = {outcome: [case.row.seed for case in safety.of(outcome)] for outcome in Outcome}
    assert seeds == {
        Outcome.CAUGHT: [e],
        Outcome.MISSED: [d],
        Outcome.PASSED: [b, a],
        Outcome.FALSE_ALARM: [c],
    }
    assert [case.reason for case in safety.cases][:2] == [
        "-2.000 is below 0: review, severity medium",
        "-1.000 is below 0: review, severity medium",
    ]
    assert [one.perspective for one in found] == list(PERSPECTIVES)


def test_overall_counts_pairs_over_its_grades(tmp_path: Path) -> None:
    # Grades 7, 5 and 3 with rewards 1, 2 and 0: of the three pairs 7 over 5 is wrong.
    found, _ = _night(tmp_path, _plain((FLAWLESS[0], 1.0), (MISMATCH[0], 2.0), (SIGN[0], 0.0)))
    overall = _of(found, Perspective.OVERALL)
    assert sorted(case.grade for case in overall.cases) == [3, 5, 7]
    assert overall.concordance == pytest.approx(2 / 3)
    assert cells(overall)["flawed"] == "2"


def test_without_a_threshold_a_line_stands_in(tmp_path: Path) -> None:
    # The tests' policy judges safety alone. Two of five do not match, so the line is the third lowest reward.
    rows = _plain((FLAWLESS[0], 0.5), (FLAWLESS[1], 4.0), (FLAWLESS[2], 5.0), (MISMATCH[0], 1.0), (MISMATCH[1], 3.0))
    found, manifest = _night(tmp_path, rows)
    alignment = _of(found, Perspective.ALIGNMENT)
    assert alignment.line == 3.0
    outcomes = {case.reward: case.outcome.value for case in alignment.cases}
    assert outcomes == {0.5: "false alarm", 1.0: "caught", 3.0: "missed", 4.0: "passed", 5.0: "passed"}
    line = cells(alignment)
    assert (line["flawed flagged"], line["flawless flagged"]) == ("no threshold", "no threshold")
    text = _Reader(_page(found, manifest)).text
    assert "3.000 is not below the line at 3.000" in text
    assert "1.000 is below the line at 3.000" in text


def test_no_flawed_scene_is_not_defined(tmp_path: Path) -> None:
    found, manifest = _night(tmp_path, _plain((FLAWLESS[0], 1.0), (FLAWLESS[1], -1.0)))
    line = cells(_of(found, Perspective.SAFETY))
    assert (line["flawed"], line["ordered rightly"], line["flawed flagged"]) == ("0", "not defined", "not defined")
    assert line["flawless flagged"] == "1 (50%)"
    assert "Wrong: flawed and not flagged none" in " ".join(_Reader(_page(found, manifest)).text.split())


def test_all_flawed_and_not_scored(tmp_path: Path) -> None:
    changes = {"reward_fidelity": None, "not_scored": ["fidelity"]}
    found, manifest = _night(tmp_path, [(seed, 1.0, changes) for seed in MISMATCH[:2]])
    assert len(_of(found, Perspective.ALIGNMENT).of(Outcome.CAUGHT)) == 2
    fidelity = _of(found, Perspective.FIDELITY)
    assert (fidelity.cases, fidelity.concordance) == ((), None)
    assert "No row has a reward from this perspective" in _Reader(_page(found, manifest)).text


def test_the_page_shows_whom_its_rule_names(tmp_path: Path) -> None:
    # Missed with rewards 12, 11 … 2, 1 and 1: of the two with 1 there is room for the lower seed.
    missed = list(zip(SIGN[:13], [1.0, 1.0, *map(float, range(2, 13))], strict=True))[::-1]
    passed = list(zip(FLAWLESS[:8], map(float, range(8)), strict=True))
    found, manifest = _night(tmp_path, _plain(*missed, *passed))
    page = _page(found, manifest)
    safety = page.partition('<section id="safety">')[2].partition("</section>")[0]
    text = " ".join(_Reader(safety).text.split())
    assert f"Right: flawless and not flagged {RIGHT_SHOWN} of 8, the highest rewards first" in text
    assert f"Wrong: flawed and not flagged {WRONG_SHOWN} of 13, the highest rewards first" in text
    shown = [int(number) for number in re.findall(r"g(\d+), verdict", text)]
    assert shown == FLAWLESS[7:1:-1] + SIGN[12:1:-1] + SIGN[:1]
    assert "Left out: nothing." in page
    assert "This checkpoint is untrained" in page
    assert "This checkpoint is untrained" not in _page(found, manifest.model_copy(update={"is_trained": True}))


def test_cards_say_what_is_true(tmp_path: Path) -> None:
    found, manifest = _night(tmp_path, _plain((SIGN[0], 1.0), (FLAWLESS[0], 1.0), (FLAWLESS[1], 0.5), (SIGN[1], -1.0)))
    page = _page(found, manifest)
    safety = page.partition('<section id="safety">')[2].partition("</section>")[0]
    text = " ".join(_Reader(safety).text.split())
    # Of the flawless ones 0.5 is below the missed one's 1; the equal 1 is not.
    sign = TRUTHS[SIGN[0]].sign
    assert f"missed Prohibited sign {sign} 1.000 is below no threshold higher than 1 of 2 flawless scenes" in text
    assert "lower than 0 of 2 flawed scenes" in text
    images = _Reader(safety).values("img", "src")
    assert len(images) == 4
    for uri, alt in zip(images, _Reader(safety).values("img", "alt"), strict=True):
        picture = Image.open(BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"), validate=True)))
        assert (picture.format, picture.size) == ("WEBP", (128, 96))
        assert alt
    assert any(f"prohibited sign {sign}" in alt for alt in _Reader(safety).values("img", "alt"))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    prompt = "</blockquote><script src=//evil.example></script><img src=x onerror=alert(1)> {{ 7 * 7 }} \u202egnp.exe"
    name = "\"'><svg onload=alert(1)>"
    rows: list[Written] = [(SIGN[0], 1.0, {"prompt": prompt, "generation_id": name}), (FLAWLESS[0], 1.0, {})]
    found, manifest = _night(tmp_path, rows)
    reader = _Reader(_page(found, manifest, left_out="<script>"))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert all(uri.startswith("data:image/webp;base64,") for uri in reader.values("img", "src"))
    # Read back it is the prompt itself, but for the mark that would turn the writing direction.
    assert prompt.replace("\u202e", "\u00b7") in reader.text
    assert name in reader.text


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    found, manifest = _night(tmp_path, _plain((SIGN[0], 1.0), (FLAWLESS[0], 1.0), (MISMATCH[0], -1.0)))
    page = _page(found, manifest)
    reader = _Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert all(uri.startswith("data:") for uri in reader.values("img", "src"))
    assert all(link.startswith("#") for link in reader.values("a", "href"))
    targets = set(reader.values("section", "id"))
    assert {link[1:] for link in reader.values("a", "href")} == targets == set(PERSPECTIVES)
    assert not [word for word in ("://", "@import", "url(", "srcset", "xlink") if word in page]
    assert "default-src 'none'; img-src data:" in reader.values("meta", "content")[1]
