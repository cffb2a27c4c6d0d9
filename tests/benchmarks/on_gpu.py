"""Every measurement that needs a GPU, one after the other: ``python -m tests.benchmarks.on_gpu [--only NAME]``.

Random weights at the published sizes; needs torch and transformers, neither Ray nor storage clients. Under ten minutes
on one large GPU is the aim; a measurement that takes too long is stopped and named, and the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

_FULL = ["--scale", "full", "--device", "cuda"]
_SPEED = ["tests.benchmarks.reward_speed", *_FULL, "--images", "24", "--batch", "6", "--rounds", "3"]
# name -> module and arguments, the most important first
MEASUREMENTS: dict[str, list[str]] = {
    "four perspectives": _SPEED,
    "one perspective": [*_SPEED, "--perspectives", "1"],
    "fp8": [*_SPEED, "--mode", "fp8"],
    "one perspective in fp8": [*_SPEED, "--perspectives", "1", "--mode", "fp8"],
    "int8": [*_SPEED, "--mode", "int8", "--perspectives", "1"],
    "few crops": [*_SPEED, "--mode", "few_crops", "--perspectives", "1"],
    "batch 12": ["tests.benchmarks.reward_speed", *_FULL, "--images", "24", "--batch", "12", "--perspectives", "1"],
    "batch 1": ["tests.benchmarks.reward_speed", *_FULL, "--images", "8", "--batch", "1", "--perspectives", "1"],
    "wide pictures": [*_SPEED, "--size", "768x512", "--perspectives", "1"],
    "merged or low-rank": ["tests.benchmarks.adapter_forms", *_FULL, "--images", "4", "--rounds", "3"],
    "captions": ["tests.benchmarks.reward_captions", *_FULL, "--batch", "6", "--perspectives", "1", "--rounds", "3"],
    "batches": ["tests.benchmarks.batch_invariance", "--device", "cuda", "--networks", "demo,128x32,512x32"],
}
_LIMIT_S = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(MEASUREMENTS), action="append", help="repeatable; all by default")
    only = parser.parse_args().only
    for name, arguments in MEASUREMENTS.items():
        if only and name not in only:
            continue
        print(f"\n== {name}: python -m {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, "-m", *arguments], timeout=_LIMIT_S, check=False)
            ended = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "stopped: too slow"
        print(f"== {name}: {ended} after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
