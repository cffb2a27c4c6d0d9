"""One of two processes that train together without Ray; the first one writes its losses and its state."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from model.llava_reward.training.parallel import Workers
from tests.train_helpers import loop_of, losses, pairs


def main(folder: Path, strategy: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{strategy}", rank=rank, world_size=2)
    settings = {"batch_size": 8, "micro_batch": 2, "epochs": 4, "learning_rate": 1e-4}
    records = pairs(folder / "images", 8)
    workers = Workers(strategy)  # type: ignore[arg-type]
    with loop_of(records, settings=settings, workers=workers, eval_records=records[:3], has_checkpointing=True) as loop:
        found = losses(loop)
        state = loop.state()
        if rank == 0:
            torch.save(state, folder / f"{strategy}.pt")
            (folder / f"{strategy}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
