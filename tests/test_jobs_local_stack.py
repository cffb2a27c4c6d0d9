"""The local stack stops what it started, whatever happens, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.local_dashboard import http_status
from jobs.local_processes import ProcessId, ProcessRecord, is_alive, is_port_free, stop
from jobs.local_servers import PROJECT_ROOT, Ports
from jobs.local_stack import LocalStack
from model.errors import ConfigError, InfrastructureError


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that belongs to somebody else."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def s3_only(work_dir: Path) -> LocalStack:
    return LocalStack(work_dir, ray=False, serve=False, say=lambda line: None)


def recorded(work_dir: Path) -> list[ProcessId]:
    record = ProcessRecord.read(work_dir / "processes.json")
    assert record is not None
    return record.processes


def test_s3_answers_inside_the_block_and_is_gone_after_it(tmp_path: Path) -> None:
    with s3_only(tmp_path) as stack:
        assert http_status(f"{stack.s3_endpoint}/moto-api/") == 200
        [server] = recorded(tmp_path)
        assert server.find() is not None
        temp_dir = Path(json.loads((tmp_path / "processes.json").read_text())["temp_dir"])
        assert temp_dir.is_dir()
    assert server.find() is None
    assert not temp_dir.exists()
    assert not (tmp_path / "processes.json").exists()


def test_servers_listen_on_loopback_only(tmp_path: Path) -> None:
    with s3_only(tmp_path):
        [server] = recorded(tmp_path)
        hosts = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert hosts == {"127.0.0.1"}


def test_token_is_random_and_only_ours_to_read(tmp_path: Path) -> None:
    tokens = set()
    for _ in range(2):
        with s3_only(tmp_path) as stack:
            assert stat.S_IMODE(stack.token_path.stat().st_mode) == 0o600
            tokens.add(stack.token_path.read_text())
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {64}


def test_environment_leaves_the_user_s_own_cloud_and_cluster_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "production")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    monkeypatch.setenv("RAY_ADDRESS", "ray://production:10001")
    monkeypatch.setenv("no_proxy", "example.org")
    with s3_only(tmp_path) as stack:
        assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN", "RAY_ADDRESS"} & set(stack.env)
        assert stack.env["AWS_ENDPOINT_URL"] == stack.s3_endpoint
        assert stack.env["no_proxy"] == "example.org,127.0.0.1,localhost"
        assert stack.env["PYTHONPATH"] == str(PROJECT_ROOT)


def test_an_error_inside_the_block_stops_everything(tmp_path: Path) -> None:
    def fail_with_a_running_server() -> None:
        with s3_only(tmp_path):
            servers.extend(recorded(tmp_path))
            raise ZeroDivisionError

    servers: list[ProcessId] = []
    with pytest.raises(ZeroDivisionError):
        fail_with_a_running_server()
    assert [server.find() for server in servers] == [None]


def test_a_server_that_cannot_start_is_an_error_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no such module')"]
    monkeypatch.setattr("jobs.local_stack.s3_command", lambda ports: broken)
    with (
        pytest.raises(InfrastructureError, match="s3 ended with exit code 1 at its start:\nno such module"),
        s3_only(tmp_path),
    ):
        pytest.fail("must not start")
    assert not (tmp_path / "processes.json").exists()


def test_a_port_taken_meanwhile_means_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [Ports(), Ports(s3=taken.getsockname()[1])]
        monkeypatch.setattr("jobs.local_stack.Ports", ports.pop)
        with LocalStack(tmp_path, ray=False, serve=False, say=said.append) as stack:
            assert http_status(f"{stack.s3_endpoint}/moto-api/") == 200
    assert any("trying others" in line for line in said)


def test_a_chosen_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"),
            LocalStack(tmp_path, serve_port=port),
        ):
            pytest.fail("must not start")
    assert is_port_free(port)


def test_a_folder_in_use_is_refused_and_its_owner_left_alone(tmp_path: Path) -> None:
    with s3_only(tmp_path) as stack:
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), s3_only(tmp_path):
            pytest.fail("must not start")
        assert http_status(f"{stack.s3_endpoint}/moto-api/") == 200


_HOLD_A_STACK = """
import sys, time
from pathlib import Path
from jobs.local_stack import LocalStack
with LocalStack(Path(sys.argv[1]), ray=False, serve=False) as stack:
    print("up", flush=True)
    time.sleep(600)
"""


def hold_a_stack(work_dir: Path, program: str = _HOLD_A_STACK) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(work_dir)],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals, code: int) -> None:
    holder = hold_a_stack(tmp_path)
    [server] = recorded(tmp_path)
    with holder:
        holder.send_signal(number)
        # Python ends itself with the signal after KeyboardInterrupt; the others give 128 + their number.
        assert holder.wait(20) == code
    assert server.find() is None
    assert not (tmp_path / "processes.json").exists()


def test_what_a_killed_owner_left_behind_is_cleaned_up_and_nobody_else(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    holder = hold_a_stack(tmp_path)
    with holder:
        holder.kill()
    [server] = recorded(tmp_path)
    assert server.find() is not None
    # A record can also name a pid that another process has got since: same pid, another start.
    path = tmp_path / "processes.json"
    data = json.loads(path.read_text())
    data["processes"].append({"name": "ray", "pid": sleeper.pid, "created_s": time.time() - 3600})
    path.write_text(json.dumps(data))
    with s3_only(tmp_path) as stack:
        assert server.find() is None
        assert http_status(f"{stack.s3_endpoint}/moto-api/") == 200
    assert sleeper.poll() is None
    assert not Path(data["temp_dir"]).exists()


def test_a_record_cut_short_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "processes.json").write_text('{"owner": {"na')
    with s3_only(tmp_path) as stack:
        assert http_status(f"{stack.s3_endpoint}/moto-api/") == 200
        [server] = recorded(tmp_path)  # the new one took the place of the cut one
        assert server.find() is not None


def test_stop_kills_what_ignores_sigterm_and_its_children() -> None:
    program = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        root = psutil.Process(process.pid)
        started_s = time.monotonic()
        stop([root], roots=[root], wait_s=0.5)
        assert time.monotonic() - started_s >= 0.5
        process.wait(5)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


_HOLD_RAY = """
import sys, time
from pathlib import Path
from jobs.local_stack import LocalStack
with LocalStack(Path(sys.argv[1]), serve=False) as stack:
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.cluster
def test_ray_left_behind_by_a_killed_owner_and_a_killed_head_is_cleaned_up(tmp_path: Path) -> None:
    """The worst case: nothing is left of the tree but orphans that the record names."""
    holder = hold_a_stack(tmp_path, _HOLD_RAY)
    ray = [identity for identity in recorded(tmp_path) if identity.name == "ray"]
    assert len(ray) > 5
    with holder:
        holder.kill()
    psutil.Process(ray[0].pid).kill()
    orphans = [process for identity in ray if (process := identity.find())]
    assert orphans
    with s3_only(tmp_path):
        assert not [process for process in orphans if is_alive(process)]


_KEEP_A_JOB_RUNNING = """
import threading, time
from pathlib import Path
import sys
from jobs.local_stack import LocalStack
program = "import ray, time; ray.init(); print('busy', flush=True); ray.get(ray.remote(time.sleep).remote(600))"
with LocalStack(Path(sys.argv[1]), serve=False) as stack:
    def tell(line):
        if line == "busy":
            print("up", flush=True)
    stack.submit(["python", "-c", program], on_line=tell)
"""


@pytest.mark.cluster
def test_ctrl_c_during_a_job_stops_everything_soon(tmp_path: Path) -> None:
    holder = hold_a_stack(tmp_path, _KEEP_A_JOB_RUNNING)
    everything = psutil.Process(holder.pid).children(recursive=True)
    assert len(everything) > 10
    started_s = time.monotonic()
    with holder:
        holder.send_signal(signal.SIGINT)
        assert holder.wait(60) == -signal.SIGINT
    assert not [process for process in everything if is_alive(process)]
    assert time.monotonic() - started_s < 30  # Ray's own patience with a busy cluster


@pytest.mark.cluster
def test_submit_returns_the_exit_code_of_the_driver(stack: LocalStack) -> None:
    lines: list[str] = []
    program = "import os, sys; print('endpoint', os.environ['AWS_ENDPOINT_URL']); sys.exit(3)"
    assert stack.submit(["python", "-c", program], on_line=lines.append) == 3
    assert f"endpoint {stack.s3_endpoint}" in lines


@pytest.mark.cluster
def test_submit_runs_in_an_upload_of_the_project(stack: LocalStack) -> None:
    lines: list[str] = []
    program = "import os, model.schema; print('in', os.getcwd(), model.schema.__file__, os.path.exists('.git'))"
    assert stack.submit(["python", "-c", program], on_line=lines.append) == 0
    [where] = [line.split() for line in lines if line.startswith("in ")]
    assert "working_dir_files" in where[1]
    assert where[2].startswith(where[1])
    assert where[3] == "False"


@pytest.mark.cluster
def test_dashboard_and_endpoint_want_the_token_and_loopback(stack: LocalStack) -> None:
    assert stack.dashboard_url.startswith("http://127.0.0.1:")
    assert stack.serve_url.startswith("http://127.0.0.1:")
    assert http_status(f"{stack.dashboard_url}/api/jobs/") == 401
    assert http_status(f"{stack.dashboard_url}/api/jobs/", {"Authorization": "Bearer wrong"}) == 403
    token = stack.token_path.read_text()
    assert http_status(f"{stack.dashboard_url}/api/jobs/", {"Authorization": f"Bearer {token}"}) == 200


@pytest.mark.cluster
def test_endpoint_is_not_reachable_from_other_interfaces(stack: LocalStack) -> None:
    others = {a.address for all_of in psutil.net_if_addrs().values() for a in all_of if a.family == socket.AF_INET}
    port = int(stack.serve_url.rsplit(":", 1)[1])
    listening = [
        c.laddr.ip for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    assert set(listening) == {"127.0.0.1"}  # on a machine without another interface, this is all there is to see
    for address in others - {"127.0.0.1"}:
        connection = http.client.HTTPConnection(address, port, timeout=2)
        with pytest.raises(OSError):  # noqa: PT011 - refused or timed out, as the system likes
            connection.request("GET", "/healthz")
