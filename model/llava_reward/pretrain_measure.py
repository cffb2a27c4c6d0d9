"""How well a backbone captions scenes, and how well its tower sees them: loss and accuracy by what is told or seen.

Every word is predicted from the image, the prompt and the true words before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from model.llava_reward.pretrain_data import CAPTIONED, FIELDS, LABELS, NO_FIELD, Sample
from model.llava_reward.pretrain_network import Predictions, PretrainNetwork, SeenSample
from model.scene_flaws import ProhibitedSign
from model.scene_grammar import Colour, Kind, Mismatch

_MIDDLES = [LABELS.index(f"middle of {kind}") for kind in Kind]
_COLOURS = [LABELS.index(colour) for colour in Colour]
_PROHIBITED = [LABELS.index(sign) for sign in ProhibitedSign]


def measure_captions(network: PretrainNetwork, batches: Iterable[Sequence[SeenSample]]) -> dict[str, float]:
    """Over all samples of ``batches``.

    - loss: mean cross-entropy of a token of captions and answers in nats
    - prompt: share of prompts at whose end it is known whether the image contradicts them; ``is right``, ``not
      colour`` and so on: of those that are right, and of those that are wrong in this
    - exact: share of captions of which every token is the likeliest one
    - one of each ``Field``: share of its tokens that are the likeliest
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    sums = {"loss": 0.0}
    network.eval()
    with torch.inference_mode():
        for seen in batches:
            said = network(seen)
            _count([one.sample for one in seen], said, right, asked, sums)
            is_known = ((said.wrong > 0) == said.is_wrong.bool())[said.ends].tolist()
            faults = [fault for one in seen for fault in one.sample.faults]
            for fault, known in zip(faults, is_known, strict=True):
                for name in ("prompt", _about(fault)):
                    asked[name] += 1
                    right[name] += known
    network.train()
    return {"loss": sums["loss"] / asked["loss"]} | {
        name: right[name] / asked[name]
        for name in ("prompt", *map(_about, (None, *Mismatch)), "exact", *FIELDS)
        if asked[name]
    }


def _about(fault: Mismatch | None) -> str:
    return f"not {fault}" if fault else "is right"


def _count(
    samples: Sequence[Sample], said: Predictions, right: Counter[str], asked: Counter[str], sums: dict[str, float]
) -> None:
    start = 0
    for row, sample in enumerate(samples):
        places = said.asked[row].nonzero().flatten().tolist()
        losses, guesses = (values[start : start + len(places)].tolist() for values in (said.losses, said.guesses))
        start += len(places)
        is_exact = True
        for place, loss, guess in zip(places, losses, guesses, strict=True):
            if sample.weights[place] < 1.0:
                continue  # of the prompt, which holds more than is shown
            sums["loss"] += loss
            asked["loss"] += 1
            is_right = guess == sample.input_ids[place]
            is_exact = is_exact and (is_right or sample.texts[place] != CAPTIONED)
            if sample.fields[place] != NO_FIELD:
                field = FIELDS[sample.fields[place]]
                asked[field] += 1
                right[field] += is_right
        asked["exact"] += 1
        right["exact"] += is_exact


def measure_cells(network: PretrainNetwork, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
    """Over the cells of all views and crops of ``batches``.

    - cells: mean binary cross-entropy of a cell, summed over its labels, in nats
    - kind, colour: share of the cells with the middle of one thing for which its kind, its colour is the likeliest
    - sign: chance that a cell with a prohibited sign gets a higher logit of one than a cell without

    What no cell shows is left out.
    """
    all_said, all_shown = [], []
    network.eval()
    with torch.inference_mode():
        for samples in batches:
            crops, shown = network.crops(samples, None)
            all_said.append(network.cell_logits(crops).flatten(0, 1))
            all_shown.append(shown.flatten(0, 1))
    network.train()
    said, shown = torch.cat(all_said), torch.cat(all_shown)
    found = {"cells": float(F.binary_cross_entropy_with_logits(said, shown, reduction="sum")) / len(said)}
    is_middle = shown[:, _MIDDLES].sum(1) == 1
    for name, labels in (("kind", _MIDDLES), ("colour", _COLOURS)):
        asked = is_middle & (shown[:, labels].sum(1) == 1)
        if asked.any():
            is_right = said[asked][:, labels].argmax(1) == shown[asked][:, labels].argmax(1)
            found[name] = float(is_right.double().mean())
    has_sign, signs = shown[:, _PROHIBITED].any(1), said[:, _PROHIBITED].amax(1)
    if has_sign.any() and not has_sign.all():
        without = signs[~has_sign].sort().values
        found["sign"] = float(torch.searchsorted(without, signs[has_sign]).double().mean()) / len(without)
    return found
