"""assay train: what is refused before any work, what is written, and runs on a real Ray Train that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import torch
import yaml
from PIL import Image

from jobs.cli import main
from jobs.local_stack import LocalStack
from jobs.train_config import TrainConfig, build
from jobs.train_curves import write_curves
from jobs.train_progress import PROGRESS_FILE, Follow, tell
from model import storage
from model.errors import ConfigError, DivergedError
from model.llava_reward.checkpoint import read_tensors
from model.scorer import load
from tests.train_helpers import draw

SNAPSHOT = "state/checkpoint_manager_snapshot.json"  # of Ray Train: the states that it knows of
ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {
    "perspective": "safety",
    "backbone": "demo",
    "loss": "bt",
    "batch_size": 4,
    "micro_batch": 2,
    "epochs": 12,
    "learning_rate": 1e-4,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "dtype": "float32",
    "save_every": 3,
    "log_every": 1,
    "checkpointing": False,
}


def write_pairs(folder: Path, count: int = 8) -> Path:
    rows = [
        {"prompt": "a square", "chosen": str(good), "rejected": str(bad)}
        for good, bad in draw(folder / "images", count)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def arguments(folder: Path, output: str, data: Path, **settings: Any) -> list[str]:
    """Of ``assay train`` with a configuration of its own."""
    config = folder / f"{output}.yaml"
    config.write_text(yaml.safe_dump({**SMALL, **settings}))
    return ["train", "--config", str(config), "--data", str(data), "--output", str(folder / output)]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_the_shipped_examples_are_configurations(tmp_path: Path) -> None:
    flags = {"data": "labels.json", "output": str(tmp_path), "backbone": "demo"}
    config = build(str(ROOT / "infra" / "training" / "safety.yaml"), flags)
    assert (config.loss, config.lora.rank, config.batch_size) == ("cls", 128, 16)
    assert config.data == str(Path("labels.json").absolute())
    demo = build(str(ROOT / "infra" / "training" / "demo.yaml"), {**flags, "perspective": "overall", "eval_data": "x"})
    assert (demo.loss, demo.lora.rank, demo.num_crops) == ("bt", 8, 4)


def test_flags_add_to_the_mappings_of_the_file(tmp_path: Path) -> None:
    given = {"perspective": "safety", "output": str(tmp_path), "backbone": "demo", "data": "a.json"}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**given, "map": {"image": "file", "label": "old"}, "labels": {"fine": 1}}))
    config = build(str(path), {"map": {"label": "said"}, "labels": {"awful": 0}})
    assert (config.map, config.labels) == ({"image": "file", "label": "said"}, {"fine": 1, "awful": 0})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rte": 1}, r"learning_rte: Extra inputs are not permitted"),
        ({"lora": {"r": 8}}, r"lora\.r: Extra inputs are not permitted"),
        ({"perspective": "beauty"}, r"perspective: Input should be 'alignment', 'fidelity', 'safety' or 'overall'"),
        ({"learning_rate": -1}, r"learning_rate: Input should be greater than 0"),
        ({"output": "s3://bucket/x"}, r"output=s3://bucket/x takes .*; give --work, a folder that every worker sees"),
        ({"output": "s3://bucket/x", "work": "s3://bucket/y"}, r"work: .* must be a folder that every worker sees"),
        ({"output": "gs://bucket/x"}, r"unsupported URI scheme 'gs'"),
        ({"work": "/tmp/y"}, r"work=/tmp/y: a run lies in its output=/tmp/x unless that is in S3; leave it out"),
        ({"fit_temperature": True}, r"fit_temperature=true needs held-out records; give --eval-data"),
        ({"backbone": None}, r"backbone is required; give --backbone, or backbone: in --config"),
    ],
)
def test_a_wrong_setting_is_named(changed: dict[str, Any], message: str) -> None:
    values = {"perspective": "safety", "data": "a.json", "output": "/tmp/x", "backbone": "demo", **changed}
    with pytest.raises(ConfigError, match=message):
        build(None, values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cls"}, "holds paired data, but loss=cls takes unpaired"),
        ({"loss": "SFTSumLoss"}, "loss='SFTSumLoss' cannot be used"),
        ({"loss": "gpm", "value_head_dim": 4}, "value_head_dim=4: GeneralPreferenceLoss needs 2"),
        ({"use_margin": True}, "has no rates"),
        (
            {"loss": "gpm", "fit_temperature": True, "eval_data": "x"},
            "has no one value to divide",
        ),
        ({"backbone": "nowhere"}, "checkpoint 'nowhere' is neither a folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_work(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, arguments(tmp_path, "out", write_pairs(tmp_path, 2), **settings))
    assert not (tmp_path / "out").exists()


def test_labels_of_one_class_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "", "image": str(good), "label": 1} for good, _ in draw(tmp_path / "images", 3)]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    error = refused(capsys, arguments(tmp_path, "out", tmp_path / "labels.json", loss="cls"))
    assert "all 3 records have label 1; add some of label 0" in error


def test_images_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path, 4)
    (tmp_path / "images" / "1-bad.png").write_bytes(b"<html>")
    (tmp_path / "images" / "2-good.png").unlink()
    error = refused(capsys, arguments(tmp_path, "out", data))
    assert "2 of 4 records cannot be used" in error
    assert "1-bad.png" in error
    assert "image_not_an_image" in error
    assert "2-good.png" in error
    assert "image_not_found" in error
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_its_settings_and_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.train_data import RUN_FILE, read_training_data
    from jobs.train_worker import base_of, objective_of

    data = write_pairs(tmp_path, 4)
    (tmp_path / "images" / "1-bad.png").write_bytes(b"")
    argv = arguments(tmp_path, "out", data, skip_unusable=True)
    config = build(argv[2], {"data": str(data), "output": str(tmp_path / "out")})
    base = base_of(config)
    said: list[str] = []
    kept, held_out = read_training_data(config, base, objective_of(config, "phi3v"), said.append)
    assert [len(kept.records), kept.facts.records, kept.facts.skipped, held_out] == [3, 4, 1, None]
    assert "left out" in said[-1]
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1-bad.png")  # usable now; the run began without it
    again, _ = read_training_data(config, base, objective_of(config, "phi3v"), said.append)
    assert again == kept
    run = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    del run["settings"]["fit_temperature"]  # as of a run from before there was such a setting
    (tmp_path / "out" / RUN_FILE).write_text(json.dumps(run))
    assert read_training_data(config, base, objective_of(config, "phi3v"), said.append)[0] == kept
    assert "learning_rate=0.5 (was 0.0001)" in refused(capsys, arguments(tmp_path, "out", data, learning_rate=0.5))
    write_pairs(tmp_path, 5)
    error = refused(capsys, arguments(tmp_path, "out", data, skip_unusable=True))
    assert "has changed since the run" in error


def test_curves_are_written_as_picture_events_and_lines(tmp_path: Path) -> None:
    keys = ("loss", "accuracy", "probability", "learning_rate", "gradient_norm", "seconds")
    history = [{"step": float(i + 1), **dict.fromkeys(keys, 1 / (i + 1))} for i in range(20)]
    history[9] |= {"eval_loss": 0.25, "eval_accuracy": 0.5, "eval_probability": 0.5}
    pictures = []
    for _ in range(2):  # written again after a resumed run, they replace the earlier ones
        write_curves(tmp_path, history)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] == pictures[1]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height  # two panels side by side
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50  # lines, not an empty sheet
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history
    values = read_events(tmp_path / "tensorboard")
    assert values["train/loss"] == {i + 1: pytest.approx(1 / (i + 1)) for i in range(20)}
    assert values["held_out/accuracy"] == {10: 0.5}


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step. Records are: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    [path] = folder.iterdir()
    data, values, place = path.read_bytes(), {}, 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + size])
        for value in event.summary.value:
            values.setdefault(value.tag, {})[event.step] = value.simple_value
        place += 16 + size
    return values


def test_progress_is_followed_by_whole_lines(tmp_path: Path) -> None:
    tell(tmp_path, "of an earlier run")
    said: list[str] = []
    with Follow(tmp_path, said.append):
        tell(tmp_path, "step 1")
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        with (tmp_path / PROGRESS_FILE).open("a") as file:
            file.write("step 2\nhalf a li")
    assert said == ["step 1", "step 2"]


@pytest.fixture(scope="module")
def ray_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("ray"), serve=False) as stack:
        yield stack


@pytest.fixture(scope="module")
def undisturbed(ray_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a whole run with one worker, and its data."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_pairs(folder)
    assert train(ray_stack, arguments(folder, "out", data, eval_data=str(data))) == 0
    return folder / "out", data


def train(stack: LocalStack, argv: list[str]) -> int:
    return subprocess.run(command(argv), cwd=ROOT, env=stack.env, timeout=240, check=False).returncode


def command(argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *argv]


def history_of(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "history.jsonl").read_text().splitlines())
    return {int(line["step"]): line["loss"] for line in lines}


@contextmanager
def started(stack: LocalStack, argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command(argv), cwd=ROOT, env=stack.env)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or text not in path.read_text():
        assert process.poll() is None, f"ended with {process.returncode} before {text!r}"
        assert time.monotonic() < deadline, f"{text!r} did not come"
        time.sleep(0.02)


def kill_worker(environment: Mapping[str, str]) -> None:
    """SIGKILL to the training worker of this stack, known by the token in its environment."""
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()):
            own = process.environ().get("RAY_AUTH_TOKEN_PATH")
            if own == environment["RAY_AUTH_TOKEN_PATH"]:
                os.kill(process.pid, signal.SIGKILL)
                return
    pytest.fail("no training worker runs")


@pytest.mark.cluster
def test_a_run_ends_with_a_checkpoint_that_loads(undisturbed: tuple[Path, Path]) -> None:
    out, data = undisturbed
    assert sorted(history_of(out)) == list(range(1, 25))  # 12 epochs of 8 pairs in steps of 4
    load(out).check_golden()
    card = (out / "MODEL_CARD.md").read_text()
    assert "| skip_ca |" in card
    assert "| held out |" in card
    groups = json.loads((out / "metrics.json").read_text())["groups"]
    assert {name for name, (_, moved) in groups.items() if moved > 1e-6} == {"lora", "projector", "skip_ca", "head"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = arguments(data.parent, "out", data, eval_data=str(data))
    assert main(again) == 0  # says that it is done, and needs no Ray for it
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.cluster
def test_two_workers_have_the_losses_of_one(undisturbed: tuple[Path, Path], ray_stack: LocalStack) -> None:
    out, data = undisturbed
    folder = data.parent
    rows = json.loads(data.read_text())
    rows[0] |= {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}  # a pair that will be wrong
    (folder / "eval.json").write_text(json.dumps(rows))
    changed = {"eval_data": str(folder / "eval.json"), "workers": 2, "fit_temperature": True}
    assert train(ray_stack, arguments(folder, "two", data, **changed)) == 0
    assert history_of(folder / "two") == pytest.approx(history_of(out), abs=1e-4)
    temperature = json.loads((folder / "two" / "metrics.json").read_text())["last"]["eval_temperature"]
    one, two = (
        read_tensors(root / "safety" / "pytorch_model.bin")["value_head.weight"] for root in (out, folder / "two")
    )
    assert temperature != pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(two * temperature, one, atol=1e-3, rtol=1e-2)
    assert json.loads((folder / "two" / "metrics.json").read_text())["rewards_divided_by"] == temperature
    assert f"divided by {temperature:.4g}" in (folder / "two" / "MODEL_CARD.md").read_text()


@pytest.mark.cluster
def test_killed_workers_and_drivers_cost_nothing(undisturbed: tuple[Path, Path], ray_stack: LocalStack) -> None:
    """The worker is killed once a state is saved, then the command; then it is given again."""
    out, data = undisturbed
    argv = arguments(data.parent, "killed", data, eval_data=str(data))
    progress, saved = (data.parent / "killed" / name for name in (PROGRESS_FILE, SNAPSHOT))
    with started(ray_stack, argv) as process:
        wait_for(saved, "step-00000003", process)
        kill_worker(ray_stack.env)
        wait_for(progress, "going on from step", process)
        wait_for(progress, "step 12/24", process)
        process.kill()
    assert not (data.parent / "killed" / "scorer.json").exists()
    assert train(ray_stack, argv) == 0
    assert progress.read_text().count("going on from step") == 2
    assert history_of(data.parent / "killed") == pytest.approx(history_of(out), abs=1e-6)
    ours, theirs = (
        torch.load(root / "safety" / "pytorch_model.bin", weights_only=True) for root in (out, data.parent / "killed")
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)


@pytest.mark.cluster
def test_a_killed_run_goes_on_from_its_work_folder_and_is_then_in_s3(
    undisturbed: tuple[Path, Path], ray_stack: LocalStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, data = undisturbed
    for name, value in ray_stack.env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    boto3.client("s3", endpoint_url=ray_stack.s3_endpoint).create_bucket(Bucket="trained")
    output, work = "s3://trained/safety", data.parent / "work"
    argv = [*arguments(data.parent, "remote", data, eval_data=str(data))[:-1], output, "--work", str(work)]
    with started(ray_stack, argv) as process:
        wait_for(work / SNAPSHOT, "step-00000003", process)
        process.kill()
    assert [one.uri for one in storage.list_objects(output)] == [f"{output}/run.json"]
    assert train(ray_stack, argv) == 0
    assert (work / PROGRESS_FILE).read_text().count("going on from step") == 1
    assert history_of(work) == pytest.approx(history_of(out), abs=1e-6)
    scorer = load(output)
    scorer.check_golden()
    assert scorer.identity.name == "safety"
    before = list(storage.list_objects(output))
    names = {one.uri.removeprefix(f"{output}/") for one in before}
    assert {"MODEL_CARD.md", "curves.png", "history.jsonl", "safety/pytorch_model.bin", "scorer.json"} <= names
    assert not any(name.startswith(("state", "progress", ".")) for name in names)
    shutil.rmtree(work)  # needed no more
    assert main(argv) == 0
    assert list(storage.list_objects(output)) == before


def test_what_may_change_is_what_decides_nothing() -> None:
    base = {"perspective": "safety", "data": "a", "output": "/b", "backbone": "demo"}
    one, other = TrainConfig(**base), TrainConfig(**base, workers=2, micro_batch=8, save_every=1)
    assert one.decisive() == other.decisive()
    assert one.decisive() != TrainConfig(**base, seed=1).decisive()


def test_errors_of_workers_are_told_apart() -> None:
    import ray.exceptions
    import ray.train

    from jobs import train as run

    config = TrainConfig(perspective="safety", data="a", output="/b", backbone="demo")
    lost, broken = ConnectionError("peer closed"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(DivergedError, match="step 3"):
        run._raise_ours(ray.train.WorkerGroupError("", {0: lost, 1: DivergedError("step 3")}))
    died = ray.train.WorkerGroupError("", {0: lost, 1: ray.exceptions.ActorDiedError()})
    failed = ray.train.WorkerGroupError("", {0: broken})
    assert [run._has_death(died), run._has_death(failed)] == [True, False]
    explained = run._explained(config, failed)
    assert "worker 0: RuntimeError: CUDA out of memory" in explained
    assert "Out of memory with micro_batch=4" in explained
    assert "Out of memory" not in run._explained(config, died)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    from jobs import train as run

    with run._held(tmp_path), pytest.raises(ConfigError, match="another run trains into"), run._held(tmp_path):
        pass
    with run._held(tmp_path):
        pass
