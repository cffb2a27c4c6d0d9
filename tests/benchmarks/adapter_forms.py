"""Rewards per second of LLaVA-Reward (phi3v) with LoRA merged and with LoRA low-rank, interleaved in one run.

``python -m tests.benchmarks.adapter_forms [--scale cpu|full] [--device cpu|cuda] [--size 1024x1024]``
``[--perspectives 4] [--images 1] [--rounds 5] [--threads 2]``; ``--sizes`` prints computed weights only, and needs
neither weights nor memory for them.

Random weights as in ``reward_speed.py``; preprocessing is not part of it. Merged: a language model per perspective,
one after the other. Low-rank: one language model, the perspectives stacked along the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from model.llava_reward.adapter_form import weight_bytes
from model.llava_reward.backbones.families import read_backbone
from model.llava_reward.backbones.interface import Backbone
from model.llava_reward.backbones.phi3v import Phi3VBackbone
from model.llava_reward.config import HeadConfig, LoraConfig
from model.llava_reward.lora import LoraPair
from model.llava_reward.network import RewardBranch, RewardNetwork
from model.perspectives import Perspective
from tests.benchmarks.reward_models import LORA_SCALE, SCALES, Built, LoraLinear
from tests.benchmarks.reward_options import begin, noise_pictures, reward_parser
from tests.benchmarks.reward_timing import Rewards, interleaved, largest_difference, peak_bytes

_GIB = 2**30

# Sizes of Qwen2.5-VL-7B-Instruct and llava-v1.6-vicuna-13b-hf.
PUBLISHED = {
    "qwen": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    },
    "llava": {
        "model_type": "llava_next",
        "text_config": {
            "model_type": "llama",
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
}


def low_rank(built: Built) -> RewardNetwork:
    """The network of ``built`` with LoRA beside one language model; it shares all of its tensors that it can."""
    perspectives = list(built.unmerged)
    branches, pairs = {}, {}
    for perspective in perspectives:
        branches[perspective], pairs[perspective] = _branch(built, perspective)
    network = RewardNetwork(built.backbone, built.network.vision, branches)
    network.share_language_model(pairs)
    return network.eval().requires_grad_(False)


def _branch(built: Built, perspective: Perspective) -> tuple[RewardBranch, Mapping[str, LoraPair]]:
    with torch.device("meta"):
        branch = RewardBranch(built.backbone, HeadConfig(True, False, 1, 0.1))
    tensors = dict(built.network.branch(perspective).state_dict())
    unmerged = {f"model.{n}": m for n, m in built.unmerged[perspective].named_modules() if isinstance(m, LoraLinear)}
    tensors |= {f"{name}.weight": module.weight for name, module in unmerged.items()}
    branch.load_state_dict(tensors, assign=True)
    return branch, {name: LoraPair(m.a, m.b, LORA_SCALE) for name, m in unmerged.items()}


def held_bytes(network: nn.Module) -> int:
    """Of all weights, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in network.state_dict().values()}
    return sum(storages.values())


def compare(built: Built, args: Any) -> None:
    """The two forms side by side."""
    samples = noise_pictures(built, args, args.images)
    networks = {"merged": built.network, "low-rank": low_rank(built)}
    ways = [_way(network, samples, args.perspectives) for network in networks.values()]
    difference = largest_difference(ways[0](), ways[1]())  # also the warm-up
    print(f"largest reward difference: {difference:.2e}", flush=True)
    seconds = _seconds(args.device, ways, args.rounds)
    for name, way, own in zip(networks, ways, seconds, strict=True):
        weights, each_s = held_bytes(networks[name]) / _GIB, statistics.median(own) / len(samples)
        print(f"{name}: {each_s:.3f} s an image, weights {weights:.3f} GiB{_pass(way, args.device)}")
    ratios = [m / low for m, low in zip(*seconds, strict=True)]
    shown = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"low-rank is {statistics.median(ratios):.3f} times as fast as merged; pairs {shown}")


def _seconds(device: torch.device, ways: Sequence[Callable[[], Rewards]], rounds: int) -> list[list[float]]:
    """By way and round: on a GPU by the clock, on a CPU processor seconds, which other work on it moves less."""
    if device.type == "cuda":
        return interleaved(device, ways, rounds)
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds):
        order = list(enumerate(ways))
        for index, run in order if number % 2 == 0 else reversed(order):
            start = time.process_time()
            run()
            seconds[index].append(time.process_time() - start)
        print(f"round {number + 1}: {', '.join(f'{own[-1]:.2f} s' for own in seconds)}", flush=True)
    return seconds


def _pass(way: Callable[[], Rewards], device: torch.device) -> str:
    """What a pass takes beside the weights, where that can be told."""
    if device.type != "cuda":
        return ""
    before = torch.cuda.memory_allocated(device)
    return f", a pass takes {(peak_bytes(device, way) - before) / _GIB:.2f} GiB more"


def _way(network: RewardNetwork, samples: list[Any], perspectives: list[Perspective]) -> Callable[[], Rewards]:
    return lambda: network(samples, perspectives)


def print_full_sizes() -> None:
    """Weights of full-size networks, each perspective with a projector of its own; bfloat16, LoRA of rank 128."""
    full = SCALES["full"]
    _print_sizes("phi3v", Phi3VBackbone(full.config, full.clip), full.lora_rank)
    for family, config in PUBLISHED.items():
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            _print_sizes(family, read_backbone(family, Path(folder)), full.lora_rank)


def _print_sizes(name: str, backbone: Backbone[Any, Any], rank: int) -> None:
    head = HeadConfig(backbone.skip_ca is not None, False, 1, 0.1)
    lora = LoraConfig(rank, LORA_SCALE, tuple(n for part in backbone.names.projections.values() for n in part))
    for count in (1, 2, len(Perspective)):
        held = list(Perspective)[:count]
        sizes = weight_bytes(backbone, dict.fromkeys(held, head), dict.fromkeys(held, lora), torch.bfloat16)
        print(f"{name}, {count}: merged {sizes.merged / _GIB:.2f} GiB, low-rank {sizes.low_rank / _GIB:.2f} GiB")


def parse_args() -> argparse.Namespace:
    parser = reward_parser(__doc__)
    parser.add_argument("--images", type=int, default=1, help="images of one pass")
    parser.add_argument("--sizes", action="store_true", help="only print what the published models would take")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    if args.sizes:
        print_full_sizes()
        return
    built = begin(args)
    print(f"{args.images} of {args.size} a pass, {len(args.perspectives)} perspectives")
    compare(built, args)


if __name__ == "__main__":
    main()
