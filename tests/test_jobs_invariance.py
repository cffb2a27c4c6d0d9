"""One reward for one sample, whichever way it comes: nights in batches of several sizes through Serve and through the
job's own actors, while requests of 1 to 32 images reach the same replica; then ``assay parity`` on what was published.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deployments.replica import Replica
from jobs import manifest as manifests
from jobs.endpoint import Endpoint
from jobs.local_stack import PROJECT_ROOT, LocalStack
from jobs.verify import verify_night
from model import storage
from model.identity import same_within
from model.perspectives import PERSPECTIVES
from model.schema import Generation
from model.scorer import load
from tests.batch_mix import BAD, mixed_generations
from tests.job_helpers import NIGHT, generation, write_parquet
from tests.serve_parts import as_base64, endpoint_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BUCKET = "invariance"
COUNT = 40
ROWS = 70  # more than there are samples: some come twice, and meet themselves in a batch
GOOD = mixed_generations(COUNT)
BROKEN = BAD[:2]  # no log could hold the third, which is no text
MOST = 32
FLOAT32 = same_within("float32", 0.0)
POLICY = PROJECT_ROOT / "infra/policies/default.yaml"
Rewards = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Night:
    """How a night is scored: each has a log order of its own, by ``seed``."""

    via: str
    batch_size: int
    rows_per_block: int
    seed: int
    dtype: str = "float32"


NIGHTS = {
    "serve-32": Night("serve", 32, 64, seed=1),
    "serve-5": Night("serve", 5, 17, seed=2),
    "pool-1": Night("pool", 1, 24, seed=3),  # test_jobs_night.py has one of the pool in batches of 32
    "bfloat16": Night("pool", 32, 64, seed=4, dtype="bfloat16"),
}


@pytest.fixture(scope="module")
def cluster(stack: LocalStack) -> Iterator[LocalStack]:
    """This process reaches the stack's S3 and Ray as its jobs do; the images lie in a bucket."""
    before = dict(os.environ)
    os.environ.update(stack.env)
    boto3.Session().client("s3").create_bucket(Bucket=BUCKET)
    for one in [*GOOD, *BROKEN]:
        storage.put(uri_of(one), one.image)
    yield stack
    os.environ.clear()
    os.environ.update(before)


def uri_of(one: Generation) -> str:
    return f"s3://{BUCKET}/{one.generation_id.replace(' ', '-')}.png"


def alone(dtype: str) -> Rewards:
    """The reward of each sample scored by itself, without any cluster."""
    scorer = load("demo", dtype=dtype)
    records = [scorer.score([one])[0] for one in GOOD]
    return {record.generation_id: {str(p): record.rewards[p] for p in PERSPECTIVES} for record in records}


@pytest.fixture(scope="module")
def expected() -> Rewards:
    rewards = alone("float32")
    for perspective in PERSPECTIVES:
        assert np.std([one[perspective] for one in rewards.values()]) > 0.1  # all alike would prove nothing
    return rewards


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nights")


@pytest.fixture(scope="module")
def nights(cluster: LocalStack, work: Path) -> Iterator[dict[str, Future[Path]]]:
    """All nights, two at a time, from now on and beside whatever the tests ask of the endpoint."""
    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(score_night, work / name, night) for name, night in NIGHTS.items()}


def score_night(folder: Path, night: Night) -> Path:
    """The real command over a shuffled log; the folder of what it published."""
    rng = random.Random(night.seed)
    chosen = [*GOOD, *rng.choices(GOOD, k=ROWS - COUNT), *BROKEN]
    rng.shuffle(chosen)
    rows = [
        generation(n, generation_id=f"{n}/{one.generation_id}", prompt=one.prompt, image_uri=uri_of(one))
        for n, one in enumerate(chosen)
    ]
    write_parquet(folder / "logs" / "a.parquet", rows)
    settings = {
        "batch_size": night.batch_size, "rows_per_block": night.rows_per_block, "dtype": night.dtype,
        "allow_bucket": [BUCKET], "max_error_rate": 0.9, "fetch_workers": 1, "prepare_workers": 1,
    }  # fmt: skip
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    flags = {"config": folder / "job.yaml", "input": folder / "logs", "output": folder / "out", "via": night.via}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = command("jobs.score_logs", "--date", str(NIGHT), *arguments)
    assert done.returncode == 0, done.stderr
    assert f"scoring via {night.via}" in done.stdout
    return folder / "out"


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", module, *arguments]
    return subprocess.run(argv, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300, check=False)


def published_rows(output: Path) -> list[dict[str, Any]]:
    manifest = manifests.latest(str(output), NIGHT)
    assert manifest is not None
    return [row for file in manifest.files for row in pq.ParquetFile(output / file.path).read().to_pylist()]


def parity(output: Path, url: str) -> subprocess.CompletedProcess[str]:
    bucket = ("--allow-bucket", BUCKET)
    return command("jobs.cli", "parity", "--output", str(output), "--date", str(NIGHT), "--url", url, *bucket)


# --- the endpoint, while the nights run ---


def test_requests_of_any_size_and_mix_get_the_rewards_of_samples_alone(
    cluster: LocalStack, nights: dict[str, Future[Path]], expected: Rewards
) -> None:
    """From three clients at once, so that a pass holds images of several requests."""
    rng = random.Random(9)
    sizes = [1, MOST, *(rng.randint(1, MOST) for _ in range(10))]
    requests = [(rng.choices(GOOD, k=size), sorted(rng.sample(PERSPECTIVES, rng.randint(1, 4)))) for size in sizes]
    for generations, _ in requests[2::3]:
        generations.insert(rng.randrange(len(generations)), BROKEN[0])
        del generations[MOST:]
    endpoint = Endpoint(cluster.serve_url)
    with ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda request: ask(endpoint, *request), requests))
    for (generations, perspectives), results in zip(requests, found, strict=True):
        for one, result in zip(generations, results, strict=True):
            assert (result["status"] == "error") == (one in BROKEN)
            wanted = {} if one in BROKEN else {p: expected[one.generation_id][p] for p in perspectives}
            got = {p: reward for p, reward in result["rewards"].items() if reward is not None}
            assert got == pytest.approx(wanted, rel=0, abs=FLOAT32)


def ask(endpoint: Endpoint, generations: list[Generation], perspectives: list[str]) -> list[dict[str, Any]]:
    items = [{"id": one.generation_id, "prompt": one.prompt, "image": as_base64(one.image)} for one in generations]
    results: list[dict[str, Any]] = endpoint.post("/v1/score", {"items": items, "perspectives": perspectives})[
        "results"
    ]
    return results


# --- the nights ---


@pytest.mark.parametrize("name", [name for name, night in NIGHTS.items() if night.dtype == "float32"])
def test_a_night_in_batches_of_any_size_has_the_rewards_of_samples_alone(
    nights: dict[str, Future[Path]], expected: Rewards, name: str
) -> None:
    output = nights[name].result()
    manifest = verify_night(str(output), NIGHT)
    assert (manifest.via, manifest.rows) == (NIGHTS[name].via, ROWS + len(BROKEN))
    assert max(largest_differences(output, expected).values()) <= FLOAT32


def largest_differences(output: Path, expected: Rewards) -> dict[str, float]:
    """By perspective; and every row must be there, with a reward or as the dead letter that it has to be."""
    largest = dict.fromkeys(map(str, PERSPECTIVES), 0.0)
    broken = {one.generation_id for one in BROKEN}
    rows = published_rows(output)
    assert len({row["generation_id"] for row in rows}) == ROWS + len(BROKEN)
    for row in rows:
        name = row["generation_id"].split("/")[1]
        assert (row["status"] == "error") == (name in broken), row["error_message"]
        if name not in broken:
            for perspective in largest:
                difference = abs(row[f"reward_{perspective}"] - expected[name][perspective])
                largest[perspective] = max(largest[perspective], difference)
    return largest


def test_parity_replays_a_real_night_through_the_real_endpoint(
    cluster: LocalStack, nights: dict[str, Future[Path]]
) -> None:
    done = parity(nights["pool-1"].result(), cluster.serve_url)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"compared {4 * ROWS} rewards of {ROWS} rows" in said
    assert "largest difference" in said
    assert "bound 1e-05 in float32" in said


def test_parity_names_a_row_that_was_tampered_with(
    cluster: LocalStack, nights: dict[str, Future[Path]], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(nights["serve-32"].result(), tmp_path / "copy"))
    manifest = manifests.latest(str(output), NIGHT)
    assert manifest is not None
    part = output / manifest.files[0].path
    table = pq.ParquetFile(part).read()
    rows = table.to_pylist()
    victim = next(row for row in rows if row["status"] == "scored")
    victim["reward_safety"] += 2e-5
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    done = parity(output, cluster.serve_url)
    assert done.returncode == 1, done.stdout
    assert f"no parity: row {victim['row_key']} (generation {victim['generation_id']}), safety" in done.stderr


def test_a_night_in_bfloat16_stays_within_its_bound_and_has_parity(nights: dict[str, Future[Path]]) -> None:
    """Its endpoint is the application in this process: a second one in the cluster would need half a minute more."""
    output, rewards = nights["bfloat16"].result(), alone("bfloat16")
    largest = largest_differences(output, rewards)
    for perspective in largest:
        spread = float(np.std([one[perspective] for one in rewards.values()]))
        assert 0 < largest[perspective] <= same_within("bfloat16", spread)
    settings = {"checkpoint": "demo", "policy": str(POLICY), "dtype": "bfloat16"}
    with endpoint_of(lambda: Replica(dict(settings)), POLICY) as url:
        done = parity(output, url)
    assert done.returncode == 0, done.stderr
    assert "in bfloat16" in done.stdout + done.stderr
