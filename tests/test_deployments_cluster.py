"""The application on a real Ray cluster, over real HTTP: right rewards, bounded bodies, a killed replica."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from jobs.local_dashboard import Dashboard
from jobs.local_stack import PROJECT_ROOT, LocalStack
from model.code_version import code_version
from model.perspectives import PERSPECTIVES
from model.schema import Generation
from model.scorer import load
from tests.serve_parts import as_base64

pytestmark = pytest.mark.cluster

# float32 through other batches and threads; see the design's definition of "the same".
TOLERANCE = 1e-5


def picture(number: int) -> bytes:
    """Images of several sizes, so that forward batches have padding."""
    image = Image.effect_noise((200 + 90 * (number % 3), 160 + 70 * (number % 2)), 40 + 10 * number).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


GENERATIONS = [Generation(f"g{n}", "a red square " * (1 + n % 4), picture(n)) for n in range(6)]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, float]]:
    scorer = load("demo")
    return {r.generation_id: {str(p): v for p, v in r.rewards.items()} for r in scorer.score(GENERATIONS)}


def request_body(generations: list[Generation]) -> dict[str, Any]:
    return {"items": [{"id": g.generation_id, "prompt": g.prompt, "image": as_base64(g.image)} for g in generations]}


def post(stack: LocalStack, body: Any) -> httpx.Response:
    return httpx.post(f"{stack.serve_url}/v1/score", json=body, timeout=30, trust_env=False)


def get(stack: LocalStack, path: str) -> httpx.Response:
    return httpx.get(stack.serve_url + path, timeout=30, trust_env=False)


def test_ready_means_the_golden_image_was_scored_by_this_checkpoint(stack: LocalStack) -> None:
    answer = get(stack, "/readyz").json()
    identity = load("demo").identity
    assert (answer["status"], answer["golden"]) == ("ready", "passed")
    assert answer["model"]["checkpoints"] == {str(p): checkpoint for p, checkpoint in identity.checkpoints.items()}
    assert answer["model"]["is_trained"] is identity.is_trained
    assert answer["code_version"] == code_version()


def test_one_request_gives_the_rewards_of_the_bare_scorer(
    stack: LocalStack, expected: dict[str, dict[str, float]]
) -> None:
    response = post(stack, request_body(GENERATIONS))
    assert response.status_code == 200, response.text
    for result in response.json()["results"]:
        assert result["status"] == "scored"
        assert result["rewards"] == pytest.approx(expected[result["id"]], abs=TOLERANCE)
    spread = {p: {round(rewards[p], 3) for rewards in expected.values()} for p in PERSPECTIVES}
    assert all(len(values) > 1 for values in spread.values()), "rewards that are all alike would prove nothing"


def test_concurrent_requests_share_passes_and_keep_their_rewards(
    stack: LocalStack, expected: dict[str, dict[str, float]]
) -> None:
    answers: dict[str, Any] = {}

    def ask(generation: Generation) -> None:
        [answers[generation.generation_id]] = post(stack, request_body([generation])).json()["results"]

    threads = [threading.Thread(target=ask, args=(generation,)) for generation in GENERATIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for generation in GENERATIONS:
        rewards = answers[generation.generation_id]["rewards"]
        assert rewards == pytest.approx(expected[generation.generation_id], abs=TOLERANCE)


_CALL_THE_HANDLE = """
import json, pickle, sys
import ray
from ray import serve
from model.errors import ConfigError
from model.prepared_bytes import pack_arrays
from model.scorer import load_preprocessor

ray.init(log_to_driver=False)
preprocessor = load_preprocessor("demo")
generations = pickle.load(sys.stdin.buffer)
batch = [(one.generation_id, pack_arrays(one.arrays)) for one in preprocessor.preprocess(generations)]
handle = serve.get_deployment_handle("Replica", "assay")
facts = handle.identity.remote().result(timeout_s=60)["facts"]
records = handle.score_prepared.remote(batch, facts).result(timeout_s=60)
try:
    handle.score_prepared.remote(batch, {**facts, "checkpoint safety": "another"}).result(timeout_s=60)
    refusal = None
except ConfigError as error:
    refusal = str(error)
identity = handle.identity.remote().result(timeout_s=60)
rewards = {record.generation_id: dict(record.rewards) for record in records}
print(json.dumps({"rewards": rewards, "refusal": refusal, "identity": identity}))
"""


def test_the_job_s_way_in_gives_the_same_rewards(stack: LocalStack, expected: dict[str, dict[str, float]]) -> None:
    import pickle

    called = subprocess.run(
        [sys.executable, "-c", _CALL_THE_HANDLE],
        input=pickle.dumps(GENERATIONS),
        env=stack.env,
        cwd=PROJECT_ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert called.returncode == 0, called.stderr.decode()
    answer = json.loads(called.stdout.decode().splitlines()[-1])
    assert list(answer["rewards"]) == [g.generation_id for g in GENERATIONS]
    for name, rewards in answer["rewards"].items():
        assert rewards == pytest.approx(expected[name], abs=TOLERANCE)
    assert "differs in checkpoint safety" in answer["refusal"]
    assert answer["identity"]["code_version"] == code_version()
    assert answer["identity"]["preprocessing_hash"] == load("demo").preprocessing_hash


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"items": [{"prompt": "p", "image": "@@"}]}, 422, "bad_image_encoding"),
        ({"items": [{"prompt": "p", "image": ""}]}, 422, "image_empty"),
        ({"items": [{"prompt": "p", "image": "PGh0bWw+"}]}, 422, "image_not_an_image"),
        ({"items": [{"prompt": "p", "image": "", "seed": 1}]}, 422, "invalid_request"),
        ({"items": []}, 422, "invalid_request"),
    ],
)
def test_wrong_input_is_a_problem_with_a_code(stack: LocalStack, body: Any, status: int, code: str) -> None:
    response = post(stack, body)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["code"] == code


def raw_request(stack: LocalStack, head: str, chunks: int, chunk: bytes) -> tuple[bytes, int]:
    """Sends head and then chunks until the server answers or closes; its answer, and the chunks that went out."""
    parts = urlsplit(stack.serve_url)
    sent = 0
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(head.encode())
        try:
            while sent < chunks:
                connection.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has stopped listening: what matters is what it says
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    return answer, sent


HEAD = "POST /v1/score HTTP/1.1\r\nHost: assay\r\nContent-Type: application/json\r\n"
MEBIBYTE = bytes([32]) * (1 << 20)


def test_declared_oversize_is_refused_without_reading_it(stack: LocalStack) -> None:
    answer, _ = raw_request(stack, f"{HEAD}Content-Length: {1 << 40}\r\n\r\n", 0, b"")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in answer


def test_endless_chunked_body_is_cut_off(stack: LocalStack) -> None:
    chunk = b"100000\r\n" + MEBIBYTE + b"\r\n"
    answer, sent = raw_request(stack, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", 2000, chunk)
    # The limit is 64 MiB; Serve's proxy has read on by some 200 MiB until it hears of the refusal.
    assert sent < 1000
    assert get(stack, "/healthz").status_code == 200
    # The client may have been cut off before it could read the answer; when it did, it is this one.
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 413 ") and b'"code":"body_too_large"' in answer)


def replica_pids(stack: LocalStack) -> list[int]:
    [application] = Dashboard(stack.dashboard_url, stack.token_path).applications().values()
    replicas = application["deployments"]["Replica"]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]


def test_killed_replica_is_replaced_and_every_request_gets_json(stack: LocalStack) -> None:
    """All replicas at once: for some seconds there is none."""
    killed = replica_pids(stack)
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    codes: Counter[tuple[int, str]] = Counter()
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        response = post(stack, request_body(GENERATIONS[:1]))
        codes[response.status_code, response.headers["content-type"]] += 1
        if response.status_code == 200 and get(stack, "/readyz").status_code == 200 and replica_pids(stack):
            break
        time.sleep(0.3)
    assert codes[200, "application/json"] > 0, codes
    assert set(codes) <= {(200, "application/json"), (503, "application/problem+json")}
    assert not set(replica_pids(stack)) & set(killed)


def test_logs_hold_no_prompt_and_no_image(stack: LocalStack) -> None:
    secret = "PROMPT-THAT-MUST-NOT-BE-LOGGED"
    image = as_base64(picture(0))
    assert post(stack, {"items": [{"prompt": secret, "image": image}]}).status_code == 200
    assert post(stack, {"items": [{"prompt": secret, "image": image[:100]}]}).status_code == 422
    assert post(stack, {"items": [{"prompt": secret, "image": image, secret: 1}]}).status_code == 422
    logs = [path for path in Path(stack.ray_log_dir).rglob("*") if path.is_file()]
    assert any("POST /v1/score 200" in path.read_text(errors="replace") for path in logs), "access log is not there"
    for path in logs:
        text = path.read_text(errors="replace")
        assert secret not in text, path
        assert image[:60] not in text, path
