"""The same assertions over every scorer, and finding and loading checkpoints."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import ConfigError, ErrorCode, InfrastructureError
from model.fake import FakeScorer
from model.perspectives import Perspective
from model.prepared_bytes import pack_arrays, unpack_arrays
from model.schema import Generation
from model.scorer import SHIPPED, Scorer, load, load_preprocessor, resolve

torch.set_num_threads(2)

SCORERS = ["fake", *sorted(path.name for path in SHIPPED.iterdir())]


def png(width: int, height: int, seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [
    Generation("square", "a red cat", png(40, 40, 0)),
    Generation("wide", "", png(90, 30, 1)),
    Generation("tall", "two dogs under a blue tree, watercolor 🎨", png(30, 90, 2)),
]
BAD = [
    (Generation("empty", "a cat", b""), ErrorCode.IMAGE_EMPTY),
    (Generation("html", "a cat", b"<html>404</html>"), ErrorCode.IMAGE_NOT_AN_IMAGE),
    (Generation("cut", "a cat", png(40, 40, 3)[:200]), ErrorCode.IMAGE_TRUNCATED),
    (Generation("surrogate", "\udcff", png(40, 40, 4)), ErrorCode.BAD_PROMPT),
]


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return FakeScorer() if request.param == "fake" else load(request.param)


def test_score_is_the_three_steps(scorer: Scorer) -> None:
    steps = scorer.postprocess(scorer.forward(scorer.preprocess(GOOD)))
    assert scorer.score(GOOD) == steps


def test_every_good_row_gets_every_perspective(scorer: Scorer) -> None:
    records = scorer.score(GOOD)
    assert [r.generation_id for r in records] == [g.generation_id for g in GOOD]
    vectors = set(scorer.identity.vector_perspectives)
    for record, generation in zip(records, GOOD, strict=True):
        assert record.error is None
        assert set(record.rewards) == set(scorer.perspectives) - vectors
        assert set(record.reward_vectors) == vectors
        assert all(math.isfinite(reward) for reward in record.rewards.values())
        assert all(reward == float(np.float32(reward)) for reward in record.rewards.values())
        assert record.image is not None
        assert record.image.size_bytes == len(generation.image)


def test_a_bad_row_costs_no_other_row(scorer: Scorer) -> None:
    mixed = [GOOD[0], BAD[0][0], GOOD[1], *(g for g, _ in BAD[1:]), GOOD[2]]
    records = scorer.score(mixed)
    assert [r.generation_id for r in records] == [g.generation_id for g in mixed]
    codes = {r.generation_id: r.error.code for r in records if r.error}
    assert codes == {g.generation_id: code for g, code in BAD}
    for record in records:
        assert bool(record.error) != bool(record.rewards or record.reward_vectors)
        assert record.image is not None
        assert record.image.sha256
    alone = {r.generation_id: r for g in GOOD for r in scorer.score([g])}
    for record in records:
        if record.error is None:
            assert record.rewards == pytest.approx(alone[record.generation_id].rewards, abs=1e-5)


def test_all_rows_bad_and_no_rows(scorer: Scorer) -> None:
    assert all(r.error for r in scorer.score(g for g, _ in BAD))
    assert scorer.score([]) == []


def test_chosen_perspectives_only(scorer: Scorer) -> None:
    chosen = scorer.perspectives[:1]
    assert [set(r.rewards) | set(r.reward_vectors) for r in scorer.score(GOOD, chosen)] == [set(chosen)] * len(GOOD)


def test_equal_inputs_equal_rewards_and_unequal_differ(scorer: Scorer) -> None:
    twice = scorer.score([GOOD[0], dataclasses.replace(GOOD[0], generation_id="again")])
    assert twice[0].rewards == pytest.approx(twice[1].rewards, abs=1e-5)
    first, *others = scorer.score([GOOD[0], dataclasses.replace(GOOD[0], prompt="a blue dog"), GOOD[1]])
    assert all(first.rewards != other.rewards for other in others)


def test_prepared_rows_are_compact_and_travel_as_bytes(scorer: Scorer) -> None:
    prepared = scorer.preprocess(GOOD)
    assert all(a.dtype in (np.uint8, np.int32) for item in prepared for a in item.arrays.values())
    moved = [dataclasses.replace(item, arrays=unpack_arrays(pack_arrays(item.arrays))) for item in prepared]
    for before, after in zip(prepared, moved, strict=True):
        assert set(before.arrays) == set(after.arrays)
        assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in before.arrays)
    assert scorer.forward(moved) == scorer.forward(prepared)
    assert scorer.forward(pickle.loads(pickle.dumps(prepared))) == scorer.forward(prepared)


def test_identity_is_complete(scorer: Scorer) -> None:
    identity = scorer.identity
    assert set(identity.checkpoints) == set(scorer.perspectives)
    assert all(checkpoint.startswith(f"{identity.name}@sha256:") for checkpoint in identity.checkpoints.values())
    assert identity.preprocessing_hash == scorer.preprocessing_hash
    assert len(identity.preprocessing_hash) == 64
    assert identity.licence
    scorer.check_golden()


def test_rank_agrees_with_score_whatever_the_order(scorer: Scorer) -> None:
    images, prompt = [g.image for g in GOOD], "a red cat"
    assert set(scorer.heads) == set(scorer.perspectives)
    for perspective in scorer.perspectives:
        assert scorer.heads[perspective].checkpoint == scorer.identity.checkpoints[perspective]
        there, back = scorer.rank(prompt, images, perspective), scorer.rank(prompt, images[::-1], perspective)
        assert [one.index for one in there.ranked] == [len(images) - 1 - one.index for one in back.ranked]
        assert [one.rank for one in there.ranked] == [1, 2, 3]
        if perspective not in scorer.identity.vector_perspectives:
            records = scorer.score([Generation(str(i), prompt, image) for i, image in enumerate(images)], [perspective])
            rewards = [records[one.index].rewards[perspective] for one in there.ranked]
            assert rewards == sorted(rewards, reverse=True)


def test_rank_names_bad_images_and_ranks_the_others(scorer: Scorer) -> None:
    perspective = scorer.perspectives[0]
    ranking = scorer.rank("a cat", [b"", GOOD[0].image, b"<html>", GOOD[1].image], perspective)
    assert sorted(one.index for one in ranking.ranked) == [1, 3]
    assert {one.index: one.error.code for one in ranking.unranked} == {
        0: ErrorCode.IMAGE_EMPTY,
        2: ErrorCode.IMAGE_NOT_AN_IMAGE,
    }
    assert len(ranking.probabilities) == len(ranking.probabilities[0]) == 2
    alone = scorer.rank("a cat", [GOOD[0].image], perspective)
    assert [one.tournament_score for one in alone.ranked] == [None]
    nothing = scorer.rank("a cat", [], perspective)
    assert (nothing.best, nothing.ranked, nothing.unranked) == (None, (), ())


def test_rank_refuses_a_perspective_that_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="safety cannot be ranked by fake, which has alignment"):
        FakeScorer([Perspective.ALIGNMENT]).rank("a cat", [], Perspective.SAFETY)


@pytest.mark.parametrize("name", SCORERS[1:])
def test_preprocessor_alone_makes_the_same_arrays(name: str) -> None:
    alone, whole = load_preprocessor(name), load(name)
    assert alone.preprocessing_hash == whole.preprocessing_hash
    for left, right in zip(alone.preprocess(GOOD), whole.preprocess(GOOD), strict=True):
        assert all(np.array_equal(left.arrays[key], right.arrays[key]) for key in right.arrays)


def test_pack_arrays_keeps_order_of_memory() -> None:
    arrays = {"f": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)), "none": np.zeros((0, 3), np.uint8)}
    back = unpack_arrays(pack_arrays(arrays))
    assert back["f"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["none"].shape == (0, 3)


def test_fake_delay_is_per_batch() -> None:
    slow = FakeScorer([Perspective.SAFETY], batch_delay_s=0.05)
    prepared = slow.preprocess(GOOD)
    start = time.perf_counter()
    slow.forward(prepared)
    assert 0.05 <= time.perf_counter() - start < 1


# --- finding and loading ---


def test_resolve_takes_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("demo") == SHIPPED / "demo"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve("mine") == tmp_path / "mine"
    assert resolve(tmp_path / "mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["nothing", "smz8599/LLaVA-Reward", "", "/no/such/folder"])
def test_unknown_checkpoint_says_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match="demo") as caught:
        load(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"system": "unheard of"}', '{"system": ["llava_reward"]}'])
def test_folder_without_a_usable_scorer_json(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "scorer.json").write_text(content)
    for reader in (load, load_preprocessor):
        with pytest.raises(ConfigError, match=r"scorer\.json"):
            reader(tmp_path)


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match="int4"):
        load("demo", dtype="int4")


# --- golden.json ---


def _golden(folder: Path, edit: object) -> Path:
    copy = shutil.copytree(resolve("demo"), folder / "copy")
    content = json.loads((copy / "golden.json").read_text())
    edit(content)  # type: ignore[operator]
    (copy / "golden.json").write_text(json.dumps(content))
    return copy


def test_golden_notices_a_changed_reward(tmp_path: Path) -> None:
    def edit(content: dict) -> None:
        content["cases"][1]["values"]["fidelity"][0] += 0.01

    folder = _golden(tmp_path, edit)
    with pytest.raises(InfrastructureError, match=r"case golden/1.png, fidelity: expected .*, got .*, tolerance 0.001"):
        load(folder).check_golden()


def test_golden_notices_a_missing_perspective_and_a_bad_image(tmp_path: Path) -> None:
    folder = _golden(tmp_path, lambda content: content["cases"][0]["values"].pop("safety"))
    with pytest.raises(InfrastructureError, match=r"golden/0\.png"):
        load(folder).check_golden()
    (folder / "golden" / "0.png").write_bytes(b"")
    with pytest.raises(InfrastructureError, match="0 bytes"):
        load(folder).check_golden()
    (folder / "golden" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"golden\.json"):
        load(folder).check_golden()


def test_golden_is_optional(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("demo"), tmp_path / "copy")
    (folder / "golden.json").unlink()
    scorer = load(folder)
    scorer.check_golden()
    assert scorer.identity == load("demo").identity
