"""The one training loop. Everything optional is a hook (`pipeline/hooks.py`)."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from zlib import crc32

from torch import Tensor

from pipeline.buffers import average_buffers, load_buffers_into
from pipeline.checkpoint import ResumePoints, load_buffers, load_state, load_tensors
from pipeline.distributed import World, sum_over_ranks
from pipeline.engine import Batch, Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as all ranks know it."""

    loss: float
    """Mean over the global batch."""
    skipped: bool
    """The step was left out, on all ranks: see `Engine.train_step`."""
    suspects: list[str]
    """Samples of this rank, if its loss was not finite."""
    scalars: dict[str, Tensor]
    """Of this rank, on the device."""
    learning_rate: float
    """Of the fastest parameter group."""
    bad_samples: list[str]
    """What is wrong with which sample of this rank."""
    bad_count: int
    """Over all ranks."""
    sample_checksum: float
    """Sum of the CRC-32 of the sample ids over all ranks: two runs that read the same samples agree."""
    seconds: float
    data_seconds: float


class Hook:
    """Does nothing; hooks override what they need."""

    name = "hook"

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process, after resuming."""

    def after_step(self, trainer: "Trainer") -> None:
        """After each optimizer step; `trainer.step` counts it already."""

    def after_save(self, trainer: "Trainer") -> None:
        """After a resume point was published."""

    def state(self) -> dict[str, Any]:
        """Plain data for the resume point."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """This rank's tensors for the resume point."""
        return {}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Takes both back."""


class Trainer:
    """Runs an engine from its newest resume point to the last step."""

    def __init__(
        self,
        engine: Engine,
        batches: Callable[[int], Iterator[Batch]],
        learning_rate: Callable[[int, dict[str, Any]], float],
        *,
        total_steps: int,
        seed: int,
        points: ResumePoints,
        hooks: Sequence[Hook],
    ) -> None:
        """batches gives the endless stream of this rank's micro-batches from a step on."""
        self.engine, self.points, self.hooks = engine, points, hooks
        self.world: World = engine.world
        self.total_steps, self.seed = total_steps, seed
        self.step = 0
        self.result: StepResult | None = None
        self.loss_limit = math.inf  # a hook's to lower
        self._saved_step: int | None = None
        self._batches, self._learning_rate = batches, learning_rate

    def fit(self) -> None:
        """Collective. Trains to the end; the same call resumes. Raises Stopped where it was asked to stop."""
        batches = _Timed(self._resume())
        for hook in self.hooks:
            hook.on_start(self)
        while self.step < self.total_steps:
            self.result = self._one_step(batches)
            self.step += 1
            for hook in self.hooks:
                hook.after_step(self)

    def save(self) -> None:
        """Collective. Writes a resume point of the current step, unless that was done."""
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        tensors = self.engine.state()
        for hook in self.hooks:
            tensors |= {f"{hook.name}/{key}": value for key, value in hook.tensors().items()}
        plain = {hook.name: hook.state() for hook in self.hooks}
        state = {"hooks": plain, "world_size": self.world.size, "zero_stage": self.engine.config.zero_stage}
        self.points.save(self.step, tensors, self.engine.buffers(), state)
        for hook in self.hooks:
            hook.after_save(self)

    def _one_step(self, batches: "_Timed") -> StepResult:
        started = time.perf_counter()
        batches.seconds = 0.0
        rates: list[float] = []

        def rate(group: dict[str, Any]) -> float:
            rates.append(self._learning_rate(self.step, group))
            return rates[-1]

        outcome = self.engine.train_step(batches, rate, self._forward_seed, self.loss_limit)
        ids = [str(name) for batch in outcome.batches for name in batch["ids"]]
        bad = [name for batch in outcome.batches for name in batch["bad"]]
        checksum = sum(crc32(name.encode()) for name in ids)
        bad_count, checksum = sum_over_ranks([len(bad), checksum], self.world.device)
        return StepResult(
            loss=outcome.loss,
            skipped=outcome.skipped,
            suspects=[] if outcome.finite else ids,
            scalars=outcome.scalars,
            learning_rate=max(rates),
            bad_samples=bad,
            bad_count=int(bad_count),
            sample_checksum=checksum,
            seconds=time.perf_counter() - started,
            data_seconds=batches.seconds,
        )

    def _forward_seed(self, micro: int) -> int:
        return ((self.seed * 1_000_003 + self.step) * 65_537 + micro * self.world.size + self.world.rank) % 2**63

    def _resume(self) -> Iterator[Batch]:
        """Takes up the newest resume point, if there is one; gives the stream of batches from there on."""
        point = self.points.newest()
        if point is None:
            return self._batches(0)
        state, tensors = load_state(point), load_tensors(point)
        batches = self._batches(state["step"])
        # The engine needs some batches to create what is then overwritten: the next ones, put back afterwards.
        first = [next(batches) for _ in range(self.engine.accumulation)]
        hook_names = {hook.name for hook in self.hooks}
        self.engine.load({k: v for k, v in tensors.items() if k.split("/", 1)[0] not in hook_names}, iter(first))
        shares = load_buffers(point, self.world.rank, self.world.size)
        if len(shares) > 1:
            logger.warning("%d ranks instead of %d: batch-norm statistics were averaged", self.world.size, len(shares))
        load_buffers_into(self.engine.module, shares[0] if len(shares) == 1 else average_buffers(shares))
        self.step = state["step"]
        for hook in self.hooks:
            prefix = f"{hook.name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            hook.load(state["hooks"].get(hook.name, {}), own)
        return chain(first, batches)


class _Timed:
    """An iterator that adds up the seconds its consumer waited."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - started
        return batch
