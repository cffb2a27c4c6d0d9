"""What benchmarks of reward passes have in common: their options, their first line, and the network and pictures."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from model.llava_reward.backbones.phi3v import Phi3VSample
from model.perspectives import Perspective
from tests.benchmarks.reward_models import SCALES, Built, build, make_sample


class Size(NamedTuple):
    """Of a picture, in pixels; written ``1024x1024``."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def reward_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the shared options, to which a benchmark adds its own; ``doc``: what ``--help`` says first."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--size", type=picture_size, default="1024x1024", help="WIDTHxHEIGHT of the pictures")
    parser.add_argument("--perspectives", type=_first, default=str(len(Perspective)), help="how many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def picture_size(text: str) -> Size:
    """``WIDTHxHEIGHT``; raises ``ValueError`` for anything else."""
    width, height = map(int, text.split("x"))
    return Size(width, height)


def _first(count: str) -> list[Perspective]:
    return list(Perspective)[: int(count)]


def begin(args: argparse.Namespace) -> Built:
    """Sets the threads, says what runs where, and builds the network that ``args`` of ``reward_parser`` ask for."""
    torch.set_num_threads(args.threads)
    scale = SCALES[args.scale]
    print(f"{args.scale} scale, {scale.dtype}, {where(args.device)}, torch {torch.__version__}")
    return build(scale, args.perspectives, args.device)


def where(device: torch.device) -> str:
    """The GPU's name, or the number of torch's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def noise_pictures(built: Built, args: argparse.Namespace, count: int) -> list[Phi3VSample]:
    """Samples of ``args.size``, each from its own seed."""
    return [make_sample(built, *args.size, args.device, seed) for seed in range(count)]
