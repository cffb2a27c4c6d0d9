"""Writes ``golden.json`` of a checkpoint folder: ``python -m model.llava_reward.golden_file OUT``.

Run it on the machine and with the weights that are known to be right: later loads compare with what it wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from model.errors import InfrastructureError
from model.golden import GOLDEN_FILE, ROUNDED_TOLERANCE
from model.llava_reward.bundle import read_bundle
from model.llava_reward.config import write_json
from model.modes import EXACT, FEW_CROPS, ROUNDED_MODES
from model.perspectives import Perspective
from model.scenes import SceneTruth, draw
from model.schema import Generation
from model.scorer import load

# Flawless scenes; one of them without a prompt, and one with a prompt that no scene has.
_SIZES = ((128, 128), (160, 96), (96, 144))
_OTHER_PROMPTS = {1: "", 2: "two green birds, watercolor 🎨"}


def write_golden(out: Path, *, device: str = "cpu") -> None:
    """Score three small drawn scenes with the bundle in ``out`` and keep the rewards beside them.

    Tolerances of rounded arithmetic grow with the largest reward, where that is above 1: so do the differences.
    Raises ``InfrastructureError`` if a picture has no reward.
    """
    (out / GOLDEN_FILE).unlink(missing_ok=True)
    (out / "golden").mkdir(exist_ok=True)
    generations = []
    for i, size in enumerate(_SIZES):
        name, scene = f"golden/{i}.png", draw(i, size=size, truth=SceneTruth())
        scene.image.save(out / name, optimize=True)
        generations.append(Generation(name, _OTHER_PROMPTS.get(i, scene.prompt), (out / name).read_bytes()))
    # The mode is for phi3v alone, and a checkpoint of one crop has none to leave out.
    bundle = read_bundle(out)
    modes = (EXACT, FEW_CROPS) if bundle.family == "phi3v" and bundle.num_crops > 1 else (EXACT,)
    exact, *coarse = (_values(out, generations, mode, device) for mode in modes)
    cases = [
        {"image": g.generation_id, "prompt": g.prompt, "values": own} for g, own in zip(generations, exact, strict=True)
    ]
    for values in coarse:
        cases = [case | {FEW_CROPS: own} for case, own in zip(cases, values, strict=True)]
    scale = max(1.0, *(abs(value) for case in exact for row in case.values() for value in row))
    tolerance = {"float32": 1e-3, "bfloat16": round(5e-2 * scale, 3)}
    tolerance |= {mode: round(ROUNDED_TOLERANCE * scale, 3) for mode in sorted(ROUNDED_MODES)}
    write_json(out / GOLDEN_FILE, {"tolerance": tolerance, "cases": cases})


def _values(
    out: Path, generations: Sequence[Generation], mode: str, device: str
) -> list[dict[Perspective, list[float]]]:
    """Rewards in a mode, per generation and perspective; those of general preference have several values."""
    found = []
    for generation, record in zip(generations, load(out, device=device, mode=mode).score(generations), strict=True):
        if record.error is not None:
            raise InfrastructureError(f"{out}: {generation.generation_id} has no reward: {record.error.message}")
        values = {p: (r,) for p, r in record.rewards.items()} | dict(record.reward_vectors)
        found.append({p: [round(value, 6) for value in row] for p, row in values.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="checkpoint folder, with its scorer.json")
    write_golden(parser.parse_args().out)


if __name__ == "__main__":
    main()
