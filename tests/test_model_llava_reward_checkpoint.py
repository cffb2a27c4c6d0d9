"""Published file layouts that must load alike, and damaged ones that must be refused by name."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import ConfigError
from model.llava_reward.backbones.rope import rope_tables
from model.llava_reward.checkpoint import load_network, read_tensors
from model.llava_reward.config import RopeConfig, read_clip_config, read_phi3v_config
from model.llava_reward.network import RewardNetwork
from model.perspectives import Perspective
from model.scorer import load, read_identity, resolve

torch.set_num_threads(2)

DEMO = resolve("demo")
P = Perspective.ALIGNMENT
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "bundle")


def read(folder: Path) -> RewardNetwork:
    return load_network(folder / "backbone", {P: folder / P}, device=torch.device("cpu"), dtype=torch.float32)


def rewrite(path: Path, edit: Edit) -> None:
    if path.suffix == ".safetensors":
        save_file(edit(load_file(path)), path)
    else:
        torch.save(edit(torch.load(path, weights_only=True)), path)


def same_weights(a: RewardNetwork, b: RewardNetwork) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def renamed(rename: Callable[[str], str]) -> Edit:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def with_tensor(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: {**tensors, name: tensor}


def without(name: str) -> Edit:
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


EMBED, ALIAS = "model.embed_tokens.weight", "model.vision_embed_tokens.wte.weight"
BACKBONE, HEAD, LORA = "backbone/model.safetensors", "alignment/pytorch_model.bin", "alignment/lora/adapter_model.bin"


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (BACKBONE, lambda t: {**t, ALIAS: t[EMBED].clone()}),
        (BACKBONE, renamed(lambda name: ALIAS if name == EMBED else name)),
        (BACKBONE, with_tensor("lm_head.weight", torch.zeros(3, 4))),
        (
            BACKBONE,
            with_tensor("model.vision_embed_tokens.img_processor.vision_model.post_layernorm.bias", torch.zeros(64)),
        ),
        (
            BACKBONE,
            with_tensor(
                "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.4.mlp.fc1.bias", torch.ones(1)
            ),
        ),
        (BACKBONE, without("model.vision_embed_tokens.img_projection.0.weight")),  # the adapter's own is used
        (HEAD, renamed(lambda name: f"module.{name}")),
        (LORA, renamed(lambda name: f"base_model.model.{name}")),
        (LORA, renamed(lambda name: name.replace(".weight", ".default.weight"))),
    ],
    ids=[
        "alias-too",
        "alias-only",
        "lm-head",
        "post-norm",
        "last-clip-layer",
        "no-projector",
        "module",
        "peft",
        "default",
    ],
)
def test_layouts_that_mean_the_same(bundle: Path, file: str, edit: Edit) -> None:
    expected = read(bundle)
    rewrite(bundle / file, edit)
    assert same_weights(read(bundle), expected)


def test_adapter_as_safetensors(bundle: Path) -> None:
    expected = read(bundle)
    path = bundle / LORA
    save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
    path.unlink()
    assert same_weights(read(bundle), expected)


def test_sharded_backbone(bundle: Path) -> None:
    expected = read(bundle)
    tensors = load_file(bundle / BACKBONE)
    (bundle / BACKBONE).unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, bundle / "backbone" / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (bundle / "backbone" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(read(bundle), expected)


def test_stored_projector_wins_over_the_backbones(bundle: Path) -> None:
    stored = torch.load(bundle / HEAD, weights_only=True)["model.vision_embed_tokens.img_projection.0.bias"]
    branch = read(bundle).branches[str(P)]
    got = branch.state_dict()["model.vision_embed_tokens.img_projection.0.bias"]
    assert torch.equal(got, stored.float())


def test_lora_is_merged_with_its_scale(bundle: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    base, lora = load_file(bundle / BACKBONE), torch.load(bundle / LORA, weights_only=True)
    # alpha 16 over rank 8: scale 2
    expected = base[f"{name}.weight"].float() + 2 * (
        lora[f"{name}.lora_B.weight"].float() @ lora[f"{name}.lora_A.weight"].float()
    )
    assert torch.allclose(read(bundle).branches[str(P)].state_dict()[f"{name}.weight"], expected, atol=1e-6)


def test_unchanged_tensors_exist_once_for_all_perspectives() -> None:
    adapters = {p: DEMO / p for p in Perspective}
    network = load_network(DEMO / "backbone", adapters, device=torch.device("cpu"), dtype=torch.float32)
    embeddings = {b.state_dict()[EMBED].data_ptr() for b in network.branches.values()}
    assert len(embeddings) == 1
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        (BACKBONE, without("model.norm.weight"), "model.norm.weight"),
        (BACKBONE, with_tensor("model.surprise.weight", torch.zeros(1)), "model.surprise.weight"),
        (BACKBONE, with_tensor("model.norm.weight", torch.zeros(7)), r"model.norm.weight \(7,\), expected \(160,\)"),
        (BACKBONE, without("model.vision_embed_tokens.glb_GN"), "glb_GN"),
        (BACKBONE, without("model.layers.3.mlp.down_proj.weight"), "model.layers.3.mlp.down_proj.weight"),
        (HEAD, without("W_k.weight"), "W_k.weight"),
        (HEAD, with_tensor("optimizer.step", torch.zeros(1)), "optimizer.step"),
        (HEAD, with_tensor("value_head.weight", torch.zeros(2, 128)), r"value_head.weight \(2, 128\)"),
        (LORA, without("model.layers.0.self_attn.o_proj.lora_B.weight"), "model.layers.0.self_attn.o_proj.lora_B"),
        (LORA, with_tensor("model.layers.0.mlp.down_proj.lora_A.weight", torch.zeros(4, 256)), "not of rank 8"),
        (LORA, with_tensor("model.layers.0.mlp.down_proj.lora_B.weight", torch.zeros(5, 8)), "down_proj.weight needs"),
        (LORA, with_tensor("model.layers.0.mlp.fc.lora_A.weight", torch.zeros(8, 4)), r"mlp.fc.lora_B"),
        (LORA, with_tensor("vision.q_proj.lora_A.weight", torch.zeros(8, 4)), "vision.q_proj.lora_A.weight"),
    ],
)
def test_wrong_tensors_are_listed(bundle: Path, file: str, edit: Edit, named: str) -> None:
    rewrite(bundle / file, edit)
    with pytest.raises(ConfigError, match=named) as caught:
        read(bundle)
    assert "\n" not in str(caught.value)


class Harmless:
    """Stands for any object that a pickle could build."""


@pytest.mark.parametrize("content", ["object", "text", "list"])
def test_a_pickle_that_is_not_plain_tensors_is_refused(bundle: Path, content: str) -> None:
    if content == "text":
        (bundle / HEAD).write_text("not weights")
    else:
        torch.save({"value_head.weight": Harmless()} if content == "object" else [torch.zeros(1)], bundle / HEAD)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin") as caught:
        read(bundle)
    assert "\n" not in str(caught.value)


def _saved(*, is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    tensors = {"value_head.weight": torch.zeros(2, 3), "W_q.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    torch.save(tensors, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_bin_file_is_one_line_whatever_the_damage(tmp_path: Path, is_zip: bool) -> None:
    whole, path = _saved(is_zip=is_zip), tmp_path / "pytorch_model.bin"
    random = Random(7)
    refused = []
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 2, 5))):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        path.write_bytes(damaged[: random.randrange(len(damaged))] if random.random() < 0.2 else damaged)
        try:
            read_tensors(path)  # damage to numbers alone does not show here
        except ConfigError as error:
            refused.append(error)
    assert len(refused) > 50
    assert {type(error.__cause__) for error in refused} > {UnicodeDecodeError, UnpicklingError}
    assert all(str(error).startswith(f"{path} ") and "\n" not in str(error) for error in refused)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({0: torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="not a flat dict of names and tensors"):
        read_tensors(path)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("has_head_config", [True, False])
def test_a_full_fine_tune_is_refused_by_name(bundle: Path, weights: str, has_head_config: bool) -> None:
    shutil.rmtree(bundle / "safety" / "lora")
    (bundle / "safety" / "pytorch_model.bin").rename(bundle / "safety" / weights)
    if not has_head_config:
        (bundle / "safety" / "reward_config.yaml").unlink()
    for use in (load, read_identity):
        with pytest.raises(ConfigError, match=r"safety has no folder lora/: .* full fine-tune, which is not supported"):
            use(bundle)


def _edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("scorer.json", {"system": "clip"}, "system='clip'"),
        ("scorer.json", {"family": "qwen"}, "family='qwen'"),
        ("scorer.json", {"name": None}, "missing keys .*name"),
        ("scorer.json", {"num_cropz": 4}, "unknown keys .*num_cropz"),
        ("scorer.json", {"num_crops": "4"}, "num_crops='4' .expected int"),
        ("scorer.json", {"num_crops": True}, "num_crops=True .expected int"),
        ("scorer.json", {"num_crops": 0}, "num_crops=0"),
        ("scorer.json", {"backbone": "elsewhere"}, "elsewhere"),
        ("scorer.json", {"adapters": {"beauty": "alignment"}}, "beauty"),
        ("scorer.json", {"adapters": {}}, "expected some of"),
        ("backbone/config.json", {"hidden_size": None}, "hidden_size"),
        ("backbone/config.json", {"max_position_embeddings": 100}, "leaves no room"),
        ("backbone/config.json", {"rope_scaling": {"type": "yarn"}}, "yarn"),
        ("backbone/config.json", {"embd_layer": {"hd_transform_order": "glb_sub"}}, "glb_sub"),
        ("backbone/clip_tower.json", {"image_size": 100}, "image_size=100"),
        ("backbone/clip_tower.json", {"hidden_act": "gelu"}, "gelu"),
        ("alignment/lora/adapter_config.json", {"target_modules": "all-linear"}, "all-linear"),
        ("alignment/lora/adapter_config.json", {"use_dora": True}, "use_dora"),
    ],
)
def test_wrong_settings_name_file_and_value(bundle: Path, file: str, changes: dict[str, object], named: str) -> None:
    _edit_json(bundle / file, **changes)
    with pytest.raises(ConfigError, match=named) as caught:
        load(bundle)
    assert Path(file).name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "scorer.json",
        "backbone/config.json",
        "backbone/tokenizer.json",
        BACKBONE,
        HEAD,
        LORA,
        "alignment/reward_config.yaml",
        "alignment/lora/adapter_config.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_missing_and_damaged_files_are_named(bundle: Path, file: str, damage: str) -> None:
    if damage == "missing":
        (bundle / file).unlink()
    else:
        (bundle / file).write_bytes(b"{\xff\x00: [")
    with pytest.raises(ConfigError) as caught:
        load(bundle)
    assert Path(file).stem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tower_without_sizes_is_vit_l_14_336(tmp_path: Path) -> None:
    clip = read_clip_config(tmp_path / "clip_tower.json")
    assert (clip.hidden_size, clip.num_hidden_layers, clip.image_size, clip.merged_per_side) == (1024, 24, 336, 12)


def test_rope_by_hand() -> None:
    # head_dim 4, theta 100: plain frequencies 1 and 100^(-2/4) = 0.1.
    config = RopeConfig(100.0, 4, 3, (1.0, 2.0), (4.0, 5.0), 1.5)
    cosines, sines = rope_tables(torch.tensor([3, 4]), torch.arange(4)[None], config)
    assert cosines.shape == (2, 1, 4, 4)
    # Sample 0 has length 3, not above 3: short factors. Position 2: angles 2*1/1 = 2 and 2*0.1/2 = 0.1.
    expected = [1.5 * math.cos(2), 1.5 * math.cos(0.1)] * 2
    assert cosines[0, 0, 2].tolist() == pytest.approx(expected)
    # Sample 1 has length 4: long factors. Position 3: angles 3/4 and 3*0.1/5 = 0.06.
    assert sines[1, 0, 3].tolist() == pytest.approx([1.5 * math.sin(0.75), 1.5 * math.sin(0.06)] * 2)


def test_rope_scale_of_the_published_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    shutil.copy(DEMO / "backbone" / "config.json", path)
    _edit_json(path, max_position_embeddings=131072, original_max_position_embeddings=4096)
    # sqrt(1 + ln(131072/4096) / ln(4096)) = 1.1902380714
    assert read_phi3v_config(path).rope.attention_scale == pytest.approx(1.1902380714, abs=1e-10)
