"""The arguments of the application, and that infra/serve.yaml has no key that Ray would ignore."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from deployments.config import ServeArgs, parse_args
from deployments.paths import find_checkpoint, in_project
from model.errors import ConfigError
from model.policy_file import load_policy
from model.scorer import resolve

SERVE_YAML = Path(__file__).parent.parent / "infra" / "serve.yaml"
MINIMAL: dict[str, object] = {"checkpoint": "demo", "policy": "infra/policies/default.yaml"}


def unknown_keys(data: Any, annotation: Any, place: str = "") -> list[str]:
    """Keys of ``data`` that no field of the pydantic models behind ``annotation`` has."""
    if get_origin(annotation) in (Union, types.UnionType):
        models = [one for one in get_args(annotation) if one is not type(None)]
        return min((unknown_keys(data, one, place) for one in models), key=len)
    if get_origin(annotation) is list and isinstance(data, list):
        [inner] = get_args(annotation)
        return [key for index, one in enumerate(data) for key in unknown_keys(one, inner, f"{place}[{index}]")]
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(data, dict)):
        return []
    found = []
    for key, value in data.items():
        where = f"{place}.{key}".lstrip(".")
        field = annotation.model_fields.get(key)
        found += [where] if field is None else unknown_keys(value, field.annotation, where)
    return found


def serve_yaml() -> dict[str, Any]:
    return dict(yaml.safe_load(SERVE_YAML.read_text()))


def test_serve_yaml_has_no_key_that_ray_ignores() -> None:
    assert unknown_keys(serve_yaml(), ServeDeploySchema) == []
    ServeDeploySchema.model_validate(serve_yaml())


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "proxy_locations"),
        (("http_options",), "hots"),
        (("logging_config",), "log_levle"),
        (("applications", 0), "import_pth"),
    ],
)
def test_the_check_of_keys_finds_a_misspelt_one(path: tuple[Any, ...], key: str) -> None:
    config = serve_yaml()
    place: Any = config
    for part in path:
        place = place[part]
    place[key] = 1
    [found] = unknown_keys(config, ServeDeploySchema)
    assert found.endswith(key)


def test_serve_yaml_is_what_the_code_expects() -> None:
    config = serve_yaml()
    [application] = config["applications"]
    assert (application["name"], application["route_prefix"]) == ("assay", "/")
    assert application["import_path"] == "deployments.app:build"
    assert config["http_options"]["host"] == "127.0.0.1"
    args = parse_args(application["args"])
    assert resolve(find_checkpoint(args.checkpoint)).is_dir()
    load_policy(in_project(args.policy))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"chekpoint": "demo"}, "chekpoint"),
        ({"replica": {"num_gpu": 1}}, "replica.num_gpu"),
        ({"batching": {"max_batch": 1}}, "batching.max_batch"),
        ({"ingress": {"max_item": 1}}, "ingress.max_item"),
        ({"replica": {"min_replicas": 0}}, "replica.min_replicas"),
        ({"replica": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas=3 is above max_replicas=2"),
        ({"batching": {"max_queued_items": 8}}, "a full request could never be accepted"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"adapters": "both"}, "adapters"),
        ({"mode": "int4"}, "mode='int4' is unknown"),
        ({"mode": "fp8"}, "set dtype=bfloat16"),
        ({"checkpoint": None}, "checkpoint"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_that_names_it(change: dict[str, object], place: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_args({**MINIMAL, **change})
    assert place in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_checkpoint_is_named() -> None:
    with pytest.raises(ConfigError, match="checkpoint"):
        parse_args({"policy": "p.yaml"})


def test_arguments_survive_the_way_to_the_replica() -> None:
    args = parse_args({**MINIMAL, "replica": {"num_gpus": 0.5, "resources": {"tpu": 1}}})
    assert ServeArgs.model_validate(args.model_dump()) == args


def test_build_passes_the_arguments_on_to_serve() -> None:
    from deployments.app import build

    replica = {
        "num_gpus": 1,
        "min_replicas": 2,
        "max_replicas": 5,
        "max_ongoing_requests": 77,
        "health_check_period_s": 3,
    }
    application = build({**MINIMAL, "replica": replica, "ingress": {"num_replicas": 2}})
    ingress = application._bound_deployment
    assert (ingress.name, ingress.num_replicas) == ("Ingress", 2)
    bound = ingress.init_args[1]._bound_deployment
    assert bound.name == "Replica"
    assert bound.ray_actor_options["num_gpus"] == 1
    assert bound.max_ongoing_requests == 77
    config = bound._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (2, 5)
    assert config.health_check_period_s == 3


def test_build_refuses_an_unknown_key() -> None:
    from deployments.app import build

    with pytest.raises(ConfigError, match="modle"):
        build({**MINIMAL, "modle": "x"})
