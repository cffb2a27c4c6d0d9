"""What importing a module may load, each checked in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "model").rglob("*.py")
    if path.name != "__init__.py"
)

# Imports the modules named after the first argument one by one, and stops at the first that loaded something
# of the comma-separated list in the first argument.
_CHECK = """
import importlib, sys
forbidden = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = [package for package in forbidden if package in sys.modules]
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def _check(forbidden: str, *modules: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, forbidden, *modules], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["model.policy", "model.schema", "model.errors", "model.perspectives"])
def test_the_domain_loads_the_standard_library_only(module: str) -> None:
    _check("torch,ray,pydantic,yaml,numpy,PIL,pyarrow,boto3,obstore", module)


def test_the_scorer_interface_loads_no_torch() -> None:
    _check("torch,ray,pydantic,yaml", "model.scorer")


def test_no_model_module_loads_ray_or_a_storage_client() -> None:
    assert "model.policy" in MODEL_MODULES
    _check("ray,obstore,boto3,pyarrow", *MODEL_MODULES)


def test_the_check_itself_can_fail() -> None:
    with pytest.raises(AssertionError, match=r"importing model\.policy_file loads pydantic, yaml"):
        _check("torch,pydantic,yaml", "model.policy", "model.policy_file")


def test_statistics_are_imported_when_called() -> None:
    modules = [name for name in MODEL_MODULES if name.startswith("model.evaluation")]
    assert "model.evaluation.thresholds" in modules
    _check("scipy,sklearn,matplotlib,torch", *modules, "jobs.plots", "jobs.figures")
