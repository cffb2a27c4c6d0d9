"""From what people said and what scorers gave to the parts of an evaluation (``model/evaluation/measures.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.people import Opinion, OpinionKind, People
from jobs.scored import NOT_IN_SCORES, Scored, as_meaning
from model.errors import ConfigError
from model.evaluation.correlation import FILLS, fill_missing
from model.evaluation.labels import ranking_measures, threshold_measures
from model.evaluation.libraries import Floats, Ints
from model.evaluation.measures import Column, Grouped, Part, by_group, correlations
from model.evaluation.pairs import filter_at_k, pair_accuracies, pairs_of, recall_at_k
from model.meaning import HeadTraining, RewardVector, preference

PEOPLE = "people"  # the scorer's name of a human column, where raters are compared with each other
CATEGORY = "category"  # the field that says what an image was rated for
GENERATOR = "generator"  # the field that says what made it
_CLS_THRESHOLD = 0.0  # sigmoid(0) = 0.5

Groups = Mapping[str, Sequence[str | None]]
Values = Sequence[float | None]
Columns = Mapping[Column, Values]
Question = Callable[[Floats, Ints], Grouped]
Parts = dict[str, list[Part]]


@dataclass(frozen=True)
class Asked:
    """What to measure. ``by``: fields to group by; ``threshold``: reward from which an image is called safe.

    - ks: of recall@k and filter@k; fill: of missing ratings and rewards, for correlations only
    """

    by: tuple[str, ...] = ()
    threshold: float | None = None
    ks: tuple[int, ...] = (1, 2, 4)
    fill: str = "none"

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ConfigError(f"--fill {self.fill}: expected one of {', '.join(FILLS)}")


def build_parts(people: People, scored: Sequence[Scored], asked: Asked) -> Parts:
    """Title -> parts that one table shows. Raises ``ConfigError`` for a scorer that cannot answer what people did."""
    if people.kind is OpinionKind.PAIRS:
        return {"Preference pairs": [_pairs(people, scored, asked)]}
    for one in scored:
        one.scalars()  # refuses a general-preference head
    if people.kind is OpinionKind.LABELS:
        return _labels(people, scored, asked)
    return _ratings(people, scored, asked)


def _clusters(opinions: Sequence[Opinion]) -> list[str]:
    return [one.items[0].cluster for one in opinions]


def _kept(groups: Groups, rows: Sequence[int] | Ints) -> Groups:
    return {name: [values[row] for row in rows] for name, values in groups.items()}


def _pairs(people: People, scored: Sequence[Scored], asked: Asked) -> Part:
    columns = {}
    for one in scored:
        both = zip(one.values[::2], one.values[1::2], strict=True)  # items stand as chosen, rejected
        columns[one.column] = [None if c is None or r is None else _margin(one, c, r) for c, r in both]
    groups = people.groups(asked.by)
    return Part("pairs", _clusters(people.opinions), columns, _accuracy(groups), groups)


def _margin(one: Scored, chosen: float | tuple[float, ...], rejected: float | tuple[float, ...]) -> float:
    """Above 0 where the chosen one is preferred, 0 where neither is."""
    if isinstance(chosen, float) and isinstance(rejected, float):
        return chosen - rejected
    assert one.head is not None, "only scorers that ran give vectors"
    first, second = as_meaning(chosen, one.head), as_meaning(rejected, one.head)
    assert isinstance(first, RewardVector)
    assert isinstance(second, RewardVector)
    return preference(first, second).value - 0.5


def _accuracy(groups: Groups) -> Question:
    def question(margins: Floats, kept: Ints) -> Grouped:
        def plain(rows: Ints, units: Ints) -> dict[str, float | None]:
            return pair_accuracies(margins[rows], units)

        return by_group(plain, _kept(groups, kept), len(kept))

    return question


def _labels(people: People, scored: Sequence[Scored], asked: Asked) -> Parts:
    is_safe = np.asarray([one.human["label"] == 1 for one in people.opinions])
    groups, clusters = people.groups(asked.by), _clusters(people.opinions)
    threshold = _CLS_THRESHOLD if asked.threshold is None else asked.threshold

    def separation(rewards: Floats, kept: Ints) -> Grouped:
        return by_group(
            lambda rows, units: ranking_measures(is_safe[kept][rows], rewards[rows]), _kept(groups, kept), len(kept)
        )

    def decisions(rewards: Floats, kept: Ints) -> Grouped:
        return by_group(
            lambda rows, units: threshold_measures(is_safe[kept][rows], rewards[rows], threshold),
            _kept(groups, kept),
            len(kept),
        )

    columns = {one.column: one.scalars() for one in scored}
    deciding = {one.column: one.scalars() for one in scored if asked.threshold is not None or _is_cls(one)}
    parts = {"Labels, without a threshold": [Part("images", clusters, columns, separation, groups)]}
    if deciding:
        title = f"Labels, safe where the reward is at least {threshold:g}"
        parts[title] = [Part("images", clusters, deciding, decisions, groups)]
    return parts


def _is_cls(one: Scored) -> bool:
    return one.head is not None and one.head.training is HeadTraining.CLS


def _ratings(people: People, scored: Sequence[Scored], asked: Asked) -> Parts:
    by = asked.by or tuple(name for name in (GENERATOR, CATEGORY) if people.has(name))
    groups = people.groups(by)
    given: dict[Column, Values] = {}
    parts: Parts = {}
    for rater in people.raters:
        against = rater if len(people.raters) > 1 else ""
        columns = {one.column: one.scalars() for one in scored} | given
        fillable = {one.column: [error != NOT_IN_SCORES for error in one.errors] for one in scored}
        human: Values = [one.human[rater] for one in people.opinions]
        if asked.fill == "mean":
            human = _filled(human, [True] * len(human), people)
            columns = {
                c: _filled(values, fillable.get(c, [True] * len(human)), people) for c, values in columns.items()
            }
        title = f"Correlation with {against or 'people'}"
        parts[title] = [_correlation(people, human, columns, groups, against)]
        if not against:
            parts |= _within_prompts(people, human, columns, asked)
        given[Column(PEOPLE, rater)] = [one.human[rater] for one in people.opinions]
    return parts


def _filled(values: Values, may_fill: Sequence[bool], people: People) -> Values:
    """Within each category, if there are any, every gap gets the mean of the column, as T2I-Eval does it."""
    categories = people.groups([CATEGORY])[CATEGORY] if people.has(CATEGORY) else [None] * len(values)
    filled = list(values)
    for category in dict.fromkeys(categories):
        rows = [i for i, name in enumerate(categories) if name == category and may_fill[i]]
        for row, value in zip(rows, fill_missing([values[row] for row in rows], "mean"), strict=True):
            filled[row] = value
    return filled


def _correlation(people: People, human: Values, columns: Columns, groups: Groups, against: str) -> Part:
    rated = [row for row, value in enumerate(human) if value is not None]
    ratings = np.asarray([human[row] for row in rated], dtype=np.float64)
    own_groups = _kept(groups, rated)

    def question(values: Floats, kept: Ints) -> Grouped:
        return correlations(ratings[kept], values, _kept(own_groups, kept), over=(GENERATOR,))

    clusters = _clusters([people.opinions[row] for row in rated])
    own = {column: [values[row] for row in rated] for column, values in columns.items()}
    return Part("images", clusters, own, question, own_groups, against)


@dataclass(frozen=True)
class _Contest:
    """The rated images of one prompt (and category): places among the opinions, and their ratings."""

    cluster: str
    rows: list[int]
    ratings: Floats


def _within_prompts(people: People, human: Values, columns: Columns, asked: Asked) -> Parts:
    """Pairs, best and worst among the images of a prompt; nothing where no prompt has two images."""
    contests = _contests(people, human)
    pairs = [(c.cluster, c.rows[i], c.rows[j]) for c in contests for i, j in pairs_of(c.ratings)]
    if not pairs:
        return {}
    margins = {
        column: [None if (b := values[i]) is None or (w := values[j]) is None else b - w for _, i, j in pairs]
        for column, values in columns.items()
    }
    parts = {"Pairs of a prompt's images": [Part("pairs", [c for c, _, _ in pairs], margins, _accuracy({}))]}
    hits = {}
    for metric, hit in (("recall", recall_at_k), ("filter", filter_at_k)):
        for k in asked.ks:
            # Whether a prompt asks anything depends on its ratings alone.
            asking = [c for c in contests if hit(c.ratings, c.ratings, k) is not None]
            if asking:
                found = {column: [_hit(hit, c, values, k) for c in asking] for column, values in columns.items()}
                clusters = [c.cluster for c in asking]
                hits[f"{metric}@{k}"] = Part("prompts", clusters, found, _share(f"{metric}@{k}"))
    if hits:
        parts["Best and worst of a prompt's images"] = list(hits.values())
    return parts


def _contests(people: People, human: Values) -> list[_Contest]:
    found: dict[tuple[str, str], list[int]] = {}
    for row, (one, value) in enumerate(zip(people.opinions, human, strict=True)):
        if value is not None:
            found.setdefault((one.items[0].cluster, str(one.fields.get(CATEGORY))), []).append(row)
    return [
        _Contest(cluster, rows, np.asarray([human[row] for row in rows], dtype=np.float64))
        for (cluster, _), rows in found.items()
        if len(rows) > 1
    ]


def _hit(hit: Callable[[Floats, Floats, int], bool | None], contest: _Contest, values: Values, k: int) -> float | None:
    rewards = [value for row in contest.rows if (value := values[row]) is not None]
    if len(rewards) < len(contest.rows):
        return None  # with an image missing, nobody knows who would have come first
    is_hit = hit(contest.ratings, np.asarray(rewards), k)
    return None if is_hit is None else float(is_hit)


def _share(metric: str) -> Question:
    def question(hits: Floats, kept: Ints) -> Grouped:
        return by_group(lambda rows, units: {metric: float(hits[rows].mean())}, {}, len(kept))

    return question
