"""How well a backbone captions scenes: loss and accuracy by what a word tells.

Every word is predicted from the image, the prompt and the true words before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from model.llava_reward.pretrain_data import FIELDS, NO_FIELD, Sample
from model.llava_reward.pretrain_network import Predictions, PretrainNetwork


def measure(network: PretrainNetwork, batches: Iterable[Sequence[Sample]]) -> dict[str, float]:
    """Over all samples of ``batches``.

    - loss: mean cross-entropy of a caption token in nats
    - cells: mean binary cross-entropy of a cell, summed over its labels, in nats
    - exact: share of captions of which every token is the likeliest one
    - one of each ``Field``: share of its tokens that are the likeliest
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    sums = {"loss": 0.0, "cells": 0.0}
    network.eval()
    with torch.inference_mode():
        for samples in batches:
            said = network(samples)
            sums["cells"] += float(said.cell_loss)
            asked["cells"] += len(samples)
            _count(samples, said, right, asked, sums)
    network.train()
    return {name: sums[name] / asked[name] for name in ("loss", "cells")} | {
        name: right[name] / asked[name] for name in ("exact", *FIELDS) if asked[name]
    }


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
            if sample.weights[place] != 1.0:
                continue  # of the prompt, which holds more than is shown
            sums["loss"] += loss
            asked["loss"] += 1
            is_right = guess == sample.input_ids[place]
            is_exact = is_exact and is_right
            if sample.fields[place] != NO_FIELD:
                field = FIELDS[sample.fields[place]]
                asked[field] += 1
                right[field] += is_right
        asked["exact"] += 1
        right["exact"] += is_exact
