"""One run per night."""

from __future__ import annotations

import json
import threading
import time

import pytest

from jobs import lock as lock_module
from jobs.lock import NightLock
from model.errors import ConfigError, InfrastructureError, TransientError
from tests.job_helpers import NIGHT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(lock_module, "SILENCE_S", 0.8)


def night_lock(output, run_id="run", on_lost=lambda: None):
    return NightLock(str(output), NIGHT, run_id, lambda line: None, on_lost)


def test_the_second_of_two_fails_at_once_and_names_the_holder(tmp_path):
    with night_lock(tmp_path, "first"):
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"run first \(host .*, pid \d+"), night_lock(tmp_path, "second"):
            raise AssertionError("two runs hold one night")
        assert time.monotonic() - started < 0.7


def test_a_released_night_is_free_at_once(tmp_path):
    for name in ("first", "second", "third"):
        started = time.monotonic()
        with night_lock(tmp_path, name) as held:
            held.check()
        assert time.monotonic() - started < 0.5
    assert len(list((tmp_path / f"locks/dt={NIGHT}").iterdir())) == 1


def test_a_dead_holder_is_succeeded_after_its_silence(tmp_path):
    folder = tmp_path / f"locks/dt={NIGHT}"
    folder.mkdir(parents=True)
    (folder / "00000007.json").write_text(json.dumps({"run_id": "dead", "beat": 3, "is_released": False}))
    started = time.monotonic()
    with night_lock(tmp_path, "heir") as held:
        assert 0.7 < time.monotonic() - started < 3
        held.check()
    assert [path.name for path in folder.iterdir()] == ["00000008.json"]


def test_of_two_heirs_one_wins(tmp_path):
    folder = tmp_path / f"locks/dt={NIGHT}"
    folder.mkdir(parents=True)
    (folder / "00000001.json").write_text(json.dumps({"run_id": "dead", "beat": 0, "is_released": False}))
    outcomes: list[str] = []

    def claim(name):
        try:
            with night_lock(tmp_path, name):
                time.sleep(0.5)
                outcomes.append("won")
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=claim, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "won"]


def test_a_holder_that_was_taken_for_dead_notices_and_may_not_publish(tmp_path):
    lost = threading.Event()
    with night_lock(tmp_path, "slow", lost.set) as held:
        held.check()
        (tmp_path / f"locks/dt={NIGHT}/00000002.json").write_text(json.dumps({"run_id": "heir", "beat": 0}))
        assert lost.wait(2)
        with pytest.raises(InfrastructureError, match="took over"):
            held.check()
    assert json.loads((tmp_path / f"locks/dt={NIGHT}/00000002.json").read_text())["run_id"] == "heir"


def test_nights_do_not_hinder_each_other(tmp_path):
    other = NightLock(str(tmp_path), NIGHT.replace(day=1), "other", lambda line: None, lambda: None)
    with night_lock(tmp_path, "one") as first, other as second:
        first.check()
        second.check()
    locks = {path.parent.name: json.loads(path.read_text())["run_id"] for path in (tmp_path / "locks").glob("*/*.json")}
    assert locks == {f"dt={NIGHT}": "one", f"dt={NIGHT.replace(day=1)}": "other"}


def test_a_holder_that_cannot_renew_stops_itself(tmp_path, monkeypatch):
    lost = threading.Event()
    with night_lock(tmp_path, "holder", lost.set) as held:
        monkeypatch.setattr(threading, "excepthook", lambda failure: None)

        def refuse(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(lock_module.storage, "put", refuse)
        assert lost.wait(2)
        with pytest.raises(InfrastructureError, match="could not be renewed"):
            held.check()


def test_a_lock_that_cannot_be_released_is_no_failure_of_the_run(tmp_path, monkeypatch):
    said: list[str] = []
    with NightLock(str(tmp_path), NIGHT, "run", said.append, lambda: None):

        def refuse(*args, **kwargs):
            raise TransientError("away")

        monkeypatch.setattr(lock_module.storage, "put", refuse)
    assert "was not released" in said[0]
