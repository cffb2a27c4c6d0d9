"""A client of the endpoint: JSON over HTTP, with retries where the endpoint asks for them.

Plain ``http.client``: the jobs need no other HTTP library, and one that reads proxies from the environment would send
images of a loopback endpoint somewhere else.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

from model.errors import ConfigError, InfrastructureError

_ATTEMPTS = 8
_LONGEST_WAIT_S = 30.0
_TIMEOUT_S = 60.0  # above the endpoint's own limit of a request, 30 s
_RETRIED = (429, 503)


class Refusal(Exception):
    """An answer that is an error and will stay one. ``status``: HTTP; ``code``: of ``deployments/problems.py``."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code

    @property
    def is_about_the_item(self) -> bool:
        """True where a request with one item was refused because of that item."""
        return self.code.startswith(("image_", "bad_", "prompt_", "non_finite_"))


class Endpoint:
    """One endpoint. Raises ``ConfigError`` for a URL that is not http(s)."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r} is no HTTP address; write http://host:port")
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._host, self._port = parts.hostname, parts.port
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def post(self, path: str, body: object) -> dict[str, Any]:
        """The JSON answer. Waits and asks again while the endpoint is overloaded, or its replica is replaced.

        Raises ``Refusal`` for any other answer than 200; ``InfrastructureError`` when there is none.
        """
        data = json.dumps(body).encode()
        for attempt in range(_ATTEMPTS):
            status, headers, answer = self._ask(path, data)
            if status not in _RETRIED:
                break
            if attempt + 1 < _ATTEMPTS:
                time.sleep(min(_LONGEST_WAIT_S, _seconds(headers.get("Retry-After")) * (attempt + 1)))
        else:
            raise InfrastructureError(f"{self.url}{path} still answers {status} after {_ATTEMPTS} attempts")
        content = _parsed(answer)
        if status != http.client.OK:
            detail = content.get("detail", "no JSON in the answer; is this the endpoint of Assay?")
            raise Refusal(status, str(content.get("code", "unknown")), str(detail))
        return content

    def _ask(self, path: str, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        # A connection each: one that waits while images are fetched may be closed by the server at any moment.
        connection = self._kind(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", self._path + path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise InfrastructureError(f"{self.url} does not answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 1.0


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        content = json.loads(answer)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
