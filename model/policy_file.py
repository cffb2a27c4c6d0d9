"""Reads a policy file (YAML) into ``model.policy.Policy``. The only module of ``model/`` that knows YAML.

Every fault is a ``ConfigError`` of one line that names the file and the place in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import ConfigError
from model.perspectives import Perspective
from model.policy import Level, Policy, Rule, Severity, Verdict

# A policy of four perspectives is about 1 KiB; anything near the limit is some other file.
MAX_POLICY_BYTES = 64 * 1024
_MAX_DEPTH = 16


class _LevelModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    below: Annotated[float, Field(allow_inf_nan=False)]
    verdict: Verdict
    severity: Severity


class _RuleModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    levels: list[_LevelModel]


class _PolicyModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    description: str = ""
    rules: dict[Perspective, _RuleModel]


class _Loader(yaml.BaseLoader):
    """Builds only dicts, lists and strings; pydantic gives the types.

    YAML 1.1's own guesses would turn ``1e-3`` into text, ``1:30`` into 90 and ``no`` into False. Duplicate keys,
    tags, aliases (a few lines of them can stand for gigabytes) and deep nesting are refused.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="tags, anchors and aliases are not used here", problem_mark=event.start_mark
            )
        if self._depth >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {_MAX_DEPTH}", problem_mark=event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key_node.value!r}", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_policy(path: str | Path) -> Policy:
    """The policy in a local YAML file of at most ``MAX_POLICY_BYTES``.

    Raises: ``ConfigError`` when the file cannot be read, is not YAML, or is not a consistent policy.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"policy file {path}: {error.strerror}") from error
    if len(data) > MAX_POLICY_BYTES:
        raise ConfigError(f"policy file {path}: larger than {MAX_POLICY_BYTES} bytes; is it a policy?")
    return parse_policy(data, str(path))


def parse_policy(data: bytes, name: str) -> Policy:
    """The policy in ``data`` (YAML). ``name`` stands for it in messages. Raises ``ConfigError``."""
    try:
        model = _PolicyModel.model_validate(_load_yaml(data))
        return _to_policy(model)
    except yaml.YAMLError as error:
        raise ConfigError(f"policy file {name}: not valid YAML: {_yaml_problem(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"policy file {name}: {_first_problem(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"policy file {name}: {error}") from error


def _load_yaml(data: bytes) -> object:
    loader = _Loader(data)
    try:
        content = loader.get_single_data()
    except (ValueError, OverflowError) as error:  # PyYAML lets these out for an escape such as "\\Uffffffff"
        raise ConfigError(f"not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if content is None:
        raise ConfigError("is empty")
    return content


def _to_policy(model: _PolicyModel) -> Policy:
    rules = {}
    for perspective, rule in model.rules.items():
        try:
            levels = tuple(Level(level.below, level.verdict, level.severity) for level in rule.levels)
            rules[perspective] = Rule(rule.checkpoint, levels)
        except ConfigError as error:
            raise ConfigError(f"rules.{perspective}: {error}") from error
    return Policy(model.id, model.description, rules)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    place = " ".join(".".join(str(part) for part in first["loc"]).split()) or "top level"
    if first["type"] == "extra_forbidden":
        message = f"{place}: unknown key"
    elif first["type"] == "missing":
        message = f"{place}: missing"
    else:
        message = f"{place}: {first['msg']}, not {str(first['input'])[:60]!r}"
    return message if len(problems) == 1 else f"{message} (and {len(problems) - 1} more)"
