"""Measuring a mode against exact rewards, and how a run says it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from jobs import cli, precision, report
from jobs.config import parse_arguments
from jobs.precision import Job, compare, measure
from jobs.precision_file import Comparison, Difference, Precision, describe, precision_of, read, summary
from jobs.progress import Snapshot
from jobs.run import check_configuration, key_of
from jobs.scan import Scan
from model.errors import ConfigError, ErrorCode, Stage
from model.perspectives import Perspective
from model.schema import RowError, ScoreRecord
from model.scorer import Scorer, load, read_identity, resolve
from tests.job_helpers import policy, untrained_copy, write_parquet
from tests.publish_helpers import publish_night
from tests.test_model_llava_reward_processor import png

POLICY = "infra/policies/default.yaml"
P = Perspective.SAFETY
REQUIRED = ["--date", "2026-11-20", "--input", "s3://b/logs", "--output", "s3://b/out"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_copy(tmp_path_factory.mktemp("precision") / "demo")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(90 + 40 * n, 120))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def said(demo: Path, images: Path) -> list[str]:
    """What was printed while int8 was measured for ``demo``."""
    lines = [*describe(precision_of(demo, read_identity(demo, mode="int8")))]
    measure(Job(str(demo), "int8", POLICY, images=images, scenes=5), lines.append)
    return lines


def scored(reward: float) -> ScoreRecord:
    return ScoreRecord("g", {P: reward}, {}, None, None)


def test_a_comparison_worked_out_by_hand() -> None:
    """Safety below 0 is reviewed. Ranks 1 2 3 4 against 1 3 2 4: Spearman 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8."""
    failed = ScoreRecord("g", {}, {}, None, RowError(ErrorCode.IMAGE_EMPTY, Stage.DECODE, "empty"))
    exact = [*map(scored, (-1.0, -0.5, 0.5, 2.0)), failed, scored(1.0)]
    other = [*map(scored, (-1.0, 0.25, 0.0, 3.0)), scored(1.0), failed]
    found = compare(exact, other, policy())
    difference = found.perspectives[P]
    # Differences 0, 0.75, 0.5, 1: 2.25 / 4
    assert (difference.spearman, difference.largest, difference.mean) == (pytest.approx(0.8), 1.0, 0.5625)
    assert (found.rows, found.lost, found.not_scored) == (4, 1, 1)
    assert found.changed == {"review->allow": 1, "allow->none": 1}


def test_a_mode_that_gives_no_reward_at_all_is_no_good_mode() -> None:
    failed = ScoreRecord("g", {}, {}, None, RowError(ErrorCode.NON_FINITE_REWARD, Stage.SCORE, "not finite"))
    found = compare([scored(1.0), scored(-1.0)], [failed, failed], policy())
    assert (found.rows, found.lost, found.perspectives) == (0, 2, {})
    assert found.changed == {"allow->none": 1, "review->none": 1}
    wanted = "no Spearman, no difference, 2 without a reward in this mode, 2 verdicts changed"
    assert wanted in summary("scenes", found)


def test_no_order_and_no_scalar_mean_no_spearman() -> None:
    assert compare([scored(1.0)] * 3, [scored(1.5)] * 3, policy()).perspectives[P].spearman is None
    vectors = [ScoreRecord("g", {}, {P: (1.0, y)}, None, None) for y in (0.0, 1.0)]
    moved = [ScoreRecord("g", {}, {P: (1.0, y)}, None, None) for y in (0.5, 1.0)]
    found = compare(vectors, moved, policy()).perspectives[P]
    assert (found.spearman, found.largest, found.mean) == (None, 0.5, 0.125)
    assert compare([], [], policy()).rows == 0


def test_measuring_writes_what_a_run_then_says(demo: Path, said: list[str]) -> None:
    assert "was not measured for this checkpoint" in said[0]
    measured = read(demo)["int8"]["float32"]
    assert {name: (one.rows, one.not_scored) for name, one in measured.sets.items()} == {
        "real images": (3, 1),
        "scenes": (5, 0),
    }
    assert all(0 < one.perspectives[p].largest < 0.25 for one in measured.sets.values() for p in Perspective)
    text = "\n".join(said)
    assert "warning: 3 real images, at least 200 are wanted" in text
    assert "this checkpoint is untrained" in text
    lines = describe(precision_of(demo, read_identity(demo, mode="int8")))
    assert lines[0].startswith("mode int8 in float32: these rewards are not exact; against exact ones, measured ")
    assert any("scenes: 5, which is few (at least 1000 are wanted); least Spearman" in line for line in lines)


def test_modes_are_measured_side_by_side(demo: Path, said: list[str]) -> None:
    before = read(demo)["int8"]["float32"]
    few = measure(Job(str(demo), "few_crops", POLICY, scenes=2), lambda line: None)
    half = measure(Job(str(demo), "int8", POLICY, scenes=1, dtype="bfloat16"), lambda line: None)
    assert read(demo) == {"int8": {"float32": before, "bfloat16": half}, "few_crops": {"float32": few}}
    for dtype, measured in (("float32", before), ("bfloat16", half)):
        assert precision_of(demo, read_identity(demo, mode="int8", dtype=dtype)).measured == measured


def test_each_scorer_is_loaded_once(demo: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def counted(name: str, **settings: str) -> Scorer:
        loaded.append(settings["mode"])
        return load(name, **settings)

    monkeypatch.setattr(precision, "load", counted)
    measure(Job(str(demo), "few_crops", POLICY, images=images, scenes=1), lambda line: None)
    assert loaded == ["few_crops", "exact"]


def test_numbers_of_other_crops_do_not_count(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve("demo"), tmp_path / "demo"))
    measure(Job(str(folder), "few_crops", POLICY, scenes=1), lambda line: None)
    before = read_identity(folder, mode="few_crops")
    values = json.loads((folder / "scorer.json").read_text())
    (folder / "scorer.json").write_text(json.dumps({**values, "num_crops": 16}))
    after = read_identity(folder, mode="few_crops")
    assert after.checkpoints == before.checkpoints
    assert precision_of(folder, before).measured is not None
    assert precision_of(folder, after).measured is None


@pytest.mark.usefixtures("said")
def test_numbers_are_for_one_checkpoint_mode_and_dtype_alone(demo: Path, tmp_path: Path) -> None:
    entry = {"float32": json.loads((demo / "precision.json").read_text())["int8"]["float32"]}
    demo = Path(shutil.copytree(demo, tmp_path / "demo"))
    (demo / "precision.json").write_text(json.dumps({"int8": entry}))  # whatever other tests have measured
    identity = read_identity(demo, mode="int8")
    assert precision_of(demo, identity).measured is not None
    other = dataclasses.replace(identity, checkpoints={**identity.checkpoints, P: "demo@sha256:" + "0" * 64})
    for changed in (other, read_identity(demo, mode="int8", dtype="bfloat16")):
        assert precision_of(demo, changed).measured is None
    assert precision_of(demo, read_identity(demo)) == Precision(dtype="float32", mode="exact")


def test_an_exact_run_says_nothing_and_so_does_an_old_one() -> None:
    assert describe(None) == describe(Precision(dtype="float32", mode="exact")) == []


@pytest.mark.usefixtures("said")
def test_the_report_of_a_run_holds_the_numbers(tmp_path: Path, demo: Path) -> None:
    log = write_parquet(tmp_path / "a.parquet", [{"x": 1}])
    found = precision_of(demo, read_identity(demo, mode="int8"))
    _, manifest = publish_night(tmp_path, log, precision=found)
    report.write(str(tmp_path / "out"), manifest, Snapshot(), 1.0, 0, 0)
    content = json.loads(Path(report.uri_of(str(tmp_path / "out"), manifest)).read_text())
    assert content["precision"] == describe(found)
    assert content["night"]["precision"]["mode"] == "int8"
    assert set(content["night"]["precision"]["measured"]["sets"]) == {"real images", "scenes"}


def test_every_verdict_that_changed_is_counted() -> None:
    one = Comparison(
        rows=1000,
        lost=0,
        not_scored=0,
        perspectives={P: Difference(spearman=0.99, largest=0.1, mean=0.01)},
        changed={"allow->review": 1, "review->block": 3},
    )
    wanted = "1000; least Spearman 0.9900 (safety), largest difference 0.1 (safety), 4 verdicts changed"
    assert summary("scenes", one) == f"{wanted} (review->block 3, allow->review 1)"


def test_a_mode_has_a_run_key_of_its_own() -> None:
    keys = set()
    for mode in ("exact", "int8", "few_crops"):
        config = parse_arguments([*REQUIRED, "--mode", mode])
        identity, _ = check_configuration(config)
        keys.add(key_of(config, Scan((), False), identity))
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "int4"], "mode='int4' is unknown"),
        (["--mode", "exact"], "mode 'exact' is what the others are compared with"),
        (["--mode", "fp8"], "computes in bfloat16"),
        (["--mode", "fp8", "--dtype", "bfloat16"], "not device='cpu'"),
        (["--mode", "int8", "--scenes", "0"], "nothing to measure with"),
        (["--mode", "int8", "--images", "/nowhere"], "no such folder: /nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    demo: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["precision", "--checkpoint", str(demo), "--policy", POLICY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_malformed_file_is_named_before_any_work(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve("demo"), tmp_path / "demo"))
    (folder / "precision.json").write_text('{"int8": {"float32": {}}}')
    with pytest.raises(ConfigError, match=r"precision\.json cannot be used"):
        measure(Job(str(folder), "int8", POLICY, scenes=1), print)
