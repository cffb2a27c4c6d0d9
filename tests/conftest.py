"""Fixtures that start real servers on loopback, once per session and only for tests that ask for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from jobs.local_processes import free_port
from jobs.local_stack import LocalStack

settings.load_profile("ci")  # the same examples in every run: a failure is one of this code, not of this day

REQUIRE_CEPH = "ASSAY_REQUIRE_CEPH"  # set by .ci/run: a missing radosgw is then a failure


@dataclass(frozen=True)
class S3Server:
    """``env``: what a process needs to reach it (AWS_* variables)."""

    endpoint: str
    env: dict[str, str]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the Ceph tests out where radosgw is not installed, unless the environment insists on them."""
    if os.environ.get(REQUIRE_CEPH) or shutil.which("radosgw"):
        return
    left_out = [item for item in items if item.get_closest_marker("ceph")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Moto alone; up in half a second. Nothing in it is shared but bucket names: take one of your own."""
    with LocalStack(tmp_path_factory.mktemp("s3"), ray=False, serve=False) as stack:
        yield S3Server(stack.s3_endpoint, _aws_only(stack.env))


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real Ceph radosgw (tests/ceph.sh). Use it with the marker ``ceph``."""
    folder = tmp_path_factory.mktemp("ceph")
    port = free_port()
    with _stopping_daemons(folder):
        script = Path(__file__).with_name("ceph.sh")
        started = subprocess.run(
            [script, folder, str(port), str(free_port())], capture_output=True, text=True, timeout=120, check=False
        )
        assert started.returncode == 0, started.stderr
        endpoint = f"http://127.0.0.1:{port}"
        yield S3Server(
            endpoint,
            {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "local",
                "AWS_SECRET_ACCESS_KEY": "local-only",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )


@pytest.fixture(params=["s3_server", pytest.param("ceph", marks=pytest.mark.ceph)])
def any_s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each S3 server in turn, with this process's environment set to reach it."""
    server: S3Server = request.getfixturevalue(request.param)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """S3, Ray and the Serve application, with the shipped checkpoint. Use it with the marker ``cluster``.

    One replica, always: tests count what it scored, and two cores have no use for a second.
    """
    replica = {"num_cpus": 1, "num_gpus": 0, "min_replicas": 1, "max_replicas": 1}
    with LocalStack(tmp_path_factory.mktemp("stack"), serve_args={"replica": replica}) as stack:
        yield stack


def _aws_only(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith("AWS_")}


@contextmanager
def _stopping_daemons(folder: Path) -> Iterator[None]:
    """Ends the daemons whose pid files lie in ``folder``, also when the start broke off half way."""
    started_s = time.time()
    try:
        yield
    finally:
        pids = [int(path.read_text()) for path in folder.glob("*.pid") if path.read_text().strip()]
        daemons = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        ours = [daemon for daemon in daemons if daemon.create_time() >= started_s - 1]
        for daemon in ours:
            daemon.terminate()
        _, left = psutil.wait_procs(ours, timeout=10)
        for daemon in left:
            daemon.kill()
