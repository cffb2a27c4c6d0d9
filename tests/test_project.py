"""Promises about the tree itself."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).exists()]


def test_the_readme_explains_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in _tracked("model", "jobs", "deployments", "infra"):
        if path.name != "__init__.py" and "checkpoints" not in path.parts and path.suffix != ".md":
            assert f"{path.name}`" in readme, f"{path} is not in the README"


def test_no_file_of_jobs_takes_the_name_of_something_that_is_imported():
    # ``python jobs/score_logs.py`` puts jobs/ first on the path: jobs/queue.py would shadow queue.
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in _tracked("jobs") if path.suffix == ".py" and path.name != "__init__.py"}
    assert not names & taken
