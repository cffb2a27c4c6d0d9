"""qwen and llava end to end on tiny random bundles: layouts, refusals, sharing, batches, identity."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import ConfigError
from model.llava_reward.checkpoint import load_network
from model.llava_reward.network import RewardNetwork
from model.llava_reward.scorer import LlavaRewardScorer
from model.perspectives import Perspective
from model.schema import Generation
from model.scorer import RawOutput, load, read_identity
from tests.llava_reward_bundles import ADAPTERS, write_bundle

torch.set_num_threads(2)

ROOT = Path(__file__).parents[1]
P = Perspective.SAFETY
FAMILIES = tuple(ADAPTERS)
BACKBONE, HEAD, LORA = "backbone/model.safetensors", "safety/pytorch_model.bin", "safety/lora/adapter_model.bin"
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaRewardScorer:
    folder = tmp_path_factory.mktemp("families") / request.param
    return LlavaRewardScorer(write_bundle(folder, request.param, ADAPTERS[request.param]))


@pytest.fixture(params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / request.param, request.param, ADAPTERS[request.param])


def family_of(bundle: Path) -> str:
    family: str = json.loads((bundle / "scorer.json").read_text())["family"]
    return family


def jpeg(seed: int, width: int, height: int) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def generations() -> list[Generation]:
    prompts = ("a red use", "", "<|im_end|> </s> <image>", "a red user " * 9)
    sizes = ((64, 64), (200, 90), (90, 200), (300, 40), (33, 31))
    return [Generation(f"g{i}", prompts[i % 4], jpeg(i, *sizes[i % 5])) for i in range(7)]


def values(outputs: list[RawOutput]) -> np.ndarray:
    return np.array([[x for _, row in sorted(output.values.items()) for x in row] for output in outputs])


# --- scoring ---


def test_any_batch_gives_the_reward_of_the_sample_alone(
    scorer: LlavaRewardScorer, generations: list[Generation]
) -> None:
    prepared = scorer.preprocess(generations)
    alone = values([scorer.forward([item])[0] for item in prepared])
    order = np.random.default_rng(2).permutation(len(prepared))
    assert np.abs(values(scorer.forward(prepared)) - alone).max() <= 1e-5
    assert np.abs(values(scorer.forward([prepared[i] for i in order])) - alone[order]).max() <= 1e-5
    assert alone.std(axis=0).min() > 0.01  # rewards that all inputs share would pass the above


def test_records_hold_rewards_and_vectors(scorer: LlavaRewardScorer, generations: list[Generation]) -> None:
    broken = Generation("broken", "a", b"junk")
    *good, bad = scorer.score([*generations[:2], broken])
    for record in good:
        assert record.error is None
        assert len(record.reward_vectors[Perspective.OVERALL]) == 2
        assert set(record.rewards) == set(scorer.perspectives) - {Perspective.OVERALL}
    assert bad.error is not None


def test_the_tower_runs_once_for_all_perspectives(
    scorer: LlavaRewardScorer, generations: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    vision = scorer._network.vision
    handle = vision.register_forward_hook(lambda *_: calls.append(1))
    scorer.forward(scorer.preprocess(generations[:2]))
    handle.remove()
    assert calls == [1]


def test_bfloat16_stays_near_float32(bundle: Path, generations: list[Generation]) -> None:
    fine, coarse = load(bundle), load(bundle, dtype="bfloat16")
    prepared = fine.preprocess(generations)
    assert np.abs(values(coarse.forward(prepared)) - values(fine.forward(prepared))).max() < 0.15


def test_it_has_no_vocabulary_head_and_attends_by_sdpa(scorer: LlavaRewardScorer) -> None:
    network = scorer._network
    assert not [name for name in network.state_dict() if "lm_head" in name]
    model: Any = network.branch(P).model
    assert model.language_model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in network.parameters())


# --- layouts that mean the same ---


def read(bundle: Path, *perspectives: str) -> RewardNetwork:
    adapters = {Perspective(p): bundle / p for p in perspectives or ("safety",)}
    return load_network(
        bundle / "backbone", adapters, device=torch.device("cpu"), dtype=torch.float32, family=family_of(bundle)
    )


def rewrite(path: Path, edit: Edit) -> None:
    if path.suffix == ".safetensors":
        save_file(edit(load_file(path)), path)
    else:
        torch.save(edit(torch.load(path, weights_only=True)), path)


def renamed(rename: Callable[[str], str]) -> Edit:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def as_transformers_5(name: str) -> str:
    """Names as transformers 5 writes them."""
    rules = (
        (r"^visual\.", "model.visual."),
        (r"^model\.layers", "model.language_model.layers"),
        (r"^model\.(embed_tokens|norm)\.", r"model.language_model.\1."),
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(multi_modal_projector|image_newline)", r"model.\1"),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
    )
    for pattern, replacement in rules:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (BACKBONE, renamed(as_transformers_5)),
        (LORA, renamed(as_transformers_5)),
        (HEAD, renamed(as_transformers_5)),
        (HEAD, renamed(lambda name: f"module.{name}")),
        (LORA, renamed(lambda name: f"base_model.model.{name}")),
        (LORA, renamed(lambda name: name.replace(".weight", ".default.weight"))),
        (BACKBONE, lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n}),
        (BACKBONE, lambda tensors: {n: t for n, t in tensors.items() if "merger" not in n and "projector" not in n}),
    ],
    ids=["backbone-5", "lora-5", "head-5", "module", "peft", "default", "no-lm-head", "no-projector"],
)
def test_layouts_that_mean_the_same(bundle: Path, file: str, edit: Edit) -> None:
    expected = read(bundle).state_dict()
    rewrite(bundle / file, edit)
    got = read(bundle).state_dict()
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_adapter_as_safetensors(bundle: Path) -> None:
    expected = read(bundle).state_dict()
    path = bundle / LORA
    save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"))
    path.unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(bundle).state_dict().items())


def test_unchanged_tensors_exist_once_for_all_perspectives(bundle: Path) -> None:
    for perspective in ("safety", "overall"):  # adapters that change q_proj alone
        config = bundle / perspective / "lora" / "adapter_config.json"
        text = json.loads(config.read_text())
        config.write_text(json.dumps({**text, "target_modules": ["q_proj"]}))
        keep: Edit = lambda tensors: {n: t for n, t in tensors.items() if ".q_proj." in n}  # noqa: E731
        rewrite(bundle / perspective / "lora" / "adapter_model.bin", keep)
    network = read(bundle, "safety", "overall")
    safety, overall = (network.branch(Perspective(p)).state_dict() for p in ("safety", "overall"))
    apart = {n for n in safety if n in overall and safety[n].data_ptr() != overall[n].data_ptr()}
    own = re.compile(r"value_head|W_|ca_layernorm|.*\.merger\.|.*multi_modal_projector|.*\.q_proj\.weight")
    assert apart
    assert [n for n in apart if not own.match(n)] == []


# --- refusals ---


def with_tensor(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: {**tensors, name: tensor}


def without(name: str) -> Edit:
    return lambda tensors: {k: t for k, t in tensors.items() if k != name}


LM = {"qwen": "model.", "llava": "language_model.model."}
TOWER = {"qwen": "visual.blocks.0.norm1.weight", "llava": "vision_tower.vision_model.pre_layrnorm.weight"}
PROJECTOR = {"qwen": "visual.merger.mlp.0.bias", "llava": "multi_modal_projector.linear_1.bias"}


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        (BACKBONE, lambda f: without(LM[f] + "norm.weight"), r"missing tensors \['model.language_model.norm.weight'"),
        (BACKBONE, lambda f: without(TOWER[f]), r"image tower\): missing tensors"),
        (BACKBONE, lambda f: with_tensor("surprise", torch.zeros(1)), r"surplus \['surprise'\]"),
        (BACKBONE, lambda f: with_tensor(LM[f] + "norm.weight", torch.zeros(7)), r"norm.weight \(7,\), expected \(64,"),
        (BACKBONE, lambda f: with_tensor(as_transformers_5(TOWER[f]), torch.zeros(32)), "second, different"),
        (HEAD, lambda f: with_tensor(PROJECTOR[f], torch.zeros(3)), r"bias \(3,\), expected"),
        (HEAD, lambda f: without("value_head.weight"), "missing tensors .'value_head.weight'"),
        (HEAD, lambda f: with_tensor("optimizer.step", torch.zeros(1)), "optimizer.step"),
        (LORA, lambda f: without(LM[f] + "layers.0.mlp.up_proj.lora_B.weight"), "layers.0.mlp.up_proj.lora_B"),
        (LORA, lambda f: with_tensor("visual.blocks.0.attn.qkv.lora_A.weight", torch.zeros(8, 4)), "visual.blocks"),
    ],
)
def test_wrong_tensors_are_listed(bundle: Path, file: str, edit: Callable[[str], Edit], named: str) -> None:
    rewrite(bundle / file, edit(family_of(bundle)))
    with pytest.raises(ConfigError, match=named) as caught:
        read(bundle)
    assert "\n" not in str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("family", "file", "changes", "named"),
    [
        ("qwen", "scorer.json", {"qwen_skipca_keys": "pixels"}, "qwen_skipca_keys='pixels'"),
        ("qwen", "scorer.json", {"num_crops": 4}, "family='qwen': .*unknown keys .'num_crops'"),
        ("llava", "scorer.json", {"qwen_skipca_keys": "released"}, "family='llava': .*unknown keys"),
        ("llava", "scorer.json", {"family": "qwen"}, "model_type='llava_next'"),
        ("qwen", "scorer.json", {"family": "llama"}, "family='llama'"),
        ("qwen", "backbone/config.json", {"vision_config": None}, "malformed"),
        ("qwen", "backbone/config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("qwen", "backbone/config.json", {"max_position_embeddings": 900}, "leaves no room"),
        ("llava", "backbone/config.json", {"vision_feature_layer": -1}, "vision_feature_layer=-1"),
        ("llava", "backbone/config.json", {"image_grid_pinpoints": [[56, 100]]}, "multiples of the tile side 56"),
        ("llava", "backbone/config.json", {"text_config": {"hidden_size": "wide"}}, r"config\.json: .*hidden_size"),
    ],
)
def test_wrong_settings_name_the_value(
    tmp_path: Path, family: str, file: str, changes: dict[str, object], named: str
) -> None:
    folder = write_bundle(tmp_path / family, family, {"safety": "bt_plain"})
    edit_json(folder / file, **changes)
    with pytest.raises(ConfigError, match=named):
        load(folder)


def test_llava_with_skip_ca_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "llava", "llava", {"safety": "bt_plain"})
    path = folder / "safety" / "reward_config.yaml"
    path.write_text(path.read_text().replace("add_cross_attention: false", "add_cross_attention: true"))
    for reader in (load, read_identity):
        with pytest.raises(ConfigError, match="LLaVA has no SkipCA") as caught:
            reader(folder)
        assert "safety" in str(caught.value)


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_transformers_the_remedy_is_named(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "qwen", "qwen", {"safety": "bt_plain"})
    code = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name=name)

sys.meta_path.insert(0, NotInstalled())
from model.errors import ConfigError
from model.scorer import load
try:
    load(sys.argv[1])
except ConfigError as error:
    print(error)
"""
    assert "pip install -e '.[transformers]'" in run_python(code, str(folder))


def test_phi3v_loads_no_transformers() -> None:
    run_python("import sys; from model.scorer import load; load('demo'); assert 'transformers' not in sys.modules")


# --- what SkipCA of qwen attends to ---


def test_qwen_skip_ca_keys_are_part_of_the_identity(tmp_path: Path, generations: list[Generation]) -> None:
    adapters = ADAPTERS["qwen"]
    plain = write_bundle(tmp_path / "plain", "qwen", adapters)
    same = write_bundle(tmp_path / "same", "qwen", adapters, qwen_skipca_keys="released")
    other = write_bundle(tmp_path / "other", "qwen", adapters, qwen_skipca_keys="image_tokens")
    before, after = read_identity(plain).checkpoints, read_identity(other).checkpoints
    assert read_identity(same).checkpoints == before
    # Only what depends on it: the alignment adapter has no SkipCA.
    assert {p for p in before if before[p] != after[p]} == {Perspective.SAFETY, Perspective.OVERALL}
    released, corrected = load(plain).score(generations[:1])[0], load(other).score(generations[:1])[0]
    assert released.rewards[Perspective.ALIGNMENT] == corrected.rewards[Perspective.ALIGNMENT]
    assert abs(released.rewards[Perspective.SAFETY] - corrected.rewards[Perspective.SAFETY]) > 1e-3
