"""A reverse proxy in front of an S3 server that answers 503 SlowDown to a share of the requests.

    with FaultProxy(endpoint, probability=0.3) as proxy:
        ...  # talk to proxy.endpoint
    assert proxy.faults > 0

The faults are drawn from a seeded generator, so a run can be repeated.
"""

from __future__ import annotations

import http.client
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# Belong to one connection, or are set anew on this side.
_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "expect", "server", "date"}


class FaultProxy:
    """``probability``: share of requests answered 503, in [0, 1]. Counts ``faults`` and ``passed``."""

    def __init__(self, upstream: str, *, probability: float, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.faults = self.passed = 0
        self._probability = probability
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="s3-fault-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def draw_fault(self) -> bool:
        with self._lock:
            is_fault = self._random.random() < self._probability
            self.faults += is_fault
            self.passed += not is_fault
            return is_fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a test reads the counters."""

    def _forward(self) -> None:
        body = self._read_body()
        if self.server.proxy.draw_fault():
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _NOT_PASSED_ON}
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(response.status, headers, response.read(), length)
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward
