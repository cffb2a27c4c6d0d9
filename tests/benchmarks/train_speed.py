"""Training throughput: our loop against a bare PyTorch loop over the same network and batches, interleaved in one run.

``python -m tests.benchmarks.train_speed [--steps 4] [--rounds 5] [--pairs 32] [--micro 4] [--accumulate 2]``

The bare loop has its samples ready in memory and does only what cannot be left out: tower, forward, loss, backward,
clipping, step. Ours also checks every loss, and counts. It runs three ways: on the same ready samples; as it is by
default, with the tower's outputs kept after the first epoch; and keeping nothing, so that every picture (512x512 PNG)
is read and prepared again in a thread, which needs a second core. Shipped backbone, float32, BT loss, no Ray.

``python -m tests.benchmarks.train_speed --scale full --device cuda`` instead runs our loop alone over the full-size
phi3v backbone with random weights (no files, 1024x1024 pictures, rank 128, bfloat16): tokens/s and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model.llava_reward.backbones.phi3v import Phi3VBackbone, Phi3VSample
from model.llava_reward.bundle import read_bundle
from model.llava_reward.network import RewardBranch
from model.llava_reward.processor import LlavaRewardPreprocessor
from model.llava_reward.training.batches import Stream, cut
from model.llava_reward.training.inputs import Feeder, Record, Tower, prepare, sides_of
from model.llava_reward.training.loop import Loop, LoopSettings
from model.llava_reward.training.lora import LoraSpec
from model.llava_reward.training.objective import make_objective
from model.llava_reward.training.parallel import Workers
from model.llava_reward.training.trainable import TrainableReward, make_trainable
from model.preferences import PreferencePair
from model.scenes import draw
from tests.benchmarks.reward_models import SCALES, Built, Draws, make_sample
from tests.benchmarks.reward_options import picture_size, where
from tests.train_helpers import DEMO, trainable

TAU, MAX_NORM = 0.1, 1.0
FLOOR = 0.9


class BareLoop:
    """What anybody would write first; ``samples``: chosen and rejected of each micro-batch, ready on the device."""

    def __init__(self, reward: TrainableReward, vision: nn.Module, samples: dict[int, tuple[Any, Any]]) -> None:
        self._reward, self._vision, self._samples = reward, vision, samples
        self._parameters = [parameter for _, _, parameter in reward.trained()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def run(self, steps: Sequence[Sequence[Sequence[int]]]) -> None:
        """``steps``: per step its micro-batches of record indices."""
        for step in steps:
            for micro in step:
                sides = [self._samples[i][0] for i in micro] + [self._samples[i][1] for i in micro]
                with torch.no_grad():
                    shared = self._reward.backbone.share(self._vision, sides)
                chosen, rejected = self._reward(shared).chunk(2)
                loss = -F.logsigmoid((chosen - rejected) / TAU).mean() / len(step)
                loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad()


def write_pictures(folder: Path, count: int) -> list[PreferencePair]:
    """Pairs of drawn scenes of 512x512 pixels."""
    paths = []
    for number in range(2 * count):
        paths.append(folder / f"{number}.png")
        draw(number).image.save(paths[-1])
    return [
        PreferencePair(f"pair-{i}", "a scene", "a scene", str(paths[2 * i]), str(paths[2 * i + 1]), None, None, {})
        for i in range(count)
    ]


def compare(args: argparse.Namespace) -> None:
    """The three ways side by side on this machine's CPU."""
    device, bundle = torch.device("cpu"), read_bundle(DEMO)
    preprocessor = LlavaRewardPreprocessor(bundle)
    size = args.micro * args.accumulate
    settings = LoopSettings(epochs=1e6, batch_size=size, micro_batch=args.micro)
    with tempfile.TemporaryDirectory() as folder:
        records = write_pictures(Path(folder), args.pairs)
        reward, vision = trainable()
        ready = {side.key: reward.backbone.sample(prepare(side, preprocessor), device) for side in sides_of(records)}
        loops = {}
        for name, cache_bytes in (("same samples", 0), ("default", 1 << 30), ("keeping nothing", 0)):
            own, tower = trainable()
            feeder: Any = Feeder(Tower(own.backbone, tower, device, cache_bytes), preprocessor, threads=1)
            if name == "same samples":
                feeder = ReadyFeeder(Tower(own.backbone, tower, device, 0), ready)
            loops[name] = Loop(own, make_objective("bt", has_skip_ca=True), feeder, records, settings, Workers())
        samples = {i: tuple(ready[side.key] for side in sides_of([record])) for i, record in enumerate(records)}
        bare, stream = BareLoop(reward, vision, samples), Stream(len(records), size, settings.seed)
        place = [0]

        def run_bare() -> None:
            bare.run([cut(stream.step(number), args.micro) for number in range(place[0], place[0] + args.steps)])
            place[0] += args.steps

        def run_ours(loop: Loop) -> Callable[[], None]:
            return lambda: loop.run(lambda line: None, loop.step + args.steps)

        ways = {"bare": run_bare, **{name: run_ours(loop) for name, loop in loops.items()}}
        report(ways, args, 2 * size * args.steps)


def report(ways: dict[str, Callable[[], None]], args: argparse.Namespace, images: int) -> None:
    """Interleaved rounds, after one of warm-up; every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, args.rounds):
        order = list(ways.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {images} images a round")
    for name, found in seconds.items():
        ratios = [bare / own for bare, own in zip(seconds["bare"], found, strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        rate = images / statistics.median(found)
        print(f"{name}: {rate:.1f} images/s, {statistics.median(ratios):.2f} of bare ({listed})")
    print(f"floor {FLOOR}, for the same samples")


class ReadyFeeder:
    """Feeds the loop with samples that are on the device already."""

    def __init__(self, tower: Tower, ready: dict[tuple[str, str], Any]) -> None:
        self._tower, self._ready = tower, ready

    def feed(self, batches: Iterable[Sequence[Record]]) -> Iterator[tuple[Sequence[Record], Any]]:
        for records in batches:
            sides = sides_of(records)
            yield records, self._tower.share(sides, [self._ready[side.key] for side in sides])


class RandomFeeder:
    """Feeds the loop with noise pictures that are on the device; the tower runs on them as on real ones."""

    def __init__(self, backbone: Phi3VBackbone, vision: nn.Module, samples: Sequence[Phi3VSample]) -> None:
        self._backbone, self._vision, self._samples = backbone, vision, samples

    def feed(self, batches: Iterable[Sequence[Record]]) -> Iterator[tuple[Sequence[Record], Any]]:
        for records in batches:
            with torch.no_grad():
                shared = self._backbone.share(self._vision, self._samples[: 2 * len(records)])
            yield records, shared


def full_size(args: argparse.Namespace) -> None:
    """Our loop over random weights; prints seconds a step, tokens/s and peak memory."""
    device, scale = torch.device(args.device), SCALES[args.scale]
    backbone, draws = Phi3VBackbone(scale.config, scale.clip), Draws(torch.device(args.device), scale.dtype, 0)
    objective = make_objective("bt", has_skip_ca=True)
    with torch.device("meta"):
        vision, branch = backbone.build_vision(), RewardBranch(backbone, objective.head)
    draws.fill(vision, {})
    draws.fill(branch, {})
    reward = make_trainable(
        backbone,
        branch,
        objective.build(),
        lora=LoraSpec(scale.lora_rank, 2.0 * scale.lora_rank, 0.05),
        dtype=scale.dtype,
        seed=0,
        has_checkpointing=not args.keep_activations,
    )
    built = Built(scale, None, {})  # type: ignore[arg-type]
    samples = [make_sample(built, *args.size, device, seed) for seed in range(2 * args.micro)]
    size = args.micro * args.accumulate
    records = [PreferencePair(str(i), "", "", "", "", None, None, {}) for i in range(size)]
    settings = LoopSettings(epochs=1e6, batch_size=size, micro_batch=args.micro, learning_rate=1e-6)
    feeder: Any = RandomFeeder(backbone, vision, samples)
    loop = Loop(reward, objective, feeder, records, settings, Workers())
    loop.run(lambda line: None, 1)  # warm-up: kernels, optimiser state
    seconds: list[float] = []
    loop.run(lambda line: seconds.append(line["seconds"]), 1 + args.steps)
    length, images = len(samples[0].input_ids), 2 * size
    trained = sum(parameter.numel() for _, _, parameter in reward.trained())
    median = statistics.median(seconds)
    print(f"{args.scale} scale on {where(device)}, torch {torch.__version__}, {trained / 1e6:.1f} M trained parameters")
    print(f"{args.size}: {length} tokens an image; {images} images a step in passes of {2 * args.micro}")
    rates = f"{images * length / median:.0f} tokens/s, {images / median:.2f} images/s"
    print(f"{median:.2f} s a step (median of {len(seconds)}), {rates}")
    print(f"peak memory {peak_bytes(device) / 2**30:.1f} GiB; last loss {loop.history[-1]['loss']:.4f}")


def peak_bytes(device: torch.device) -> int:
    """On a GPU what torch held at most, on a CPU what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["demo", *sorted(SCALES)], default="demo", help="demo: compare; else alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=picture_size, default="1024x1024", help="WIDTHxHEIGHT of the random pictures")
    parser.add_argument("--steps", type=int, default=4, help="of one timed call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--micro", type=int, default=4, help="pairs of one forward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="passes of a step")
    parser.add_argument("--keep-activations", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compare(args) if args.scale == "demo" else full_size(args)


if __name__ == "__main__":
    main()
