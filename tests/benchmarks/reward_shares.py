"""Where the time of a reward goes, measured component by component on our way; a part of ``reward_speed``.

Waits for the device around each component, so the sum is more than the time of an undisturbed run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from model.llava_reward.backbones import phi3v
from tests.benchmarks.reward_models import Built

_WITHIN_LM = ("LM linear", "LM attention")


class _Clock:
    """Seconds by component."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: Counter[str] = Counter()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted under ``name``."""

        def run(*args: Any, **options: Any) -> Any:
            start = self._now()
            out = function(*args, **options)
            self.seconds[name] += self._now() - start
            return out

        return run


@contextmanager
def _instrumented(built: Built, clock: _Clock) -> Iterator[None]:
    backbone = built.network.backbone
    names = {"share": "tower", "project": "projector", "end_state": "LM"}
    patches = [mock.patch.object(backbone, m, clock.timed(name, getattr(backbone, m))) for m, name in names.items()]
    patches.append(mock.patch.object(phi3v, "attend", clock.timed("LM attention", phi3v.attend)))
    patches.append(mock.patch.object(phi3v, "output_rows", clock.timed("LM linear", phi3v.output_rows)))
    branches = list(built.network.branches.values())
    patches += [mock.patch.object(b, "forward", clock.timed("SkipCA and head", b.forward)) for b in branches]
    layers = [layer for branch in branches for layer in branch.get_submodule("model.layers").children()]
    linears = {module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
    patches += [mock.patch.object(one, "forward", clock.timed("LM linear", one.forward)) for one in linears]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def print_shares(built: Built, device: torch.device, run: Callable[[], Any]) -> None:
    """Run once and say which share of the measured time each component took."""
    clock = _Clock(device)
    with _instrumented(built, clock):
        run()
    seconds = dict(clock.seconds)
    total = sum(value for name, value in seconds.items() if name not in _WITHIN_LM)
    seconds["LM norms, rotation, gates"] = seconds.pop("LM") - sum(seconds[name] for name in _WITHIN_LM)
    shown = ", ".join(f"{name} {value / total:.1%}" for name, value in seconds.items())
    print(f"shares of the time: {shown}")
