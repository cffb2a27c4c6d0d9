"""A whole Assay on this machine, for the demonstration and the tests: S3, Ray with a token, and Serve.

Starts moto's S3 server, ``ray start`` and ``serve deploy`` with ports, token and temporary folder of its own,
and stops them again in the right order, whatever happens in between. Nothing here is for production.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from jobs.local_dashboard import Dashboard, describe, failure, http_status
from jobs.local_processes import (
    ProcessId,
    ProcessRecord,
    SignalGate,
    is_alive,
    is_port_free,
    spawn,
    stop,
    tail,
    with_descendants,
)
from jobs.local_servers import PROJECT_ROOT, Ports, ray_command, s3_command, script, server_environment, write_token
from model.errors import ConfigError, InfrastructureError

APPLICATION = "assay"
# Ray ends its own processes within some seconds of SIGTERM; more on a machine that is busy with other things.
RAY_STOP_WAIT_S = 45.0
S3_STOP_WAIT_S = 5.0
SERVE_STOP_WAIT_S = 15.0
START_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 180.0
EXIT_INFRASTRUCTURE = 4
_POLL_S = 0.2
# A port can be taken between our look and the bind; that is rare, so a few attempts are plenty.
_PORT_ATTEMPTS = 3


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _PortTakenError(InfrastructureError):
    """A server found its port in use; others are tried."""


class LocalStack:
    """S3, Ray and Serve on loopback, from ``with`` to the end of its block.

    ``work_dir``: holds logs, the token, the rendered Serve configuration and the record of what was started.
    ``ray`` and ``serve``: what to start beside S3. ``serve_args``: entries that replace those of the
    application's args. ``serve_port``: this port or an error; without it any free one.

    Attributes, once started: ``s3_endpoint``, ``ray_address`` (GCS, for ``ray.init``), ``dashboard_url``,
    ``serve_url``, ``token_path``, ``env`` (for child processes: token, addresses, S3 keys, PATH, PYTHONPATH).

    Raises: ConfigError when another live process holds ``work_dir`` or ``serve_port`` is taken;
    InfrastructureError, with the end of the log, when a part does not start.
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        ray: bool = True,
        serve: bool = True,
        serve_port: int | None = None,
        serve_args: Mapping[str, Any] | None = None,
        serve_config: Path = PROJECT_ROOT / "infra" / "serve.yaml",
        num_cpus: int = 8,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self.work_dir = work_dir.resolve()
        self.token_path = self.work_dir / "ray-token"
        self.s3_endpoint = self.ray_address = self.dashboard_url = self.serve_url = ""
        self.env: dict[str, str] = {}
        self._with_ray = ray or serve
        self._with_serve = serve
        self._serve_port = serve_port
        self._serve_args = dict(serve_args or {})
        self._serve_config = serve_config
        self._num_cpus = num_cpus
        self._say = say
        self._signals = SignalGate()
        self._record: ProcessRecord | None = None
        self._roots: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._signals.install()
        try:
            self._start()
        except BaseException:
            # Also KeyboardInterrupt and SystemExit: nothing may stay behind.
            self._stop(keep_logs=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(keep_logs=kind is not None)

    def submit(
        self,
        entrypoint: Sequence[str],
        *,
        submission_id: str | None = None,
        on_line: Callable[[str], None] = print,
    ) -> int:
        """Run ``ray job submit --working-dir . -- entrypoint`` and return the exit code of the job's driver.

        ``ray job submit`` itself exits 1 for every failure, so the code is asked of the dashboard; where the
        driver never started or was stopped from outside there is none, and the answer is 4 (infrastructure).
        """
        submission_id = submission_id or f"assay-{uuid.uuid4().hex[:12]}"
        argv = [
            *script("ray"),
            "job",
            "submit",
            "--submission-id",
            submission_id,
            "--working-dir",
            ".",
            "--",
            *entrypoint,
        ]
        self._run(argv, on_line)
        code = Dashboard(self.dashboard_url, self.token_path).job(submission_id).get("driver_exit_code")
        return EXIT_INFRASTRUCTURE if code is None else int(code)

    @property
    def ray_log_dir(self) -> Path:
        """Where Ray and Serve log while the stack runs."""
        [logs] = self._temp_dir().glob("ray*/session_2*/logs")
        return logs

    # ---- start ----

    def _start(self) -> None:
        if self._serve_port is not None and not is_port_free(self._serve_port):
            raise ConfigError(
                f"port {self._serve_port} on 127.0.0.1 is in use; stop what uses it or choose another port"
            )
        self.work_dir.mkdir(parents=True, exist_ok=True)
        record_path = self.work_dir / "processes.json"
        self._clean_up_after_the_last_one(record_path)
        with self._signals.hold():
            # Unix socket paths may have 107 bytes, and Ray adds about 65 of its own to this.
            temp_dir = Path(tempfile.mkdtemp(prefix="assay-", dir="/tmp"))
            self._record = ProcessRecord.new(record_path, temp_dir)
        write_token(self.token_path)
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._start_servers(Ports(), temp_dir / f"ray{attempt}")
                break
            except _PortTakenError as error:
                if attempt == _PORT_ATTEMPTS:
                    raise
                self._say(f"{error}; trying others")
                self._stop_servers()
        if self._with_serve:
            self._deploy()

    def _clean_up_after_the_last_one(self, record_path: Path) -> None:
        last = ProcessRecord.read(record_path)
        if last is None:
            return
        if last.owner.find():
            raise ConfigError(
                f"{self.work_dir} is in use by process {last.owner.pid}; stop it or choose another folder"
            )
        left = last.roots()
        if left:
            self._say(f"stopping {len(left)} processes that an earlier run left behind")
            stop(left, roots=left, wait_s=RAY_STOP_WAIT_S)
        shutil.rmtree(last.temp_dir, ignore_errors=True)
        record_path.unlink()

    def _start_servers(self, ports: Ports, ray_dir: Path) -> None:
        self.s3_endpoint = f"http://127.0.0.1:{ports.s3}"
        server_env = server_environment(self.s3_endpoint, self.token_path)
        self._say(f"starting an S3 server on {self.s3_endpoint}")
        self._spawn("s3", s3_command(ports), server_env)
        self.env = server_env
        if self._with_ray:
            self.ray_address = f"127.0.0.1:{ports.gcs}"
            self.dashboard_url = f"http://127.0.0.1:{ports.dashboard}"
            self.serve_url = f"http://127.0.0.1:{self._serve_port or ports.serve}"
            self._say(f"starting Ray, dashboard on {self.dashboard_url}, token in {self.token_path}")
            self._spawn("ray", ray_command(ports, ray_dir, self._num_cpus), server_env)
            self.env = {**server_env, **self._addresses()}
        self._wait_until("s3", lambda: http_status(f"{self.s3_endpoint}/moto-api/", timeout_s=1.0) is not None)
        if self._with_ray:
            self._wait_until("ray", Dashboard(self.dashboard_url, self.token_path).is_up)
            self._remember_descendants()

    def _addresses(self) -> dict[str, str]:
        # For clients alone: a head node that finds RAY_ADDRESS in its environment tries to join that cluster.
        return {
            "RAY_ADDRESS": self.ray_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
        }

    def _temp_dir(self) -> Path:
        assert self._record is not None
        return Path(self._record.temp_dir)

    def _spawn(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        assert self._record is not None
        with self._signals.hold():
            process = spawn(argv, env=env, log_path=self._log_path(name), cwd=PROJECT_ROOT)
            self._roots[name] = process
            self._record.add([ProcessId.of(psutil.Process(process.pid), name)])

    def _log_path(self, name: str) -> Path:
        return self.work_dir / "logs" / f"{name}.log"

    def _wait_until(self, name: str, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            log = tail(self._log_path(name))
            if self._roots[name].poll() is not None:
                error = _PortTakenError if "already in use" in log.lower() else InfrastructureError
                raise error(f"{name} ended with exit code {self._roots[name].returncode} at its start:\n{log}")
            if time.monotonic() > deadline:
                raise InfrastructureError(f"{name} did not answer within {START_TIMEOUT_S:.0f} s:\n{log}")
            time.sleep(_POLL_S)

    def _remember_descendants(self) -> None:
        """Write Ray's processes down: should ``ray start`` be killed, nothing would lead to them any more."""
        assert self._record is not None
        self._record.add(
            ProcessId.of(process, "ray") for process in with_descendants(self._record.roots("ray")) if is_alive(process)
        )

    # ---- Serve ----

    def _deploy(self) -> None:
        config = yaml.safe_load(self._serve_config.read_text())
        config["http_options"] = {
            **config["http_options"],
            "host": "127.0.0.1",
            "port": int(self.serve_url.rsplit(":", 1)[1]),
        }
        for application in config["applications"]:
            application["args"] = {**application.get("args", {}), **self._serve_args}
        rendered = self.work_dir / "serve.yaml"
        rendered.write_text(yaml.safe_dump(config, sort_keys=False))
        self._say(f"deploying the Serve application on {self.serve_url}")
        output: list[str] = []
        if self._run([*script("serve"), "deploy", str(rendered)], output.append) != 0:
            raise InfrastructureError("serve deploy failed:\n" + "\n".join(output[-15:]))
        self._wait_until_ready()
        self._remember_descendants()

    def _wait_until_ready(self) -> None:
        dashboard = Dashboard(self.dashboard_url, self.token_path)
        deadline = time.monotonic() + READY_TIMEOUT_S
        last_line = ""
        while http_status(f"{self.serve_url}/readyz") != 200:
            application = dashboard.applications().get(APPLICATION, {})
            line = describe(application)
            if line != last_line:
                self._say(f"  {line}")
                last_line = line
            if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise InfrastructureError(f"the Serve application failed: {failure(application)}")
            if time.monotonic() > deadline:
                raise InfrastructureError(f"the Serve application was not ready within {READY_TIMEOUT_S:.0f} s: {line}")
            time.sleep(_POLL_S)
        self._say("  ready: a replica scored its golden image right")

    def _run(self, argv: Sequence[str], on_line: Callable[[str], None]) -> int:
        """Run a client command to its end, giving each line of its output to ``on_line``; its exit code."""
        process = subprocess.Popen(
            list(argv),
            env=self.env,
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                on_line(line.rstrip("\n"))
            return process.wait()
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.kill()
                process.wait()

    # ---- stop ----

    def _stop(self, *, keep_logs: bool) -> None:
        with self._signals.hold():
            if self._record is not None:
                if self._roots:
                    self._say("stopping what was started")
                if "ray" in self._roots:
                    self._shut_down_serve()
                self._stop_servers()
                if keep_logs:
                    self._keep_ray_logs()
                shutil.rmtree(self._temp_dir(), ignore_errors=True)
                self._record.path.unlink()
                self._record = None
        self._signals.restore()

    def _shut_down_serve(self) -> None:
        dashboard = Dashboard(self.dashboard_url, self.token_path)
        if not dashboard.applications():
            return
        dashboard.shut_down_serve()
        deadline = time.monotonic() + SERVE_STOP_WAIT_S
        while dashboard.applications() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _stop_servers(self) -> None:
        """Ray first, while it can still reach S3; then S3."""
        assert self._record is not None
        for name, wait_s in (("ray", RAY_STOP_WAIT_S), ("s3", S3_STOP_WAIT_S)):
            process = self._roots.pop(name, None)
            if process is None:
                continue
            recorded = self._record.roots(name)
            stop(recorded, roots=[one for one in recorded if one.pid == process.pid] or recorded, wait_s=wait_s)
            process.wait()

    def _keep_ray_logs(self) -> None:
        for logs in self._temp_dir().glob("ray*/session_2*/logs"):
            shutil.copytree(logs, self.work_dir / "logs" / "ray", dirs_exist_ok=True)
            self._say(f"Ray's logs are kept in {self.work_dir / 'logs' / 'ray'}")
