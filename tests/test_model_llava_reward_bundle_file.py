"""``scorer.json`` for published folders as they are: written, read back, refused where a part is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from model import checkpoint_store
from model.meaning import HeadTraining
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import SHIPPED, load, read_identity
from tests.hub_server import COMMIT, REPO, serving
from tests.llava_reward_bundles import write_bundle

DEMO = SHIPPED / "demo"
GENERATION = Generation("g", "a red ball", (DEMO / "golden" / "0.png").read_bytes())
SAFETY = f"safety={DEMO / 'safety'}"
BACKBONE = ["--backbone", str(DEMO / "backbone")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The demo on a hub; returns its pinned name. The cache is the test's own."""
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    checkpoint_store._fetch.cache_clear()
    with serving({f"demo/{p.relative_to(DEMO).as_posix()}": p.read_bytes() for p in DEMO.rglob("*.*")}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield f"{REPO}@{COMMIT}/demo"
    checkpoint_store._fetch.cache_clear()


def test_a_written_bundle_scores_like_the_one_whose_parts_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(DEMO)  # relative paths are those of the shell, and become absolute
    out = tmp_path / "new" / "mine"
    arguments = ["--backbone", "backbone", "--adapter", "safety=safety", "--adapter", f"overall={DEMO / 'overall'}"]
    options = ["--name", "demo", "--licence", "Apache-2.0", "--num-crops", "4", "--head-training", "safety=cls"]
    assert main(["bundle", str(out), *arguments, *options]) == 0
    monkeypatch.chdir(tmp_path)
    mine, demo = load(out), load("demo")
    printed = capsys.readouterr().out
    [reward], [wanted] = mine.score([GENERATION]), demo.score([GENERATION])
    assert mine.perspectives == (Perspective.SAFETY, Perspective.OVERALL)
    for perspective in mine.perspectives:
        assert mine.identity.checkpoints[perspective] == demo.identity.checkpoints[perspective]
        assert f"{perspective}: {demo.identity.checkpoints[perspective]}" in printed
        assert reward.rewards[perspective] == pytest.approx(wanted.rewards[perspective], abs=1e-5)
    assert (mine.identity.licence, mine.identity.is_trained) == ("Apache-2.0", True)
    assert mine.heads[Perspective.SAFETY].training is HeadTraining("cls")
    assert list(out.iterdir()) == [out / "scorer.json"]


def test_a_bundle_of_parts_inside_its_folder_can_be_moved(tmp_path: Path) -> None:
    for part in ("backbone", "safety"):
        shutil.copytree(DEMO / part, tmp_path / "first" / part)
    arguments = ["--backbone", str(tmp_path / "first" / "backbone"), "--num-crops", "4", "--name", "demo"]
    adapters = ["--adapter", f"safety={tmp_path / 'first' / 'safety'}", "--adapter", f"overall={DEMO / 'overall'}"]
    assert main(["bundle", str(tmp_path / "first"), *arguments, *adapters]) == 0
    values = json.loads((tmp_path / "first" / "scorer.json").read_text())
    assert values["backbone"] == "backbone"
    assert values["adapters"] == {"safety": "safety", "overall": str(DEMO / "overall")}
    (tmp_path / "first").rename(tmp_path / "second")
    mine, demo = load(tmp_path / "second"), load("demo")
    for perspective in (Perspective.SAFETY, Perspective.OVERALL):
        assert mine.identity.checkpoints[perspective] == demo.identity.checkpoints[perspective]


def test_what_is_not_said_has_the_published_value(tmp_path: Path) -> None:
    assert main(["bundle", str(tmp_path / "mine"), *BACKBONE, "--adapter", SAFETY]) == 0
    values = json.loads((tmp_path / "mine" / "scorer.json").read_text())
    assert (values["family"], values["name"], values["num_crops"]) == ("phi3v", "mine", 16)
    assert values["licence"] == "not known"
    assert "head_training" not in values


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_other_families(family: str, tmp_path: Path) -> None:
    parts = write_bundle(tmp_path / "parts", family, {"safety": "bt_plain"})
    arguments = ["--family", family, "--backbone", str(parts / "backbone"), "--adapter", f"safety={parts / 'safety'}"]
    assert main(["bundle", str(tmp_path / "out"), *arguments, "--name", f"tiny-{family}"]) == 0
    assert read_identity(tmp_path / "out").checkpoints == read_identity(parts).checkpoints


def test_parts_elsewhere_are_listed_and_read_at_the_first_load(
    hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", f"overall={hub}/overall", "--adapter", SAFETY, "--name", "demo", "--num-crops", "4"]
    assert main(["bundle", str(tmp_path / "out"), "--backbone", f"{hub}/backbone", *arguments]) == 0
    assert "read at the first load" in "".join(capsys.readouterr())
    assert not (tmp_path / "cache").exists()
    mine, demo = load(tmp_path / "out"), load("demo")
    assert mine.identity.checkpoints == {p: demo.identity.checkpoints[p] for p in mine.perspectives}


@pytest.mark.parametrize(
    ("backbone", "adapter", "message"),
    [
        ("{hub}/nothing", SAFETY, "holds no file that is needed"),
        ("{hub}/safety", SAFETY, "safety holds no config.json, tokenizer.json"),
        ("{hub}/backbone", "safety={hub}/golden", "holds no file that is needed"),
        (str(DEMO / "backbone"), "safety={hub}/safety/lora", "holds no file that is needed"),
        ("org/name@main", SAFETY, "not a full commit hash"),
        ("org/name", SAFETY, "'org/name' is no folder; elsewhere are s3://bucket/folder and org/name@"),
    ],
)
def test_wrong_places_elsewhere_are_errors_at_once(
    hub: str, tmp_path: Path, backbone: str, adapter: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--backbone", backbone.format(hub=hub), "--adapter", adapter.format(hub=hub)]
    assert main(["bundle", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "/nowhere", "--adapter", SAFETY], "'/nowhere' is no folder"),
        ([*BACKBONE, "--adapter", "safety=/nowhere"], "'/nowhere' is no folder"),
        ([*BACKBONE, "--adapter", f"safety={DEMO}"], "has no folder lora/"),
        (["--backbone", str(DEMO), "--adapter", SAFETY], "config.json does not exist"),
        ([*BACKBONE, "--adapter", f"beauty={DEMO / 'safety'}"], "adapters names ['beauty']"),
        ([*BACKBONE, "--adapter", SAFETY, "--adapter", SAFETY], "--adapter: a perspective stands there twice"),
        ([*BACKBONE, "--adapter", SAFETY, "--family", "clip"], "family='clip'"),
        ([*BACKBONE, "--adapter", SAFETY, "--family", "qwen"], "model_type"),
        ([*BACKBONE, "--adapter", SAFETY, "--family", "qwen", "--num-crops", "4"], "unknown keys ['num_crops']"),
        ([*BACKBONE, "--adapter", SAFETY, "--num-crops", "0"], "num_crops=0 must be at least 1"),
        ([*BACKBONE, "--adapter", SAFETY, "--head-training", "overall=bt"], "for perspectives in adapters"),
        ([*BACKBONE, "--adapter", SAFETY, "--head-training", "safety=gpm"], "head_training="),
        ([*BACKBONE, "--adapter", SAFETY, "--name", "a b"], "a name has no blank"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", str(tmp_path / "new" / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_bundle_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "demo")
    before = (copy / "scorer.json").read_bytes()
    assert main(["bundle", str(copy), *BACKBONE, "--adapter", SAFETY]) == 2
    assert "scorer.json is there already" in capsys.readouterr().err
    assert (copy / "scorer.json").read_bytes() == before
