"""One safetensors file per perspective: the same rewards, new hashes; and the list of checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.cli import main
from model.checkpoint_list import list_checkpoints
from model.errors import ConfigError
from model.llava_reward.config import read_head_config, read_lora_config
from model.llava_reward.convert import convert
from model.meaning import RewardVector
from model.perspectives import PERSPECTIVES, Perspective
from model.schema import Generation
from model.scorer import SHIPPED, load, load_preprocessor, read_identity
from tests.llava_reward_bundles import write_bundle

DEMO = SHIPPED / "demo"
GENERATIONS = [
    Generation(f"{n}-{prompt}", prompt, (DEMO / f"golden/{n}.png").read_bytes())
    for n in range(3)
    for prompt in ("", "a red ball under a tree")
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert") / "out"
    convert(DEMO, out)
    return out


def test_rewards_are_the_same_bit_for_bit(converted: Path) -> None:
    before, after = load(DEMO), load(converted)
    assert after.score(GENERATIONS) == before.score(GENERATIONS)
    after.check_golden()
    assert load_preprocessor(converted).preprocessing_hash == before.preprocessing_hash


def test_identity_differs_in_the_hashes_alone(converted: Path) -> None:
    before, after = read_identity(DEMO), read_identity(converted)
    assert dataclasses.replace(after, checkpoints=before.checkpoints) == before
    for perspective in PERSPECTIVES:
        assert after.checkpoints[perspective].startswith("demo@sha256:")
        assert after.checkpoints[perspective] != before.checkpoints[perspective]
    assert load(converted).identity == after


def test_files_hold_published_names_with_lora_apart(converted: Path) -> None:
    tensors = load_file(converted / "safety.safetensors")
    head = torch.load(DEMO / "safety/pytorch_model.bin", weights_only=True)
    lora = torch.load(DEMO / "safety/lora/adapter_model.bin", weights_only=True)
    assert tensors.keys() == head.keys() | lora.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in (head | lora).items())
    folder, file = DEMO / "safety", converted / "safety.safetensors"
    assert read_head_config(file / "reward_config.yaml") == read_head_config(folder / "reward_config.yaml")
    assert read_lora_config(file / "lora/adapter_config.json") == read_lora_config(folder / "lora/adapter_config.json")
    assert not (converted / "safety").exists()


def test_conversion_can_be_repeated_and_chained(converted: Path, tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "again")
    done = convert(converted, tmp_path / "chained")
    assert done.before == done.after == read_identity(tmp_path / "again")


def test_new_files_are_pinned_by_hash(converted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(converted, tmp_path / "copy")
    data = (copy / "overall.safetensors").read_bytes()
    (copy / "overall.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"overall\.safetensors has sha256 .* changed or cut"):
        load(copy)


def test_backbone_elsewhere_stays_there_with_its_hashes(tmp_path: Path) -> None:
    bundle = shutil.copytree(DEMO, tmp_path / "bundle")
    (bundle / "backbone").rename(tmp_path / "phi")
    values = json.loads((bundle / "scorer.json").read_text())
    digest = "0" * 64
    values |= {"backbone": "../phi", "hashes": {"../phi/model.safetensors": digest, "safety/pytorch_model.bin": digest}}
    (bundle / "scorer.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="has sha256"):
        convert(bundle, tmp_path / "out")
    del values["hashes"]["safety/pytorch_model.bin"]
    weights = (tmp_path / "phi/model.safetensors").read_bytes()
    values["hashes"]["../phi/model.safetensors"] = hashlib.sha256(weights).hexdigest()
    (bundle / "scorer.json").write_text(json.dumps(values))
    convert(bundle, tmp_path / "out")
    written = json.loads((tmp_path / "out/scorer.json").read_text())
    assert written["backbone"] == str(tmp_path / "phi")
    assert written["hashes"].keys() == {
        f"{tmp_path}/phi/model.safetensors",
        *(f"{p}.safetensors" for p in PERSPECTIVES),
    }
    assert not (tmp_path / "out/backbone").exists()
    assert load(tmp_path / "out").score(GENERATIONS[:1]) == load(DEMO).score(GENERATIONS[:1])


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_other_families_convert_alike(family: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "in", family, {"alignment": "bt_plain", "overall": "gpm_plain"})
    done = convert(bundle, tmp_path / "out")
    before, after = load(bundle), load(tmp_path / "out")
    assert after.score(GENERATIONS[:2]) == before.score(GENERATIONS[:2])
    assert done.after.vector_perspectives == done.before.vector_perspectives == (Perspective.OVERALL,)
    images = [generation.image for generation in GENERATIONS[::2]]
    ranking = after.rank("a red ball", images, Perspective.OVERALL)
    assert sorted(one.index for one in ranking.ranked) == [0, 1, 2]
    assert all(isinstance(one.reward, RewardVector) for one in ranking.ranked)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    for out in (tmp_path / "file", tmp_path / "full"):
        with pytest.raises(ConfigError, match="there already"):
            convert(DEMO, out)


def test_files_of_another_kind_are_refused(converted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(converted, tmp_path / "copy")
    values = json.loads((copy / "scorer.json").read_text())
    (copy / "scorer.json").write_text(json.dumps({name: value for name, value in values.items() if name != "hashes"}))
    shutil.copyfile(DEMO / "backbone/model.safetensors", copy / "alignment.safetensors")
    with pytest.raises(ConfigError, match=r"alignment\.safetensors holds no reward_config\.yaml; make it with"):
        load(copy)
    (copy / "alignment.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"alignment\.safetensors is not a safetensors file"):
        load(copy)


# --- the command ---


def test_command_says_what_the_hashes_became(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    before, after = read_identity("demo"), read_identity(tmp_path / "out")
    for perspective in PERSPECTIVES:
        assert f"{before.checkpoints[perspective]} is now {after.checkpoints[perspective]}" in printed.out
    assert "a policy for it must name the new" in printed.err + printed.out
    assert main(["convert", "demo", str(tmp_path / "out")]) == 2
    assert "there already" in capsys.readouterr().err


def test_list_says_what_is_known_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "--format", "json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checkpoints"]}
    demo, alignment = listed["demo"], listed["llava-reward-phi-alignment"]
    assert (demo["source"], demo["location"], demo["is_verified"]) == ("shipped", "demo", True)
    assert demo["perspectives"] == list(PERSPECTIVES)
    assert (alignment["backbone"], alignment["backbone_licence"]) == ("microsoft/Phi-3.5-vision-instruct", "MIT")
    assert alignment["location"] == "smz8599/LLaVA-Reward/alignment/llavareward_phi_alignment"
    assert not any(one["is_verified"] for one in listed.values() if one["source"] == "published")
    assert all(one["licence"] is None for one in listed.values() if one["source"] == "published")
    published = {p for one in list_checkpoints() if one.source == "published" for p in one.perspectives}
    assert published == set(Perspective)


def test_list_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints"]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "not known" in printed
    assert "Nothing here was checked against the hub" in printed
