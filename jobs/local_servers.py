"""How the servers of a local stack are started: their ports, environment, token and command lines."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jobs.local_processes import base_environment, free_port

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ports:
    """A free port for each thing that lets us choose. Ray's own listen on all interfaces: the token guards them."""

    s3: int = field(default_factory=free_port)
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    agent_http: int = field(default_factory=free_port)
    agent_grpc: int = field(default_factory=free_port)
    runtime_env_agent: int = field(default_factory=free_port)
    metrics: int = field(default_factory=free_port)
    client: int = field(default_factory=free_port)
    serve: int = field(default_factory=free_port)


def script(name: str) -> list[str]:
    """A console script of this very environment, whatever PATH says."""
    return [sys.executable, str(Path(sys.executable).parent / name)]


def s3_command(ports: Ports) -> list[str]:
    """Moto's S3 server on loopback; it keeps everything in memory."""
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports.s3)]


def write_token(path: Path) -> None:
    """A new random token that only we can read. Ray's own command would write it into the home folder."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def server_environment(s3_endpoint: str, token_path: Path) -> dict[str, str]:
    """What Ray, its workers and all our children see.

    The user's own AWS and Ray settings are left out: the demonstration must neither use real keys nor join
    somebody's cluster.
    """
    env = base_environment(drop_prefixes=("AWS_", "RAY_"))
    no_proxy = ",".join(filter(None, [env.get("NO_PROXY") or env.get("no_proxy"), "127.0.0.1,localhost"]))
    return env | {
        # The entry point "python jobs/score_logs.py" must find this environment's python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
        "PYTHONPATH": str(PROJECT_ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # On SIGTERM Ray waits 30 s for its work to move to other nodes. There are none.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local-only",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def ray_command(ports: Ports, ray_dir: Path, num_cpus: int) -> list[str]:
    """``ray start`` for a head node with ``num_cpus`` logical CPUs that stays in the foreground."""
    return [
        *script("ray"),
        "start",
        "--head",
        "--block",
        f"--num-cpus={num_cpus}",
        "--node-ip-address=127.0.0.1",
        f"--port={ports.gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--dashboard-agent-listen-port={ports.agent_http}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--runtime-env-agent-port={ports.runtime_env_agent}",
        f"--metrics-export-port={ports.metrics}",
        "--min-worker-port=0",
        "--max-worker-port=0",  # any: two clusters on one machine then never argue about a range
        f"--ray-client-server-port={ports.client}",
        f"--temp-dir={ray_dir}",
        f"--object-store-memory={1 << 30}",
        "--disable-usage-stats",
    ]
