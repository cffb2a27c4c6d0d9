"""The few calls of Ray's dashboard that a local stack needs, with its token. Standard library only.

Plain HTTP instead of Ray's own clients: those read the token from this process's environment and import Ray,
which takes seconds.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 20.0
_APPLICATIONS = "/api/serve/applications/"


def http_status(url: str, headers: dict[str, str] | None = None, timeout_s: float = 5.0) -> int | None:
    """The status of ``GET url``; None when nobody answers."""
    try:
        return _request("GET", url, headers or {}, timeout_s)[0]
    except (OSError, http.client.HTTPException):
        return None


class Dashboard:
    """Ray's dashboard at ``url`` (http), whose token lies in ``token_path``."""

    def __init__(self, url: str, token_path: Path) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token_path.read_text()}"}

    def is_up(self) -> bool:
        return http_status(f"{self._url}/api/version", self._headers) == 200

    def applications(self) -> dict[str, Any]:
        """Serve applications by name, as its REST API describes them; empty while Serve is not up."""
        details = self._json("GET", _APPLICATIONS)
        return dict((details or {}).get("applications", {}))

    def shut_down_serve(self) -> None:
        """Ask Serve to delete every application; it does so in the background."""
        self._json("DELETE", _APPLICATIONS)

    def job(self, submission_id: str) -> dict[str, Any]:
        """What Ray knows of a submitted job: ``status``, ``driver_exit_code``, ``message``; empty when nothing."""
        return dict(self._json("GET", f"/api/jobs/{submission_id}") or {})

    def _json(self, method: str, path: str) -> Any:
        """The decoded answer, or None when there is none or it is not a success."""
        try:
            status, body = _request(method, self._url + path, self._headers, _TIMEOUT_S)
        except (OSError, http.client.HTTPException):
            return None
        return json.loads(body) if status == 200 and body else None


def describe(application: Mapping[str, Any]) -> str:
    """An application's state in one line, such as ``DEPLOYING (Replica 0/1, Ingress 1/1)``."""
    parts = []
    for name, deployment in application.get("deployments", {}).items():
        states = [replica.get("state") for replica in deployment.get("replicas", [])]
        parts.append(f"{name} {states.count('RUNNING')}/{max(len(states), 1)}")
    return f"{application.get('status', 'waiting for Serve')}" + (f" ({', '.join(parts)})" if parts else "")


def failure(application: Mapping[str, Any]) -> str:
    """What Serve says went wrong. Of a traceback the last line names the error; all of it stands in Ray's logs."""
    parts = [application, *application.get("deployments", {}).values()]
    lines = [part["message"].strip().splitlines()[-1] for part in parts if part.get("message", "").strip()]
    return "; ".join(lines)


def _request(method: str, url: str, headers: dict[str, str], timeout_s: float) -> tuple[int, bytes]:
    parts = urlsplit(url)
    # http.client knows no proxies: a proxy variable in the user's shell must not catch loopback calls.
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request(method, parts.path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
