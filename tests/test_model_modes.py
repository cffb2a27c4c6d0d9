"""Names of modes: which exist, what they go with, and what few_crops does to a picture."""

from __future__ import annotations

import pytest

from model.errors import ConfigError
from model.identity import first_difference, reward_facts
from model.llava_reward.config import read_clip_config
from model.llava_reward.processor import hd_layout, num_image_tokens
from model.modes import EXACT, MODES, check_mode, crops_of
from model.schema import Generation
from model.scorer import load, load_preprocessor, read_identity, resolve
from tests.test_model_llava_reward_processor import png


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_with_bfloat16(mode: str) -> None:
    assert check_mode(mode, "bfloat16") == mode


@pytest.mark.parametrize(
    ("mode", "message"),
    [("int4", "mode='int4' is unknown, expected one of"), ("", "unknown"), ("fp8", "computes in bfloat16")],
)
def test_an_unknown_or_unfit_mode_is_one_line_everywhere(mode: str, message: str) -> None:
    for use in (lambda: check_mode(mode, "float32"), lambda: load("demo", mode=mode)):
        with pytest.raises(ConfigError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_fp8_on_a_cpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more, not device='cpu'; use mode=int8"):
        load("demo", mode="fp8", dtype="bfloat16")


@pytest.mark.parametrize(("crops", "fewer"), [(16, 4), (4, 1), (2, 1), (9, 2)])
def test_few_crops_are_a_quarter(crops: int, fewer: int) -> None:
    assert crops_of("few_crops", "phi3v", crops) == fewer
    assert {crops_of(mode, "phi3v", crops) for mode in MODES if mode != "few_crops"} == {crops}


@pytest.mark.parametrize(("family", "crops", "message"), [("qwen", 1, "phi3v alone"), ("phi3v", 1, "num_crops=1")])
def test_few_crops_are_refused_where_there_is_nothing_to_leave_out(family: str, crops: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        crops_of("few_crops", family, crops)


def test_tokens_of_a_square_at_full_size() -> None:
    """16 crops: (16 + 1) * 144 + 1 + (4 + 1) * 12 = 2509 tokens; 4 crops: (4 + 1) * 144 + 1 + (2 + 1) * 12 = 757."""
    clip = read_clip_config(resolve("demo") / "absent")
    for mode, tokens in (("exact", 2509), ("few_crops", 757)):
        layout = hd_layout(1024, 1024, num_crops=crops_of(mode, "phi3v", 16), crop_size=clip.image_size)
        assert num_image_tokens(*layout.padded, clip) == tokens


def test_few_crops_change_the_preprocessing_and_its_hash_but_not_the_weights() -> None:
    exact, few = read_identity("demo"), read_identity("demo", mode="few_crops")
    assert exact.checkpoints == few.checkpoints
    assert (
        exact.preprocessing_hash
        != few.preprocessing_hash
        == load_preprocessor("demo", mode="few_crops").preprocessing_hash
    )
    sizes = []
    for mode in ("exact", "few_crops"):
        [prepared] = load_preprocessor("demo", mode=mode).preprocess([Generation("g", "x", png(300, 300))])
        sizes.append((prepared.arrays["pixels"].shape, int((prepared.arrays["input_ids"] < 0).sum())))
    # Crops of 112 pixels, 4 tokens a side: 2 x 2 crops give 5 * 16 + 1 + 3 * 4 = 93, one gives 2 * 16 + 1 + 2 * 4 = 41.
    assert sizes == [((224, 224, 3), 93), ((112, 112, 3), 41)]


def test_a_mode_is_part_of_the_identity() -> None:
    facts = [reward_facts(read_identity("demo", mode=mode), "1") for mode in ("exact", "int8")]
    assert first_difference(*facts) == "mode: here exact, there int8"
    assert read_identity("demo").mode == EXACT
    assert load("demo", mode="int8").identity == read_identity("demo", mode="int8")
