"""Images per second and core from JPEG bytes to the padded uint8 picture (phi3v, 336-pixel crops, 16 at most).

``python -m tests.benchmarks.preprocessing_speed [--size 1024x1024] [--images 64] [--rounds 5]``

Decoding with its limits and the HD transform, as the preprocessor runs them on one thread; no prompt is encoded.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time

import numpy as np
from PIL import Image

from model.images import decode_image
from model.llava_reward.processor import hd_transform

CROP_SIZE, NUM_CROPS = 336, 16


def make_jpegs(width: int, height: int, count: int) -> list[bytes]:
    """Smooth pictures with fine noise, about as many bytes as photographs of that size; equal in every run."""
    draw, jpegs = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + draw.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return jpegs


def preprocess(jpeg: bytes) -> np.ndarray:
    """``(H, W, 3)`` uint8, as it travels to the device."""
    image, _ = decode_image(jpeg)
    return np.array(hd_transform(image, num_crops=NUM_CROPS, crop_size=CROP_SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    jpegs = make_jpegs(width, height, args.images)
    shape = preprocess(jpegs[0]).shape  # warm-up
    wall, cpu = [], []
    for _ in range(args.rounds):
        before_wall, before_cpu = time.perf_counter(), time.process_time()
        for jpeg in jpegs:
            preprocess(jpeg)
        wall.append(args.images / (time.perf_counter() - before_wall))
        # By processor time: what a core of one's own gives, whoever else uses the machine.
        cpu.append(args.images / (time.process_time() - before_cpu))
    print(f"{args.size} JPEG of {len(jpegs[0]) // 1024} KiB to {shape[1]}x{shape[0]} uint8, one thread")
    print(f"images/s: median {statistics.median(wall):.1f} by the clock, {statistics.median(cpu):.1f} a core used")


if __name__ == "__main__":
    main()
