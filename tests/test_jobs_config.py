"""Arguments and configuration files: a typo fails before any work, in one line."""

from __future__ import annotations

import pytest

from jobs.backends import ScoringPlan
from jobs.config import parse_arguments
from jobs.progress import OutageRule, Progress
from model.errors import ConfigError

REQUIRED = ["--date", "2026-11-20", "--input", "s3://b/logs", "--output", "s3://b/out"]


def test_flags_win_over_the_file_and_maps_are_merged(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("via: pool\nbatch_size: 4\nmap: {prompt: caption, image_uri: url}\nlimits: {max_image_bytes: 5}\n")
    config = parse_arguments([*REQUIRED, "--config", str(path), "--via", "serve", "--map", "prompt=text"])
    assert (config.via, config.batch_size, config.limits.max_image_bytes) == ("serve", 4, 5)
    assert (config.column_of("prompt"), config.column_of("image_uri"), config.column_of("generator")) == (
        "text", "url", "generator",
    )  # fmt: skip


def test_the_form_of_adapters_reaches_the_pool(tmp_path):
    path = tmp_path / "job.yaml"
    for text, expected in (("adapters: low_rank", "low_rank"), ("via: pool", "auto")):
        path.write_text(text)
        config = parse_arguments([*REQUIRED, "--config", str(path)])
        assert ScoringPlan.of(config, "pool", {}).adapters == expected
    path.write_text("adapters: both")
    with pytest.raises(ConfigError, match=r"adapters: .*got 'both'"):
        parse_arguments([*REQUIRED, "--config", str(path)])


def test_the_shipped_defaults_are_valid():
    assert parse_arguments([*REQUIRED, "--config", "infra/job.yaml"]).checkpoint == "demo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--date is required"),
        (["--date", "2026-13-01", *REQUIRED[2:]], "date: .*2026-13-01"),
        ([*REQUIRED, "--via", "magic"], "invalid choice"),
        ([*REQUIRED, "--map", "prompt"], "has no '='"),
        ([*REQUIRED, "--map", "promt=x"], "'promt' is not a field"),
        ([*REQUIRED, "--mode", "int4"], "invalid choice: 'int4'"),
        ([*REQUIRED, "--mode", "fp8"], "mode='fp8' computes in bfloat16, not in float32; set dtype=bfloat16"),
        ([*REQUIRED, "--max-error-rate", "2"], "max_error_rate"),
        ([*REQUIRED, "--drop-columns", "row_key"], "'row_key' cannot be dropped"),
        ([*REQUIRED, "--outptu", "x"], "unrecognized arguments: --outptu"),
        ([*REQUIRED, "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_faults_are_named_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_arguments(arguments)
    assert "\n" not in str(caught.value)


def test_local_paths_are_absolute_because_workers_open_them_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "demo").mkdir()
    local = ["--date", "2026-11-20", "--input", "logs", "--output", "./out", "--image-root", "file://images"]
    config = parse_arguments([*local, "--checkpoint", "weights"])
    assert (config.input, config.output) == (f"{tmp_path}/logs", f"{tmp_path}/out")
    assert (config.image_root, config.checkpoint) == (f"{tmp_path}/images", f"{tmp_path}/weights")
    assert parse_arguments(local).checkpoint == "demo"  # the shipped one goes before a folder
    assert parse_arguments([*local, "--checkpoint", "nothing"]).checkpoint == "nothing"
    remote = parse_arguments(REQUIRED)
    assert (remote.input, remote.output, remote.image_root) == ("s3://b/logs", "s3://b/out", None)
    with pytest.raises(ConfigError, match="unsupported URI scheme 'ftp'"):
        parse_arguments([*REQUIRED, "--output", "ftp://x/y"])


def test_a_mode_comes_from_the_file_or_the_flag(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("mode: fp8\ndtype: bfloat16\n")
    assert parse_arguments(REQUIRED).mode == "exact"
    assert parse_arguments([*REQUIRED, "--config", str(path)]).mode == "fp8"
    assert parse_arguments([*REQUIRED, "--config", str(path), "--mode", "int8"]).mode == "int8"


@pytest.mark.parametrize("text", ["map: [a]", "map: a", "1: 2"])
def test_a_map_or_key_of_the_wrong_kind_in_the_file_is_one_line(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    for more in ([], ["--map", "prompt=x"]):
        with pytest.raises(ConfigError) as caught:
            parse_arguments([*REQUIRED, "--config", str(path), *more])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["bacth_size: 3", "limits: {max_bytes: 1}", "- a", "{", "via: 3"])
def test_unknown_keys_and_broken_files_are_refused(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        parse_arguments([*REQUIRED, "--config", str(path)])


def test_most_rows_failing_alike_is_an_outage():
    progress = Progress(OutageRule(window_rows=100, share=0.5))
    assert progress.rows(["image_forbidden"] * 50 + [None] * 10) is None
    assert "image_forbidden" in progress.rows(["image_forbidden"])
    assert progress.stop_reason()


def test_many_failures_of_several_kinds_or_after_the_window_are_bad_rows():
    progress = Progress(OutageRule(window_rows=100, share=0.5))
    assert progress.rows(["image_empty"] * 50 + ["image_not_found"] * 50) is None
    assert progress.rows(["image_empty"] * 1000) is None
    assert Progress(None).rows(["image_empty"] * 1000) is None
