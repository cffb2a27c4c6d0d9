"""The training loop of one perspective: steps, evaluation, and a state to go on from. Knows nothing of Ray or files.

A step is a pure function of (parameters, optimiser state, number of the step): its records come from the number, its
dropout from the seed, the number and the worker. So a run that goes on from a state has the losses of one that was
never stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import ConfigError, DivergedError
from model.llava_reward.losses import PairLoss
from model.llava_reward.training.batches import Stream, check_division, cut, shard
from model.llava_reward.training.inputs import Feeder
from model.llava_reward.training.metrics import Evaluation, Sums, fitted_temperature, scores
from model.llava_reward.training.objective import Objective, Outcome, paired_outcome, unpaired_outcome
from model.llava_reward.training.parallel import Workers, put, whole
from model.llava_reward.training.schedule import learning_rate_factor
from model.llava_reward.training.trainable import TrainableReward
from model.preferences import LabelledImage, PreferencePair, Record, record_id

State = dict[str, Any]
MAX_NAMED = 8  # records that an error names; more are counted


@dataclass(frozen=True)
class LoopSettings:
    """Hyper-parameters; defaults as published (``batch_size``: records of a step, over all workers).

    - micro_batch: records of one forward pass of one worker; learning_rates: peak by group, where it differs
    - eval_every: steps between evaluations, 0 for none but the last
    """

    epochs: float = 3.0
    batch_size: int = 16
    micro_batch: int = 4
    learning_rate: float = 2e-4
    learning_rates: tuple[tuple[str, float], ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_share: float = 0.03
    max_grad_norm: float = 1.0
    seed: int = 42
    eval_every: int = 0


class Loop:
    """Trains ``reward`` on ``records``; one per worker, all with the same arguments.

    - raises: ``ConfigError`` if the batch does not divide among the workers, or is larger than all epochs
    """

    def __init__(
        self,
        reward: TrainableReward,
        objective: Objective,
        feeder: Feeder,
        records: Sequence[Record],
        settings: LoopSettings,
        workers: Workers,
        eval_records: Sequence[Record] = (),
    ) -> None:
        check_division(settings.batch_size, settings.micro_batch, workers.world)
        self._reward, self._objective, self._feeder, self._workers = reward, objective, feeder, workers
        self._records, self._eval_records, self._settings = records, eval_records, settings
        self._stream = Stream(len(records), settings.batch_size, settings.seed)
        self.total_steps = self._stream.total_steps(settings.epochs)
        self._wrapped = workers.wrap(reward)
        self._parameters = {name: parameter for _, name, parameter in reward.trained()}
        self.projector = reward.backbone.names.projector
        self._device = reward.branch.value_head.weight.device
        self._optimizer = _optimizer(reward, settings)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def run(self, after_step: Callable[[dict[str, float]], None], stop_at: int | None = None) -> None:
        """Steps up to ``stop_at``, the last by default; ``after_step`` gets each step's line of the history.

        - raises: ``DivergedError`` naming step, learning rate and records; ``InputError`` for an image that cannot be
          used, naming it
        """
        stop = self.total_steps if stop_at is None else min(stop_at, self.total_steps)
        batches = self._feeder.feed(batch for step in range(self.step, stop) for batch in self._own(step))
        while self.step < stop:
            started = time.perf_counter()
            line = self._step(batches)
            line["seconds"] = time.perf_counter() - started
            if self._eval_records and self._is_evaluated():
                line |= {f"eval_{name}": value for name, value in asdict(self.evaluate()).items()}
            self.history.append(line)
            after_step(line)

    def _own(self, step: int) -> list[list[Record]]:
        """This worker's micro-batches of a step."""
        records = [self._records[i] for i in self._stream.step(step)]
        return cut(shard(records, self._workers.rank, self._workers.world), self._settings.micro_batch)

    def _is_evaluated(self) -> bool:
        every = self._settings.eval_every
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _step(self, batches: Iterator[tuple[Sequence[Record], Any]]) -> dict[str, float]:
        settings, world = self._settings, self._workers.world
        _seed(settings.seed, self.step, self._workers.rank, self._device)
        rate = self._set_learning_rate()
        count = settings.batch_size // (settings.micro_batch * world)
        sums, losses, seen = Sums(self._device), [], []
        for i in range(count):
            records, shared = next(batches)
            with self._workers.accumulating(self._wrapped, is_last=i == count - 1):
                outcome = self._outcome(records, self._wrapped(shared))
                # Averaged over the workers afterwards: the mean over the whole step, whatever the cut.
                torch.autograd.backward(outcome.loss * (len(records) * world / settings.batch_size))
            sums.add(outcome, len(records))
            losses.append(outcome.loss.detach())
            seen.append(records)
        found = scores(self._workers.sum(sums.values))
        if not math.isfinite(found.loss):
            raise self._diverged(rate, f"the loss is {found.loss}", losses, seen)
        norm = _norm(nn.utils.clip_grad_norm_(self._parameters.values(), settings.max_grad_norm))
        if not math.isfinite(norm):
            raise self._diverged(rate, f"the gradient's norm is {norm} (loss {found.loss:.4g})", losses, seen)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        epoch = self._stream.epoch_of(self.step - 1)
        return {"step": self.step, "epoch": epoch, **asdict(found), "learning_rate": rate, "gradient_norm": norm}

    def _outcome(self, records: Sequence[Record], rewards: Tensor) -> Outcome:
        if self._objective.kind == "unpaired":
            return unpaired_outcome(rewards, [one.label for one in records if isinstance(one, LabelledImage)])
        loss = self._reward.loss
        assert isinstance(loss, PairLoss)
        pairs = [one for one in records if isinstance(one, PreferencePair)]
        return paired_outcome(loss, rewards, [margin_of(one) for one in pairs] if self._objective.has_margin else None)

    def _diverged(
        self, rate: float, what: str, losses: Sequence[Tensor], seen: Sequence[Sequence[Record]]
    ) -> DivergedError:
        bad = [records for loss, records in zip(losses, seen, strict=True) if not bool(loss.isfinite())]
        own = [record_id(record) for records in bad or seen for record in records] if bad else []
        named = self._workers.gather(own) or self._workers.gather([record_id(r) for records in seen for r in records])
        more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        return DivergedError(
            f"step {self.step + 1}: {what} at learning_rate={rate:.4g}; records {named[:MAX_NAMED]}{more}. Lower the "
            "learning rate, or look at these records"
        )

    def _set_learning_rate(self) -> float:
        warmup = math.ceil(self.total_steps * self._settings.warmup_share)
        factor = learning_rate_factor(self.step, self.total_steps, warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self._settings.learning_rate * factor

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Loss, accuracy and fitted temperature on the held-out records, without dropout.

        - raises: ``DivergedError`` if the loss is not finite
        """
        size, workers = self._settings.micro_batch, self._workers
        self._reward.set_dropout(False)
        pieces = cut(self._eval_records, size * workers.world)
        own = [piece[workers.rank * size : (workers.rank + 1) * size] for piece in pieces]
        sums, logits = Sums(self._device), list[float]()
        # A worker without records of its own still takes part: its parts of the weights are needed.
        for mine, (records, shared) in zip(own, self._feeder.feed(one or pieces[0][:1] for one in own), strict=True):
            outcome = self._outcome(records, self._forward_only(shared))
            if mine:
                sums.add(outcome, len(records))
                logits += outcome.logits.tolist()
        self._reward.set_dropout(True)
        found, every = scores(workers.sum(sums.values)), torch.tensor(workers.gather(logits))
        if not math.isfinite(found.loss):
            raise DivergedError(f"step {self.step}: the held-out loss is {found.loss}. Lower the learning rate")
        return Evaluation(**asdict(found), temperature=fitted_temperature(every))

    def _forward_only(self, shared: Any) -> Tensor:
        # Past DDP, which would prepare for a backward pass; FSDP is the network itself.
        out: Tensor = self._reward(shared)
        return out

    def state(self) -> State:
        """Everything to go on from, whole and on the CPU. All workers must call it; they get the same."""
        optimizer = {
            name: {key: whole(value) for key, value in self._optimizer.state.get(parameter, {}).items()}
            for name, parameter in self._parameters.items()
        }
        return {
            "step": self.step,
            "parameters": {name: whole(parameter) for name, parameter in self._parameters.items()},
            "optimizer": optimizer,
            "history": self.history,
        }

    def load(self, state: State) -> None:
        """Go on from ``state``, of any number of workers. Raises ``ConfigError`` if it is of another run."""
        if set(state["parameters"]) != set(self._parameters):
            raise ConfigError("the saved state has other parameters; train into another folder")
        for name, parameter in self._parameters.items():
            put(parameter, state["parameters"][name])
            self._optimizer.state[parameter] = _like(parameter, state["optimizer"][name])
        self.step, self.history = int(state["step"]), list(state["history"])


def margin_of(pair: PreferencePair) -> float:
    """By how much the chosen image was rated higher. Raises ``ConfigError`` for a pair without rates."""
    if pair.chosen_rate is None or pair.rejected_rate is None:
        raise ConfigError(f"use_margin=true, but pair {pair.pair_id!r} has no rates; leave use_margin out")
    return pair.chosen_rate - pair.rejected_rate


def _optimizer(reward: TrainableReward, settings: LoopSettings) -> torch.optim.AdamW:
    rates = dict(settings.learning_rates)
    groups: dict[str, list[nn.Parameter]] = {}
    for group, _, parameter in reward.trained():
        groups.setdefault(group, []).append(parameter)
    if unknown := sorted(set(rates) - set(groups)):
        raise ConfigError(f"learning_rates names {unknown}, expected some of {sorted(groups)}")
    parts = [{"params": params, "peak": rates.get(group, settings.learning_rate)} for group, params in groups.items()]
    return torch.optim.AdamW(parts, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay)


def _like(parameter: nn.Parameter, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Optimiser state of one parameter: moments lie as the parameter does, the step count on the CPU."""
    out = {}
    for key, value in stored.items():
        if value.shape != parameter.shape or key == "step":
            out[key] = value.clone()
            continue
        out[key] = torch.zeros_like(parameter, requires_grad=False)
        put(out[key], value)
    return out


def _norm(norm: Tensor) -> float:
    return float(whole(norm))


def _seed(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Dropout's random numbers for one step of one worker."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
