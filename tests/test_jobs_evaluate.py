"""assay evaluate, from files to the report."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from jobs.evaluate_parts import Asked, build_parts
from jobs.people import OpinionKind, read_people
from jobs.scored import NOT_IN_SCORES, Scored
from model.errors import ConfigError
from model.evaluation.bootstrap import Resampling
from model.evaluation.measures import Column, measure
from model.images import decode_image
from model.meaning import Head
from model.perspectives import Perspective
from model.preferences import read_preferences
from model.scorer import load
from tests.evaluation_files import labelled, ratings, write_lines
from tests.golden_cases import golden_root, read_json
from tests.job_helpers import NIGHT, untrained_copy
from tests.publish_helpers import make_log, publish_night


def evaluate(out, *flags):
    """Exit code, and value by (scorer, metric, by, group) of the report."""
    code = cli.main(["evaluate", "--out", str(out), "--resamples", "20", *map(str, flags)])
    rows = json.loads((out / "report.json").read_text())["measures"] if code == 0 else []
    return code, {(row["scorer"], row["metric"], row["by"], row["group"]): row for row in rows if not row["baseline"]}


def _value(found, metric, by="", group="", scorer="s"):
    return found[scorer, metric, by, group]["value"]


def test_ratings_by_hand(tmp_path):
    data, scores = ratings(tmp_path)
    code, found = evaluate(tmp_path / "out", "--data", data, "--scores", f"s={scores}", "--k", "1")
    assert code == 0
    # Of 12 pairs of images rated differently 10 agree, 1 disagrees, 1 ties in reward (2 and 2): images rated (1, 2).
    # Pairs by (rating, reward): (1,1) (2,2) (3,3) (1,2) (2,1) (3,3).
    # (1,1)-(2,1) ties, (1,2)-(2,2) ties, (1,2)-(2,1) disagrees, (1,1)-(2,2) agrees; the 8 with a 3 agree: 9 - 1 = 8.
    # Ties: 3 in either column of 15 pairs, so tau-b = 8/12.
    assert _value(found, "kendall") == pytest.approx(8 / 12)
    # Means of generators: rewards 1.5, 1.5, 3; ratings 1, 2, 3.
    assert _value(found, "pearson", "generator", "over groups") == pytest.approx(
        np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1]
    )
    assert _value(found, "pearson", "generator", "a") is None  # its rating never varies
    # Within prompts: 3 of 3 and 2 of 3 pairs.
    assert _value(found, "accuracy_with_ties") == pytest.approx(5 / 6)
    assert (_value(found, "recall@1"), _value(found, "filter@1")) == (1.0, 0.5)


def test_labels_with_several_scorers_in_one_table(tmp_path):
    data, scores = labelled(tmp_path)
    flipped = [json.loads(line) for line in Path(scores).read_text().splitlines()]
    worse = write_lines(tmp_path / "worse.jsonl", [row | {"reward_safety": -row["reward_safety"]} for row in flipped])
    out = tmp_path / "out"
    code, found = evaluate(out, "--data", data, "--scores", f"s={scores}", "--scores", f"w={worse}", "--threshold", "1")
    assert code == 0
    assert _value(found, "roc_auc") == pytest.approx(1 - _value(found, "roc_auc", scorer="w"))
    rows = json.loads((out / "report.json").read_text())["measures"]
    difference = next(row for row in rows if row["baseline"] and row["metric"] == "roc_auc")
    assert (difference["scorer"], difference["baseline"]) == ("w", "s safety")
    assert difference["value"] == pytest.approx(_value(found, "roc_auc", scorer="w") - _value(found, "roc_auc"))
    assert difference["low"] <= difference["value"] <= difference["high"] < 0
    assert {"roc.png", "pr-safe.png", "pr-unsafe.png"} <= {path.name for path in out.iterdir()}
    for picture in out.glob("*.png"):
        assert min(decode_image(picture.read_bytes())[0].size) > 200
    assert pq.read_table(out / "report.parquet").drop_columns(["table"]).to_pylist() == [
        {key: value for key, value in row.items() if key != "table"} for row in rows
    ]


def test_a_threshold_is_never_assumed_for_rewards_that_have_none(tmp_path):
    data, scores = labelled(tmp_path)
    _, found = evaluate(tmp_path / "out", "--data", data, "--scores", f"s={scores}")
    assert not any(metric == "f1" for _, metric, _, _ in found)
    assert "give --threshold" in (tmp_path / "out/report.md").read_text()


def test_the_same_run_gives_the_same_bytes(tmp_path):
    data, scores = labelled(tmp_path)
    for name in ("one", "two"):
        evaluate(tmp_path / name, "--data", data, "--scores", f"s={scores}", "--threshold", "1")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second
    evaluate(tmp_path / "three", "--data", data, "--scores", f"s={scores}", "--threshold", "1", "--seed", "1")
    assert (tmp_path / "three/report.json").read_bytes() != first["report.json"]


def test_missing_rewards_are_counted_and_never_imputed(tmp_path):
    rows = [{"prompt": f"p{i}", "image": f"{i}.png"} for i in range(6)]
    data = write_lines(tmp_path / "d.jsonl", [row | {"rating": i} for i, row in enumerate(rows)])
    scores = [row | {"reward": float(i)} for i, row in enumerate(rows)]
    scores[1] |= {"reward": None, "error_code": "image_corrupt"}
    scores[2] |= {"reward": float("nan")}
    scores = write_lines(tmp_path / "s.jsonl", scores[:5])
    code, found = evaluate(tmp_path / "out", "--data", data, "--scores", f"s={scores}")
    one = found["s", "spearman", "", ""]
    assert (code, one["count"], one["missing"], one["value"]) == (0, 3, 3, pytest.approx(1.0))
    facts = json.loads((tmp_path / "out/report.json").read_text())["scorers"][0]
    assert facts["reasons"] == {"image_corrupt": 1, "no_reward": 1, "not_in_scores": 1}
    assert "1 image_corrupt, 1 no_reward, 1 not_in_scores" in (tmp_path / "out/report.md").read_text()


def test_published_reference_scores_give_the_published_correlations(tmp_path):
    case = read_json(golden_root() / "t2i_eval/correlation.json")[0]
    data, results = tmp_path / "scores.json", tmp_path / "results.jsonl"
    data.write_text(json.dumps(case["reference"]))
    write_lines(results, case["results"])
    flags = ("--data", data, "--scores", f"s={results}", "--fill", "mean", "--by", "category", "--resamples", "2")
    assert evaluate(tmp_path / "out", *flags)[0] == 0
    rows = json.loads((tmp_path / "out/report.json").read_text())["measures"]
    found = {(r["scorer"], r["against"], r["metric"], r["group"]): r["value"] for r in rows}
    for metric, categories in case["expected"].items():
        for category, expected in categories.items():
            table = expected["coefficient"]
            own = found["s", "openai_score", metric, category]
            assert own == pytest.approx(table["result_score"]["openai_score"], abs=1e-9)
            for rater in ("manual_score_1", "manual_score_avg"):
                assert found["s", rater, metric, category] == pytest.approx(table[rater]["result_score"], abs=1e-9)


def test_fill_leaves_out_samples_without_a_result(tmp_path):
    rows = [{"id": str(i), "rating": [1, None, 3, 4, 5][i]} for i in range(5)]
    people = read_people(write_lines(tmp_path / "d.jsonl", rows))
    values: list = [1.0, 2.0, None, None, 7.0]
    scored = Scored(Column("s"), values, [None, None, "no_reward", NOT_IN_SCORES, None])
    filled = build_parts(people, [scored], Asked(fill="mean"))["Correlation with people"][0]
    assert filled.columns[Column("s")] == [1.0, 2.0, pytest.approx(10 / 3), None, 7.0]
    one = measure(filled, Resampling(0))[0]
    assert (one.count, one.missing) == (4, 1)
    plain = build_parts(people, [scored], Asked())["Correlation with people"][0]
    assert plain.columns[Column("s")] == [1.0, None, None, 7.0]  # the unrated one is out


def test_the_shipped_checkpoint_scores_pairs(tmp_path):
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{index}.png")
    pairs = [
        {"prompt": "a red ball", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "a red ball", "chosen": "1.png", "rejected": "2.png"},
        {"prompt": "a blue ball", "chosen": "2.png", "rejected": "gone.png"},
    ]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    untrained = untrained_copy(tmp_path / "untrained")
    flags = ("--data", data, "--scorer", f"demo={untrained}", "--perspective", "overall", "--batch-size", "2")
    code, found = evaluate(tmp_path / "out", *flags)
    one = found["demo", "accuracy_with_ties", "", ""]
    assert (code, one["count"], one["missing"]) == (0, 2, 1)
    scorer = load("demo")
    ranks = scorer.rank("a red ball", [(tmp_path / f"{i}.png").read_bytes() for i in range(3)], Perspective.OVERALL)
    rewards = {image.index: image.reward.value for image in ranks.ranked}
    assert one["value"] == ((rewards[0] > rewards[1]) + (rewards[1] > rewards[2])) / 2
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["scorers"][0]["checkpoint"] == scorer.identity.checkpoints[Perspective.OVERALL]
    assert report["scorers"][0]["reasons"] == {"image_not_found": 1}
    assert any("untrained" in note for note in report["notes"])


def _gpm(values):
    head = Head(Perspective.OVERALL, "g@sha256:" + "0" * 64, tau=0.1, is_general_preference=True)
    return Scored(Column("g", "overall"), values, [None] * len(values), head.checkpoint, head)


def test_a_general_preference_head_answers_pairs_only(tmp_path):
    pairs = [{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}] * 2
    people = read_people(write_lines(tmp_path / "pairs.jsonl", pairs))
    # (1, 0) against (0, 1): 1*1 - 0*0 = 1, preferred; (1, 1) against itself: 0, a tie.
    part = build_parts(people, [_gpm([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)])], Asked())["Preference pairs"][0]
    found = {one.metric: one.value for one in measure(part, Resampling(0))}
    assert (found["accuracy_with_ties"], found["accuracy_without_ties"]) == (0.5, 1.0)
    labels = read_people(write_lines(tmp_path / "labels.jsonl", [{"prompt": "x", "image": "0.png", "label": 1}]))
    with pytest.raises(ConfigError, match="general-preference head"):
        build_parts(labels, [_gpm([(1.0, 0.0)])], Asked())


def test_a_published_night_is_read_through_its_manifest(tmp_path):
    output, manifest = publish_night(tmp_path, make_log(tmp_path))
    rows = pa.concat_tables([pq.read_table(output / file.path) for file in manifest.files]).to_pylist()
    people = [{"id": row["generation_id"], "rating": row["source_row"]} for row in rows]
    data = write_lines(tmp_path / "d.jsonl", people)
    flags = ("--data", data, "--night", f"s={output}", "--date", NIGHT, "--perspective", "safety")
    code, found = evaluate(tmp_path / "out", *flags)
    one = found["s", "spearman", "", ""]
    # Rewards rise with the row; row 3 is a dead letter.
    assert (code, one["count"], one["missing"], one["value"]) == (0, 9, 1, pytest.approx(1.0))


@pytest.mark.parametrize("kind", ["json", "jsonl", "gzip", "parquet"])
def test_files_of_every_kind_hold_the_same(tmp_path, kind):
    rows = [{"prompt": "p", "chosen_path": "a", "reject_path": "b", "category": "c"}] * 3
    path = tmp_path / {"json": "d.json", "jsonl": "d.jsonl", "gzip": "d.jsonl.gz", "parquet": "d.parquet"}[kind]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        data = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(data) if kind == "gzip" else data)
    people = read_people(str(path))
    assert (people.kind, len(people.opinions)) == (OpinionKind.PAIRS, 3)
    assert people.groups(["category"]) == {"category": ("c", "c", "c")}


def test_labels_are_mapped_as_for_training(tmp_path):
    """Other keys and words, ids that join scores without images; a record's number is no such id."""
    rows = [
        {"prompt": "p", "picture": f"{i}.png", "said": said, "image_id": f"i{i}", "source": "here"}
        for i, said in enumerate(["fine", "awful", "fine"])
    ]
    fields, labels = {"image": "picture", "label": "said"}, {"fine": 1, "awful": 0}
    data = write_lines(tmp_path / "d.jsonl", rows)
    people = read_people(data, fields, labels)
    assert [one.human["label"] for one in people.opinions] == [1, 0, 1]
    assert [one.items[0].id for one in people.opinions] == ["i0", "i1", "i2"]
    assert (people.opinions[0].items[0].image, people.groups(["source"])["source"][0]) == ("0.png", "here")
    training = read_preferences(data, fields=fields, labels=labels)
    assert (training.sha256, len(training.records)) == (people.sha256, 3)
    scores = write_lines(tmp_path / "s.jsonl", [{"image_id": f"i{i}", "reward": float(i != 1)} for i in range(3)])
    mapped = ("--map", "image=picture", "--map", "label=said", "--label", "fine=1", "--label", "awful=0")
    code, found = evaluate(tmp_path / "out", "--data", data, "--scores", f"s={scores}", *mapped)
    assert (code, _value(found, "roc_auc")) == (0, 1.0)
    nameless = write_lines(tmp_path / "n.jsonl", [{k: v for k, v in row.items() if k != "image_id"} for row in rows])
    assert read_people(nameless, fields, labels).opinions[0].items[0].id is None


def test_a_ranking_asks_for_every_two_of_its_images(tmp_path):
    rows = [{"prompt": "p", "generations": ["a", "b", "c"], "ranking": [2, 1, 2]}]
    people = read_people(write_lines(tmp_path / "d.jsonl", rows))
    pairs = [tuple(item.image for item in one.items) for one in people.opinions]
    assert (people.kind, pairs) == (OpinionKind.PAIRS, [("b", "a"), ("b", "c")])


def test_two_prompts_of_a_pair_are_each_for_its_image(tmp_path):
    rows = [{"prompt": ["a cat", "a dog"], "chosen_path": "a", "reject_path": "a"}]
    items = read_people(write_lines(tmp_path / "d.jsonl", rows)).opinions[0].items
    assert [item.prompt for item in items] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"prompt": "p", "image": "a"}], (), "neither chosen and rejected, nor label, nor rating"),
        ([{"prompt": "p", "image": "a", "label": 2}], (), "record 1: label is 2"),
        ([{"prompt": "p", "image": "a", "label": 1}], ("--by", "generator"), "no record"),
        ([{"prompt": "p", "image": "a", "label": 1}], ("--map", "nothing=x"), "--map nothing"),
        ([{"prompt": "p", "image": "a", "label": 1}], ("--map", "rating=x"), "'rating' is not a field"),
        ([{"prompt": "p", "image": "a", "rating": 1}], ("--map", "label=x"), "--map label: "),
        ([{"prompt": "p", "image": "a", "rating": 1}], ("--map", "image=x"), "--map image=x: no record"),
        ([{"prompt": "p", "image": "a", "label": 1}], ("--k", "0"), "--k 0"),
        ([{"prompt": "p", "image": "a", "label": 1}], ("--night", "x=/nowhere"), "--night needs --date"),
        ([{"prompt": "p", "image": "other", "label": 1}], (), "no reward for any of 1 images (1: not_in_scores)"),
        ([], (), "holds no record"),
    ],
)
def test_refusals_say_what_is_wrong(tmp_path, capsys, rows, flags, message):
    data = write_lines(tmp_path / "d.jsonl", rows)
    scores = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "image": "a", "reward": 1.0}])
    assert evaluate(tmp_path / "out", "--data", data, "--scores", f"s={scores}", *flags)[0] == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_rewards_of_one_image_are_refused(tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "p", "image": "a", "label": 1}])
    row = {"prompt": "p", "image": "a", "reward": 1.0}
    scores = write_lines(tmp_path / "s.jsonl", [row, row | {"reward": 2.0}])
    assert evaluate(tmp_path / "out", "--data", data, "--scores", scores)[0] == 2
    assert "2 different values of reward" in capsys.readouterr().err
    same = write_lines(tmp_path / "s.jsonl", [row, row])
    people = read_people(data)
    assert people.kind is OpinionKind.LABELS
    assert evaluate(tmp_path / "out", "--data", data, "--scores", same)[0] == 0
