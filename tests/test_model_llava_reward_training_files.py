"""What the trainer writes: the published layout, the rewards that it trained, and a card that says how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.errors import ConfigError
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.checkpoint import load_network, read_tensors
from model.llava_reward.config import read_head_config, read_lora_config
from model.llava_reward.training import writer
from model.llava_reward.training.base import read_base
from model.llava_reward.training.card import DataFacts, model_card
from model.llava_reward.training.lora import LoraSpec
from model.llava_reward.training.objective import make_objective
from model.meaning import HeadTraining
from model.perspectives import Perspective
from model.scorer import load
from tests.llava_reward_bundles import GOLDEN, write_bundle
from tests.train_helpers import CPU, DEMO, loop_of, losses, pairs

LORA = LoraSpec(4, 8.0, 0.0)
SAFETY = Perspective.SAFETY
FAMILIES = {"phi3v": {}, "qwen": {"skip_ca_keys": "image_tokens"}, "llava": {"has_skip_ca": False}}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_adapter_gives_the_trained_rewards_under_published_names(
    family: str, temperature: float, tmp_path: Path
) -> None:
    variant = "bt_plain" if family == "llava" else "bt_skipca"
    folder = DEMO if family == "phi3v" else write_bundle(tmp_path / family, family, {"safety": "bt_plain"})
    base, records = read_base(str(folder)), pairs(tmp_path / "images", 4)
    with loop_of(records, folder=folder, settings={"epochs": 4}, **FAMILIES[family]) as loop:
        losses(loop)
        _, shared = next(loop._feeder.feed([records]))
        loop._reward.set_dropout(False)
        with torch.no_grad():
            expected = loop._reward(shared)
        objective = make_objective("bt", has_skip_ca=family != "llava")
        parameters = writer.at_temperature(loop.state()["parameters"], temperature)
        trained = writer.Trained(SAFETY, base, objective, LORA, parameters)
        adapter, backbone = tmp_path / "adapter", loop._reward.backbone
        writer.write_adapter(adapter, trained, backbone, torch.float32)
        network = load_network(
            base.folder,
            {SAFETY: adapter},
            device=CPU,
            dtype=torch.float32,
            family=family,
            skip_ca_keys=base.bundle.skip_ca_keys,
        )
        branch = network.branch(SAFETY)
        with torch.no_grad():
            found = branch(backbone.end_state(branch.model, shared, backbone.project(branch.model, shared)))
    torch.testing.assert_close(found, expected / temperature, atol=1e-4, rtol=1e-4)
    assert float(found.std()) > 0.05  # rewards that differ
    published = GOLDEN / family / variant / "adapter"
    for name in ("pytorch_model.bin", "lora/adapter_model.bin"):
        ours, theirs = (set(read_tensors(root / name)) for root in (adapter, published))
        layers = "layers.0."  # their backbone may have more or fewer of them
        assert {key for key in ours if "layers." not in key or layers in key} == {
            key for key in theirs if "layers." not in key or layers in key
        }
    assert read_lora_config(adapter / "lora" / "adapter_config.json").scale == 2.0


def test_a_learnt_temperature_is_written(tmp_path: Path) -> None:
    with loop_of(pairs(tmp_path / "images", 4), loss="PairWiseLearnableTauLoss", settings={"epochs": 4}) as loop:
        losses(loop)
        parameters = loop.state()["parameters"]
        tau = float(loop._reward.loss.tau().detach())
    objective = make_objective("PairWiseLearnableTauLoss", has_skip_ca=True)
    trained = writer.Trained(SAFETY, read_base("demo"), objective, LORA, parameters)
    backbone = read_backbone("phi3v", DEMO / "backbone")
    writer.write_adapter(tmp_path / "a", trained, backbone, torch.bfloat16)
    assert tau != pytest.approx(0.1002, abs=1e-5)  # softplus(-2.25), where it starts
    assert read_head_config(tmp_path / "a" / "reward_config.yaml").tau == pytest.approx(tau, rel=1e-6)
    stored = read_tensors(tmp_path / "a" / "pytorch_model.bin")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("loss", ["gpm", "cls"])
def test_a_whole_folder_loads_and_knows_its_golden_rewards(loss: str, tmp_path: Path) -> None:
    from tests.train_helpers import labelled

    records = labelled(tmp_path / "images", 2) if loss == "cls" else list(pairs(tmp_path / "images", 4))
    with loop_of(records, loss=loss) as loop:
        losses(loop)
        trained = writer.Trained(
            SAFETY, read_base("demo"), make_objective(loss, has_skip_ca=True), LORA, loop.state()["parameters"]
        )
        writer.write_adapter(tmp_path / "out" / "safety", trained, loop._reward.backbone, torch.float32)
    out = tmp_path / "out"
    values = writer.scorer_values(trained, "mine")
    writer.write_golden(out, values, "cpu")
    assert not (out / "scorer.json").exists()
    writer.write_scorer(out, values)
    scorer = load(out)
    scorer.check_golden()
    assert scorer.identity.is_trained
    assert scorer.perspectives == (SAFETY,)
    head = scorer.heads[SAFETY]
    assert head.training is (HeadTraining.CLS if loss == "cls" else None)
    assert head.is_general_preference is (loss == "gpm")
    assert sorted(path.name for path in out.iterdir()) == ["golden", "golden.json", "safety", "scorer.json"]
    load(out, dtype="bfloat16").check_golden()


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    parameters = {"value_head.weight": torch.tensor([[1.0, float("inf")]])}
    trained = writer.Trained(SAFETY, read_base("demo"), make_objective("bt", has_skip_ca=True), LORA, parameters)
    with pytest.raises(ConfigError, match=r"value_head\.weight holds values that are not finite"):
        writer.write_adapter(tmp_path / "a", trained, read_backbone("phi3v", DEMO / "backbone"), torch.float32)
    assert not (tmp_path / "a").exists()


def test_a_base_is_a_bundle_or_a_backbone_folder(tmp_path: Path) -> None:
    bundle = read_base("demo")
    assert (bundle.family, bundle.options) == ("phi3v", {"num_crops": 4})
    folder = read_base(str(DEMO / "backbone"), num_crops=4, licence="Apache-2.0")
    assert folder.folder == bundle.folder
    assert folder.bundle.num_crops == 4
    qwen = read_base(str(write_bundle(tmp_path / "qwen", "qwen", {"safety": "bt_plain"})))
    assert qwen.options == {"qwen_skipca_keys": "image_tokens"}
    with pytest.raises(ConfigError, match=r"num_crops=4: scorer\.json of demo says it"):
        read_base("demo", num_crops=4)
    with pytest.raises(ConfigError, match="neither a folder nor one of"):
        read_base("nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="model_type='bert'"):
        read_base(str(tmp_path / "other"))


def test_moves_are_root_mean_squares_by_group() -> None:
    initial = {"value_head.weight": torch.zeros(1, 2), "W_q.weight": torch.zeros(2, 2)}
    trained = {"value_head.weight": torch.tensor([[3.0, 4.0]]), "W_q.weight": torch.full((2, 2), 0.5)}
    # sqrt((9 + 16) / 2) = 3.5355; sqrt(4 * 0.25 / 4) = 0.5
    changes = writer.group_changes(trained, initial, "model.projector.")
    assert changes == {"head": (2, pytest.approx(3.5355, abs=1e-4)), "skip_ca": (4, 0.5)}


def test_the_card_tells_data_settings_and_metrics() -> None:
    trained = writer.Trained(SAFETY, read_base("demo"), make_objective("cls", has_skip_ca=True), LORA, {})
    line = {"step": 9, "epoch": 1.5, "loss": 0.25, "accuracy": 0.875, "probability": 0.7}
    text = model_card(
        "mine",
        trained,
        data=DataFacts("s3://bucket/labels.json", "unpaired", 40, "abc123", skipped=2, majority=0.75),
        held_out=None,
        config={"learning_rate": 0.0002},
        history=[line],
        temperature=2.5,
        groups={"lora": (10, 0.5)},
        versions={"torch": "2.13"},
    )
    for part in (
        "abc123",
        "40 unpaired records; 2 left out",
        '"learning_rate": 0.0002',
        "| training | 0.2500 | 0.8750",
    ):
        assert part in text
    assert "| always the commoner label | | 0.7500 | |" in text  # what 0.875 must be compared with
    assert "held out: nothing" in text
    assert "rewards were divided by 2.5, the temperature" in text
    assert "| lora | 10 | 0.5 |" in text
