"""A hub repository on loopback: the few endpoints that huggingface_hub uses to list and download one commit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "someone/rewards"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """``reported``: what the listing says of each file; ``sent``: what a download gives, if it is something else."""

    endpoint: str
    reported: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)

    def entry(self, path: str) -> dict[str, object]:
        data = self.reported[path]
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
        if path.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A repository ``REPO`` whose only commit ``COMMIT`` holds ``files``."""
    hub = Hub("", dict(files))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            tree, info, file = f"api/models/{REPO}/tree/{COMMIT}", f"api/models/{REPO}/revision/{COMMIT}", None
            if path.startswith(tree):
                folder = path.removeprefix(tree).strip("/")
                names = [name for name in hub.reported if name.startswith(f"{folder}/" if folder else "")]
                data = json.dumps([hub.entry(name) for name in names]).encode()
            elif path == info:
                siblings = [{"rfilename": name} for name in hub.reported]
                data = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            elif (file := path.removeprefix(f"{REPO}/resolve/{COMMIT}/")) in hub.reported:
                data = hub.sent.get(file, hub.reported[file])
                if with_body:
                    hub.downloads.append(file)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if REPO not in path else "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
