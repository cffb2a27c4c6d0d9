"""A checkpoint that goes to S3: claimed before the run, whole to every reader, gone on with from the work folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.train_config import TrainConfig
from jobs.train_output import claim, is_finished, upload
from model import storage
from model.errors import ConfigError
from tests.conftest import S3Server
from tests.s3_fault_proxy import FaultProxy
from tests.test_s3_servers import client

CHECKPOINT = ("scorer.json", "MODEL_CARD.md", "curves.png", "golden.json", "golden/0.png", "safety/pytorch_model.bin",
              "safety/lora/adapter_model.bin", "tensorboard/events", "history.jsonl", "metrics.json")  # fmt: skip
OF_THE_RUN = ("state/step-00000003/state.pt", "progress.log", ".lock")
_BUCKETS = (f"train-output-{number}" for number in itertools.count())
RUN = {"settings": {"seed": 1}, "data": ["ab"], "unusable": [{}]}


@pytest.fixture
def bucket(any_s3: S3Server) -> str:
    name = next(_BUCKETS)
    client(any_s3).create_bucket(Bucket=name)
    return name


def run_of(work: Path, output: str, **run: Any) -> TrainConfig:
    """A run whose work folder holds its ``run.json`` alone."""
    work.mkdir(exist_ok=True)
    (work / "run.json").write_text(json.dumps({**RUN, **run}))
    return TrainConfig(perspective="safety", data="a.json", backbone="demo", output=output, work=str(work))


def train_into(work: Path) -> None:
    """What a run leaves in its work folder."""
    for name in (*CHECKPOINT, *OF_THE_RUN):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (work / "scorer.json").write_text('{"backbone": "/models/phi35"}')


class Reader(FaultProxy):
    """Lets everything pass, and lists the bucket before each request."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        super().__init__(server.endpoint, probability=0.0)
        self.seen: list[set[str]] = []
        self._list = lambda: client(server).list_objects_v2(Bucket=bucket).get("Contents", [])

    def draw_fault(self) -> bool:
        self.seen.append({entry["Key"].removeprefix("new/") for entry in self._list()})
        return super().draw_fault()


def test_a_reader_sees_no_checkpoint_or_all_of_it(
    bucket: str, any_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = run_of(tmp_path / "work", f"s3://{bucket}/new/"), []
    claim(config)
    train_into(tmp_path / "work")
    with Reader(any_s3, bucket) as reader:
        monkeypatch.setenv("AWS_ENDPOINT_URL", reader.endpoint)
        upload(config, said.append)
        assert is_finished(config)
    whole = {*CHECKPOINT, "run.json"}
    assert reader.seen[0] == {"run.json"}
    assert reader.seen[-1] == whole
    assert all(seen == whole for seen in reader.seen if "scorer.json" in seen)
    assert len(reader.seen) > len(CHECKPOINT)
    assert said[-1] == "its backbone was not uploaded: every machine that loads it needs /models/phi35"


def test_an_output_belongs_to_one_run(bucket: str, tmp_path: Path) -> None:
    output = f"s3://{bucket}/new"
    config = run_of(tmp_path / "work", output)
    for _ in range(2):  # a run that was killed claims it again
        claim(config)
    assert not is_finished(config)
    with pytest.raises(ConfigError, match=f"another run, whose work folder is {tmp_path}/work; go on with"):
        claim(run_of(tmp_path / "elsewhere", output))
    with pytest.raises(ConfigError, match="give another --output"):
        claim(run_of(tmp_path / "work", output, data=["cd"]))


def test_a_checkpoint_that_lies_there_already_stays_as_it_is(bucket: str, tmp_path: Path) -> None:
    output = f"s3://{bucket}/published"
    storage.put(f"{output}/scorer.json", b"{}")
    with pytest.raises(ConfigError, match="holds a checkpoint that was not trained there"):
        claim(run_of(tmp_path / "work", output))
    assert [one.uri for one in storage.list_objects(output)] == [f"{output}/scorer.json"]


def test_a_bucket_that_does_not_exist_is_known_before_any_step(any_s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such bucket: no-such-bucket"):
        claim(run_of(tmp_path / "work", "s3://no-such-bucket/new"))
