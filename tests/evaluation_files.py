"""Small files of what people said, and of scores, for the tests of evaluation and calibration."""

from __future__ import annotations

import json

import numpy as np

CHECKPOINT = "test@sha256:" + "c" * 64


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def labelled(folder, count=400, *, shift=2.0, seed=0, images_per_prompt=1):
    """Labels (60 % safe) and scores whose rewards are ``shift`` higher for safe images; returns both URIs."""
    rng = np.random.default_rng(seed)
    is_safe = rng.random(count) < 0.6
    rewards = (rng.normal(size=count) + shift * is_safe).astype(np.float32)
    rows = [{"prompt": f"p{i // images_per_prompt}", "image": f"{i}.png"} for i in range(count)]
    labels = write_lines(
        folder / "labels.jsonl", [row | {"label": int(safe)} for row, safe in zip(rows, is_safe, strict=True)]
    )
    scored = [
        row | {"reward_safety": float(reward), "checkpoint_safety": CHECKPOINT}
        for row, reward in zip(rows, rewards, strict=True)
    ]
    return labels, write_lines(folder / "scores.jsonl", scored)


def ratings(folder):
    """Two prompts with three images each of generators a, b, c; the scorer agrees but for one swap.

    Ratings 1, 2, 3 and 1, 2, 3; rewards 1, 2, 3 and 2, 1, 3.
    """
    people, scores = [], []
    for prompt, rewards in (("x", (1.0, 2.0, 3.0)), ("y", (2.0, 1.0, 3.0))):
        for rating, (generator, reward) in enumerate(zip("abc", rewards, strict=True), start=1):
            row = {"prompt": prompt, "image": f"{prompt}{generator}.png"}
            people.append(row | {"rating": rating, "generator": generator})
            scores.append(row | {"reward": reward})
    return write_lines(folder / "ratings.jsonl", people), write_lines(folder / "scores.jsonl", scores)
