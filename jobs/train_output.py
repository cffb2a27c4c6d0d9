"""A training run whose checkpoint goes to S3: it lies in its work folder until it is done, and is then uploaded whole.

``scorer.json`` goes last: without it a folder is no checkpoint to any reader, and with it all other files are there.
The state of the run and its progress stay in the work folder, where a killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jobs.train_config import TrainConfig
from jobs.train_data import RUN_FILE
from jobs.train_progress import PROGRESS_FILE
from model import storage
from model.errors import ConfigError
from model.llava_reward.training.writer import SCORER_FILE

STATE_FOLDER = "state"
_STAY = (STATE_FOLDER, PROGRESS_FILE, RUN_FILE)


def is_finished(config: TrainConfig) -> bool:
    """Whether the output holds a whole checkpoint."""
    return _exists(storage.join(config.output, SCORER_FILE))


def claim(config: TrainConfig) -> None:
    """Write the run and its work folder to ``run.json`` in the S3 output, unless this run has done so before.

    So a bucket that cannot be written to is known before any step, and nothing is mixed with another run's files.

    - raises: ``ConfigError`` if the output is another run's or holds another checkpoint, also after a start with
      another work folder; what ``storage`` raises
    """
    uri = storage.join(config.output, RUN_FILE)
    if is_finished(config) and not _exists(uri):
        raise ConfigError(f"{config.output} holds a checkpoint that was not trained there; give another --output")
    run = json.loads((config.folder / RUN_FILE).read_bytes()) | {"work": str(config.folder)}
    try:
        storage.put(uri, json.dumps(run, indent=1).encode() + b"\n", if_absent=True)
    except FileExistsError as error:
        found = json.loads(storage.get(uri))
        if found != run:
            raise ConfigError(
                f"{config.output} belongs to another run, whose work folder is {found.get('work')}; go on with its "
                "settings and --work, or give another --output"
            ) from error


def upload(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Copy the finished checkpoint from the work folder to the S3 output. Raises what ``storage`` does."""
    names = [path.relative_to(config.folder) for path in config.folder.rglob("*") if path.is_file()]
    chosen = [name for name in names if name.parts[0] not in _STAY and not name.parts[0].startswith(".")]
    for name in sorted(chosen, key=lambda name: (name == Path(SCORER_FILE), name)):
        storage.put_file(storage.join(config.output, name.as_posix()), config.folder / name)
    say(f"uploaded {len(chosen)} files to {config.output}; {config.folder} is needed no more")
    backbone = json.loads((config.folder / SCORER_FILE).read_bytes())["backbone"]
    if Path(backbone).is_absolute():
        say(f"its backbone was not uploaded: every machine that loads it needs {backbone}")


def _exists(uri: str) -> bool:
    try:
        storage.head(uri)
    except FileNotFoundError:
        return False
    return True
