"""What may happen around the training loop: logging, saving, stopping, evaluating, averaging weights.

A hook that communicates does so on all ranks, at the same step.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import broadcast_object, gather_objects, sum_over_ranks
from pipeline.errors import DataError, Stopped, VitruvianError
from pipeline.heartbeat import Heartbeat
from pipeline.recipe import Skipping
from pipeline.status import Status
from pipeline.stopping import StopRequest
from pipeline.tracking.tracker import Tracker, system_metrics
from pipeline.trainer import Hook, StepResult, Trainer

logger = logging.getLogger(__name__)


class LogMetrics(Hook):
    """One console line and one metrics line every few steps."""

    name = "log"

    def __init__(self, stage: str, every: int, tracker: Tracker, status: Status) -> None:
        self.stage, self.every, self.tracker, self.status = stage, every, tracker, status
        self._since: list[tuple[float, float]] = []
        self._started = time.monotonic()
        self._first_step = 0

    def on_start(self, trainer: Trainer) -> None:
        self._started, self._first_step = time.monotonic(), trainer.step
        self.tracker.start(trainer.step)
        self.status.running(trainer.step, trainer.total_steps)

    def after_step(self, trainer: Trainer) -> None:
        result = trainer.result
        assert result is not None
        self._since.append((result.seconds, result.data_seconds))
        if trainer.step % self.every and trainer.step not in (self._first_step + 1, trainer.total_steps):
            return
        names = sorted(result.scalars)
        sums = sum_over_ranks([float(result.scalars[name]) for name in names], trainer.world.device)
        seconds, waiting = (sum(column) for column in zip(*self._since, strict=True))
        images = trainer.engine.global_batch_size * len(self._since) / max(seconds, 1e-9)
        self._since.clear()
        if not trainer.world.is_main:
            return
        metrics = {
            "loss": result.loss,
            **{name: value / trainer.world.size for name, value in zip(names, sums, strict=True)},
            "learning_rate": result.learning_rate,
            "gradient_norm": trainer.engine.gradient_norm(),
            "images_per_second": images,
            "data_wait": waiting / max(seconds, 1e-9),
            "bad_samples": float(result.bad_count),
            "sample_checksum": result.sample_checksum,
            **system_metrics(),
        }
        self.tracker.log("train", trainer.step, {k: v for k, v in metrics.items() if math.isfinite(v)})
        self.status.running(trainer.step, trainer.total_steps)
        logger.info("%s", self._line(trainer, metrics))

    def _line(self, trainer: Trainer, metrics: Mapping[str, float]) -> str:
        done = trainer.step - self._first_step
        left = (time.monotonic() - self._started) / done * (trainer.total_steps - trainer.step)
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        return (
            f"{self.stage}  step {trainer.step}/{trainer.total_steps} {trainer.step / trainer.total_steps:4.0%}  "
            f"loss {metrics['loss']:.5f}  lr {metrics['learning_rate']:.2e}  gnorm {metrics['gradient_norm']:.3f}  "
            f"{metrics['images_per_second']:.0f} img/s  data {metrics['data_wait']:.0%}  eta {eta}"
        )


class Beat(Hook):
    """Tells the heartbeat how far the loop is."""

    name = "beat"

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def on_start(self, trainer: Trainer) -> None:
        self.heartbeat.beat(f"began at step {trainer.step}")

    def after_step(self, trainer: Trainer) -> None:
        self.heartbeat.beat(f"step {trainer.step}")

    def after_save(self, trainer: Trainer) -> None:
        self.heartbeat.beat(f"saved step {trainer.step}")


class SaveResumePoints(Hook):
    """A resume point every few steps."""

    name = "save"

    def __init__(self, every: int, status: Status) -> None:
        self.every, self.status = every, status

    def after_step(self, trainer: Trainer) -> None:
        # The last step too: what fails while publishing costs no training.
        if trainer.step % self.every == 0 or trainer.step == trainer.total_steps:
            trainer.save()

    def after_save(self, trainer: Trainer) -> None:
        self.status.saved(trainer.step)


class LimitSkippedSteps(Hook):
    """Names the samples of skipped steps, and stops the stage where too many follow each other."""

    name = "skipped"
    _WINDOW, _ENOUGH, _NAMED = 100, 20, 16

    def __init__(self, config: Skipping) -> None:
        self.config = config
        self.in_a_row, self.total = 0, 0
        self._losses: list[float] = []

    def on_start(self, trainer: Trainer) -> None:
        self._set_limit(trainer)

    def after_step(self, trainer: Trainer) -> None:
        result = trainer.result
        assert result is not None
        if not result.skipped:
            self.in_a_row = 0
            self._losses = [*self._losses, result.loss][-self._WINDOW :]
            self._set_limit(trainer)
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        suspects = [name for share in gather_objects(result.suspects) for name in share]
        if trainer.world.is_main:
            logger.warning("step %d skipped: %s", trainer.step, self._reason(result, suspects, trainer.loss_limit))
        if self.in_a_row > self.config.max_in_a_row:
            # Nothing was learnt meanwhile: the last resume point holds the last good weights.
            raise VitruvianError(
                f"{self.in_a_row} steps in a row were skipped, the last of them step {trainer.step} (loss "
                f"{result.loss:.6g}); the last resume point stands. Lower optimizer.lr, set "
                f"optimizer.gradient_clipping, or look at the samples named above"
            )

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "total": self.total, "losses": self._losses}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.in_a_row, self.total = state.get("in_a_row", 0), state.get("total", 0)
        self._losses = state.get("losses", [])

    def _set_limit(self, trainer: Trainer) -> None:
        if self.config.spike_factor is not None and len(self._losses) >= self._ENOUGH:
            trainer.loss_limit = self.config.spike_factor * statistics.median(self._losses)

    def _reason(self, result: StepResult, suspects: list[str], limit: float) -> str:
        if suspects:
            rest = f" and {len(suspects) - self._NAMED} more" if len(suspects) > self._NAMED else ""
            return f"the loss is not finite; it is of the samples {', '.join(suspects[: self._NAMED])}{rest}"
        if result.loss > limit:
            return f"its loss {result.loss:.6g} is above {limit:.6g}, {self.config.spike_factor} x the median"
        return f"the gradient is not finite (loss {result.loss:.6g})"


class StopOnRequest(Hook):
    """All ranks save together and leave, when any of them was asked to."""

    name = "stop"

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_start(self, trainer: Trainer) -> None:
        if self.request.agreed(trainer.world):
            self._leave(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if self.request.agreed(trainer.world):
            trainer.save()
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            self.request.clear()
        raise Stopped(f"stopped on request after step {trainer.step}; the same command goes on from there")


class CountBadSamples(Hook):
    """Names and counts unreadable samples; above the limit the stage stops."""

    name = "bad_samples"

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.bad, self.seen = 0, 0

    def after_step(self, trainer: Trainer) -> None:
        result = trainer.result
        assert result is not None
        for name in result.bad_samples:
            logger.warning("sample left out: %s", name)
        self.bad += result.bad_count
        self.seen += trainer.engine.global_batch_size
        if self.bad > self.max_fraction * max(self.seen, 1000):
            raise DataError(
                f"{self.bad} of {self.seen} samples can't be read, more than max_bad_fraction {self.max_fraction}; "
                f"they are named above. Make the shards again, or raise max_bad_fraction."
            )

    def state(self) -> dict[str, Any]:
        return {"bad": self.bad, "seen": self.seen}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.bad, self.seen = state.get("bad", 0), state.get("seen", 0)


class Evaluate(Hook):
    """Evaluates every few steps; where asked to, keeps the best one's weights.

    They are part of each resume point: a run that goes back to one goes back to what was the best then.
    """

    name = "evaluate"

    def __init__(
        self,
        every: int,
        evaluate: Callable[[torch.nn.Module], dict[str, float]],
        metric: str,
        tracker: Tracker,
        keep: bool,
    ) -> None:
        """evaluate is collective and returns the same metrics on all ranks; `metric` names the one to be maximised.

        It may raise Stopped, on all ranks, when it was asked to.
        """
        self.every, self.evaluate, self.metric, self.tracker, self.keep = every, evaluate, metric, tracker, keep
        self.best: float | None = None
        self.kept: dict[str, Tensor] = {}
        self._owed = False

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            self.kept = {}  # a resume point gives them to every rank
        if self._owed:
            self._run(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.total_steps:
            self._run(trainer)

    def _run(self, trainer: Trainer) -> None:
        self._owed = True
        try:
            with trainer.engine.evaluating() as module:
                metrics = broadcast_object(self.evaluate(module))  # all ranks decide alike
        except Stopped:
            return  # asked to stop: made up for when the run goes on
        self._owed = False
        self.tracker.log("evaluation", trainer.step, metrics)
        if trainer.world.is_main:
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            logger.info("evaluation after step %d: %s", trainer.step, shown)
        if self.best is None or metrics[self.metric] > self.best:
            self.best = metrics[self.metric]
            if self.keep:
                weights, buffers = trainer.engine.weights(), trainer.engine.averaged_buffers()
                if trainer.world.is_main:
                    self.kept = weights | {name: value.cpu() for name, value in buffers.items()}

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "owed": self._owed}

    def tensors(self) -> dict[str, Tensor]:
        return self.kept

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.best, self._owed = state.get("best"), state.get("owed", False)
        self.kept = dict(tensors)


class AverageWeights(Hook):
    """An exponential moving average of the weights (EMA), in float32 on rank 0's device. Not with ZeRO 3."""

    name = "average"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            self.average = {}  # a resume point gives it to every rank
            return
        weights = trainer.engine.whole_weights()
        start = self.average or weights
        self.average = {name: start[name].to(value.device, copy=True) for name, value in weights.items()}

    def after_step(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            weights = trainer.engine.whole_weights()
            averages = list(self.average.values())
            torch._foreach_lerp_(averages, [weights[name] for name in self.average], 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.cpu().clone() for name, value in self.average.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.average = dict(tensors)
