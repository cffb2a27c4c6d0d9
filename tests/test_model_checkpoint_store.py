"""Checkpoints from S3 and the hub: pinned, whole, verified, once per node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.precision import Job, measure
from jobs.precision_file import precision_of
from model import checkpoint_store, storage
from model.checkpoint_sources import HubSource, RemoteFile, S3Source, is_location, source_of
from model.checkpoint_store import ADAPTER, BUNDLE, fetch
from model.errors import ConfigError, TransientError
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import SHIPPED, load, load_preprocessor, read_identity
from tests.conftest import S3Server
from tests.hub_server import COMMIT, REPO, Hub, serving

DEMO = SHIPPED / "demo"
ROOT = Path(__file__).parent.parent
GENERATION = Generation("g", "a red ball", (DEMO / "golden" / "0.png").read_bytes())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; nothing of it is remembered."""
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    checkpoint_store._fetch.cache_clear()
    yield tmp_path / "cache" / "checkpoints"
    checkpoint_store._fetch.cache_clear()


def again() -> None:
    """What another process would see."""
    checkpoint_store._fetch.cache_clear()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    name = f"checkpoints-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    storage._client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def demo_in_s3(bucket: str) -> str:
    uri = f"s3://{bucket}/models/demo"
    upload(DEMO, uri)
    storage.put(f"{uri}/evil.py", b"raise SystemExit('code of a checkpoint was run')")
    storage.put(f"s3://{bucket}/models/demo-other/scorer.json", b"{}")
    return uri


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put_file(storage.join(uri, path.relative_to(folder).as_posix()), path)


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


# --- what a location is ---


@pytest.mark.parametrize("text", ["s3://b/f", f"a/b@{COMMIT}", f"a/b@{COMMIT}/sub/folder", "a/b@main"])
def test_locations(text: str) -> None:
    assert is_location(text)


@pytest.mark.parametrize("text", ["demo", "a/b", "/a/b", "./a/b", "", "a", "https://x/y"])
def test_no_locations(text: str) -> None:
    assert not is_location(text)


@pytest.mark.parametrize("revision", ["main", "", "v1.0", COMMIT[:7], COMMIT + "0", COMMIT.upper(), "g" * 40])
def test_a_hub_name_without_a_full_commit_hash_is_refused_with_the_remedy(revision: str) -> None:
    with pytest.raises(ConfigError, match=r"not a full commit hash.*write org/name@<40 hex digits of a commit>"):
        load(f"{REPO}@{revision}")


def test_a_hub_name_without_a_revision_is_told_how_to_write_one() -> None:
    with pytest.raises(ConfigError, match="org/name@<40 hex digits of a commit>"):
        load(REPO)


def test_source_of_a_hub_folder() -> None:
    assert source_of(f"{REPO}@{COMMIT}/a/b/") == HubSource(f"{REPO}@{COMMIT}/a/b", REPO, COMMIT, "a/b")


# --- S3 ---


def test_a_checkpoint_in_s3_scores_like_the_local_one(demo_in_s3: str, cache: Path) -> None:
    remote, local = load(demo_in_s3), load("demo")
    assert remote.identity == local.identity
    assert remote.score([GENERATION]) == local.score([GENERATION])
    remote.check_golden()
    [folder] = folders(cache)
    assert not (folder / "evil.py").exists()
    assert load_preprocessor(demo_in_s3).preprocessing_hash == local.preprocessing_hash


def test_downloaded_once_per_node(demo_in_s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []
    real = S3Source.download

    def counted(self: S3Source, files: list[RemoteFile], folder: Path) -> None:
        taken.append(folder)
        real(self, files, folder)

    monkeypatch.setattr(S3Source, "download", counted)
    found: list[Path] = []

    def use() -> None:  # past the memory of this process, as other processes are; the lock is between open files
        found.append(checkpoint_store._fetch.__wrapped__(demo_in_s3, BUNDLE, cache))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert set(found) == set(folders(cache))
    assert len(found) == 4


def test_processes_share_the_cache(demo_in_s3: str, cache: Path) -> None:
    code = "import sys; from model.scorer import resolve; print(resolve(sys.argv[1]))"
    command = [sys.executable, "-c", code, demo_in_s3]
    processes = [subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0].decode().strip() for process in processes}
    assert answers == {str(folder) for folder in folders(cache)}
    assert len(answers) == 1


def test_a_replaced_object_is_another_checkpoint(demo_in_s3: str, cache: Path) -> None:
    first = read_identity(demo_in_s3)
    head = DEMO / "safety" / "pytorch_model.bin"
    storage.put_file(f"{demo_in_s3}/alignment/pytorch_model.bin", head)
    again()
    second = read_identity(demo_in_s3)
    assert first.checkpoints[Perspective.ALIGNMENT] != second.checkpoints[Perspective.ALIGNMENT]
    assert first.checkpoints[Perspective.SAFETY] == second.checkpoints[Perspective.SAFETY]
    assert len(folders(cache)) == 2


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_file_changed_in_the_cache_is_named(demo_in_s3: str, cache: Path, is_cut: bool) -> None:
    fetch(demo_in_s3, BUNDLE)
    victim = folders(cache)[0] / "backbone" / "model.safetensors"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] if is_cut else data[:-1] + bytes([data[-1] ^ 1]))
    again()
    with pytest.raises(
        ConfigError, match=r"backbone/model\.safetensors was changed or cut.*delete .* downloaded again"
    ):
        load(demo_in_s3)


def test_a_file_more_or_less_in_the_cache_is_named(demo_in_s3: str, cache: Path) -> None:
    folder = fetch(demo_in_s3, BUNDLE)
    # It would be read instead of adapter_model.bin.
    surplus = folder / "alignment" / "lora" / "adapter_model.safetensors"
    surplus.write_bytes(b"")
    again()
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is not of this checkpoint"):
        fetch(demo_in_s3, BUNDLE)
    surplus.unlink()
    (folder / "golden.json").unlink()
    with pytest.raises(ConfigError, match=r"golden\.json is missing"):
        fetch(demo_in_s3, BUNDLE)


@pytest.mark.parametrize("is_published", [False, True])
def test_measured_precision_may_be_written_into_the_cache(
    demo_in_s3: str, cache: Path, tmp_path: Path, is_published: bool
) -> None:
    if is_published:
        storage.put(f"{demo_in_s3}/precision.json", b"{}")
    load(demo_in_s3)
    policy = Path("infra/policies/default.yaml")
    measured = measure(Job(demo_in_s3, "few_crops", str(policy), scenes=1), lambda line: None)
    again()
    load(demo_in_s3).check_golden()
    [folder] = folders(cache)
    assert precision_of(folder, read_identity(demo_in_s3, mode="few_crops")).measured == measured
    (folder / "safety" / "precision.json").write_bytes(b"{}")
    again()
    with pytest.raises(ConfigError, match=r"safety/precision\.json is not of this checkpoint"):
        load(demo_in_s3)


def test_half_a_download_is_never_used(demo_in_s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = S3Source.download

    def broken(self: S3Source, files: list[RemoteFile], folder: Path) -> None:
        real(self, files[:3], folder)
        raise TransientError("the network went away")

    with monkeypatch.context() as patch:
        patch.setattr(S3Source, "download", broken)
        with pytest.raises(TransientError, match="went away"):
            load(demo_in_s3)
    assert folders(cache) == []
    # A process that was killed cannot clean up; the next one does.
    name = next(cache.glob("*.lock")).name.removesuffix(".lock")
    (cache / f"{name}.part-dead").mkdir()
    (cache / f"{name}.part-dead" / "scorer.json").write_text("{}")
    load(demo_in_s3).check_golden()
    assert [folder.name for folder in folders(cache)] == [name]


def test_a_cut_download_is_refused(demo_in_s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.get_file

    def cut(uri: str, target: Path) -> None:
        real(uri, target)
        if uri.endswith("scorer.json"):
            target.write_bytes(target.read_bytes()[:10])

    monkeypatch.setattr(storage, "get_file", cut)
    with pytest.raises(TransientError, match=r"scorer\.json: 10 of \d+ bytes arrived"):
        fetch(demo_in_s3, BUNDLE)
    assert folders(cache) == []


def test_objects_replaced_during_the_download_are_not_mixed(
    demo_in_s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = S3Source.download

    def slow(self: S3Source, files: list[RemoteFile], folder: Path) -> None:
        real(self, files, folder)
        storage.put_file(f"{demo_in_s3}/overall/pytorch_model.bin", DEMO / "safety" / "pytorch_model.bin")

    monkeypatch.setattr(S3Source, "download", slow)
    with pytest.raises(TransientError, match="changed while it was downloaded"):
        fetch(demo_in_s3, BUNDLE)
    assert folders(cache) == []


def test_places_that_hold_nothing(bucket: str) -> None:
    with pytest.raises(ConfigError, match="holds no file that is needed"):
        load(f"s3://{bucket}/nothing")
    with pytest.raises(ConfigError, match="no such bucket"):
        load(f"s3://{bucket}-not/nothing")
    storage._client().put_object(Bucket=bucket, Key="trap/../../scorer.json", Body=b"{}")
    with pytest.raises(ConfigError, match="no path inside a checkpoint folder"):
        load(f"s3://{bucket}/trap")


def bundle_with(folder: Path, **changes: object) -> Path:
    """A folder with nothing but the demo's ``scorer.json``, its entries made absolute, then changed."""
    values = json.loads((DEMO / "scorer.json").read_text())
    values["backbone"] = str(DEMO / "backbone")
    values["adapters"] = {name: str(DEMO / name) for name in values["adapters"]}
    values |= changes
    values["head_training"] = {name: one for name, one in values["head_training"].items() if name in values["adapters"]}
    folder.mkdir(exist_ok=True)
    (folder / "scorer.json").write_text(json.dumps(values))
    return folder


def test_entries_of_scorer_json_may_lie_elsewhere(demo_in_s3: str, tmp_path: Path, cache: Path) -> None:
    adapters = {"alignment": f"{demo_in_s3}/alignment", "safety": str(DEMO / "safety")}
    folder = bundle_with(tmp_path / "mixed", backbone=f"{demo_in_s3}/backbone", adapters=adapters)
    mixed, local = load(folder), load("demo")
    assert mixed.identity.checkpoints == {p: local.identity.checkpoints[p] for p in mixed.perspectives}
    assert mixed.score([GENERATION])[0].rewards == {
        p: local.score([GENERATION])[0].rewards[p] for p in mixed.perspectives
    }
    assert len(folders(cache)) == 2


# --- hashes in scorer.json ---


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashes_that_fit(tmp_path: Path) -> None:
    weights = "backbone/model.safetensors"
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    values = json.loads((copy / "scorer.json").read_text())
    hashes = {
        weights: sha256(DEMO / weights),
        "safety/lora/adapter_model.bin": sha256(DEMO / "safety/lora/adapter_model.bin"),
    }
    (copy / "scorer.json").write_text(json.dumps({**values, "hashes": hashes}))
    assert load(copy).identity == load("demo").identity
    with (copy / weights).open("r+b") as file:
        file.truncate(5000)
    for read in (load, read_identity):
        with pytest.raises(ConfigError, match=r"backbone/model\.safetensors has sha256 .* says .*changed or cut"):
            read(copy)
    (copy / weights).unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors does not exist"):
        read_identity(copy)


def test_hashes_of_a_location(demo_in_s3: str, tmp_path: Path) -> None:
    backbone = f"{demo_in_s3}/backbone"
    right = {f"{backbone}/model.safetensors": sha256(DEMO / "backbone/model.safetensors")}
    assert read_identity(bundle_with(tmp_path / "a", backbone=backbone, hashes=right)) == read_identity("demo")
    wrong = {f"{backbone}/model.safetensors": "0" * 64}
    with pytest.raises(ConfigError, match=r"model\.safetensors has sha256"):
        read_identity(bundle_with(tmp_path / "b", backbone=backbone, hashes=wrong))


@pytest.mark.parametrize(
    "hashes",
    [{"nowhere/x": "0" * 64}, {"backbone/../scorer.json": "0" * 64}, {"backbone/config.json": "0"}, {"backbone/x": 3}],
)
def test_hashes_that_are_none(tmp_path: Path, hashes: dict[str, object]) -> None:
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    values = json.loads((copy / "scorer.json").read_text())
    (copy / "scorer.json").write_text(json.dumps({**values, "hashes": hashes}))
    with pytest.raises(ConfigError, match=r"scorer\.json: hashes\["):
        read_identity(copy)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {f"demo/{p.relative_to(DEMO).as_posix()}": p.read_bytes() for p in DEMO.rglob("*") if p.is_file()}
    code = {"demo/modeling_evil.py": b"raise SystemExit", "README.md": b"# rewards"}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving({**files, **code}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_a_hub_checkpoint_scores_like_the_local_one_and_brings_no_code(hub: Hub, cache: Path) -> None:
    location = f"{REPO}@{COMMIT}/demo"
    remote = load(location)
    assert remote.identity == load("demo").identity
    remote.check_golden()
    [folder] = folders(cache)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()} == {
        ".assay.json",
        # a model card is for people, and no code reads it
        *(path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*.*") if path.is_file() and path.suffix != ".md"),
    }
    assert not any(name.endswith(".py") for name in hub.downloads)


def test_a_hub_checkpoint_is_taken_once_and_then_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"{REPO}@{COMMIT}/demo/alignment"
    folder = fetch(location, ADAPTER)
    assert sorted(hub.downloads) == [
        f"demo/alignment/{name}"
        for name in ("lora/adapter_config.json", "lora/adapter_model.bin", "pytorch_model.bin", "reward_config.yaml")
    ]
    again()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert fetch(location, ADAPTER) == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", r"pytorch_model\.bin arrived with sha256"), ("reward_config.yaml", "is not git blob")],
)
def test_a_hub_file_that_is_not_what_the_hub_reports_is_named(hub: Hub, cache: Path, name: str, message: str) -> None:
    path = f"demo/alignment/{name}"
    data = hub.reported[path]
    hub.sent[path] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(TransientError, match=message):
        fetch(f"{REPO}@{COMMIT}/demo/alignment", ADAPTER)
    assert folders(cache) == []


def test_a_hub_that_does_not_know_or_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="RevisionNotFoundError; check its name and commit"):
        load(f"{REPO}@{'f' * 40}")
    with pytest.raises(ConfigError, match="RepositoryNotFoundError"):
        load(f"some/other@{COMMIT}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own retries
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="the hub did not answer"):
        load(f"{REPO}@{COMMIT}")
