"""Makes a log of any folder of images, so that they can be scored like a night of a real service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model import storage
from model.errors import ConfigError

# What model/images.py accepts, by name; other files of the folder are left out.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_UPLOADS_IN_FLIGHT = 8

_SCHEMA = pa.schema(
    [
        ("generation_id", pa.string()),
        ("created_at", pa.timestamp("us", "UTC")),
        ("prompt", pa.string()),
        ("image_uri", pa.string()),
        ("generator", pa.string()),
        ("prompt_line", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Prompts:
    """A JSONL file whose lines name an image and its prompt.

    ``image_fields``: one image each; a preference pair has two of them with one prompt.
    Names are paths below the folder, with or without the folder's own sub-folders in front.
    """

    path: Path
    image_fields: tuple[str, ...] = ("image",)
    prompt_field: str = "prompt"


@dataclass(frozen=True)
class PromptedImage:
    """One image with one prompt. ``name``: below the folder; ``line``: of the prompts, from 1, None without one."""

    name: str
    generation_id: str
    prompt: str
    line: int | None


@dataclass(frozen=True)
class FolderLog:
    """What was written. ``without_prompt``: rows whose prompt is empty because none was given."""

    log_uri: str
    row_count: int
    without_prompt: int


def log_from_folder(
    folder: Path,
    logs_uri: str,
    night: date,
    *,
    images_uri: str | None = None,
    prompts: Prompts | None = None,
    generator: str = "unknown",
) -> FolderLog:
    """Writes ``logs_uri/dt=<night>/folder.parquet`` with one row for each image of ``folder`` and its prompts.

    An image that several lines of the prompts name becomes a row for each different prompt; one that none
    names gets an empty prompt. ``images_uri``: where images are uploaded to; without it the rows refer to the
    local files by absolute path (the job then needs ``--image-root`` at or above ``folder``).
    Raises ``ConfigError``: no such folder, no images in it, or prompts that name an image which is not there.
    """
    found = prompted_images(folder, prompts)
    uris = _place(folder, sorted({one.name for one in found}), images_uri)
    rows = [
        {
            "generation_id": one.generation_id,
            "created_at": datetime(night.year, night.month, night.day, tzinfo=UTC),
            "prompt": one.prompt,
            "image_uri": uris[one.name],
            "generator": generator,
            "prompt_line": one.line,
        }
        for one in found
    ]
    log_uri = storage.join(logs_uri, f"dt={night}", "folder.parquet")
    storage.put(log_uri, _parquet(rows))
    return FolderLog(log_uri, len(rows), sum(not row["prompt"] for row in rows))


def prompted_images(folder: Path, prompts: Prompts | None) -> list[PromptedImage]:
    """Every image of ``folder`` by name, with each of its prompts, or with an empty one.

    Raises ``ConfigError``: no such folder, no images in it, or prompts that name an image which is not there.
    """
    names = _images(folder)
    given = _read_prompts(prompts, set(names)) if prompts is not None else {}
    return [
        PromptedImage(name, name if number == 0 else f"{name}#{number}", prompt, line)
        for name in names
        for number, (prompt, line) in enumerate(given.get(name, [("", None)]))
    ]


def _images(folder: Path) -> list[str]:
    """Paths of the images below ``folder``, with forward slashes, sorted."""
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    if not names:
        raise ConfigError(f"{folder} holds no file ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    for name in names:
        if not _is_utf8(name):
            raise ConfigError(f"the file name {name!r} in {folder} is not UTF-8; rename it")
    return names


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(folder: Path, names: list[str], images_uri: str | None) -> dict[str, str]:
    """Where each image lies, uploaded first if asked."""
    if images_uri is None:
        return {name: str((folder / name).resolve()) for name in names}
    uris = {name: storage.join(images_uri, name) for name in names}
    with ThreadPoolExecutor(_UPLOADS_IN_FLIGHT) as pool:
        # list() so that an upload's error is raised here
        list(pool.map(lambda name: storage.put_file(uris[name], folder / name), names))
    return uris


def _read_prompts(prompts: Prompts, images: set[str]) -> dict[str, list[tuple[str, int]]]:
    """For each image its different prompts, each with the number of the first line that gives it, from 1."""
    given: dict[str, list[tuple[str, int]]] = {}
    for number, line in _json_lines(prompts.path):
        place = f"{prompts.path}, line {number}"
        prompt = _text(line, prompts.prompt_field, place)
        for field in prompts.image_fields:
            name = _known(_text(line, field, place), images, place)
            if all(prompt != other for other, _ in given.setdefault(name, [])):
                given[name].append((prompt, number))
    return given


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"prompts {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        yield number, value


def _text(line: dict[str, Any], field: str, place: str) -> str:
    if field not in line:
        raise ConfigError(f"{place}: no field {field!r}; it has {', '.join(sorted(line)) or 'none'}")
    value = line[field]
    # A null prompt is an image without one, which may be scored for all but its alignment.
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {field} is a {type(value).__name__}, not text")
    if not _is_utf8(value):
        raise ConfigError(f"{place}: {field} holds a lone surrogate, which is no text")
    return value


def _known(name: str, images: set[str], place: str) -> str:
    """The image meant by ``name``, which may start with folders that lie above the images."""
    parts = name.split("/")
    for start in range(len(parts)):
        candidate = "/".join(parts[start:])
        if candidate in images:
            return candidate
    raise ConfigError(f"{place}: names {name!r}, which is not in the folder")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()
