"""From an objective and shards to trained tensors: what every training stage does, in order."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import ResumePoints
from pipeline.context import Context
from pipeline.data.codec import CodecConfig
from pipeline.data.collection import Collection
from pipeline.data.loader import TrainSet, make_loader
from pipeline.data.order import Order
from pipeline.distributed import loader_workers
from pipeline.engine import Batch, Engine, to_device
from pipeline.errors import ConfigError
from pipeline.hooks import (
    AverageWeights,
    Beat,
    CountBadSamples,
    Evaluate,
    LimitSkippedSteps,
    LogMetrics,
    SaveResumePoints,
    StopOnRequest,
)
from pipeline.models.pose import PoseModel
from pipeline.models.preprocessing import normalise
from pipeline.objectives import PoseObjective
from pipeline.recipe import TrainingConfig
from pipeline.trainer import Hook, Trainer

Evaluation = tuple[int, Callable[[nn.Module], dict[str, float]], str]
View = Callable[..., Any]


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind."""

    state: dict[str, Tensor]
    """Weights and averaged buffers of the objective, on rank 0; empty elsewhere."""
    metrics: dict[str, float]
    order: Order
    collection: Collection
    seed: int

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors below a prefix, which is cut off."""
        return {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}

    def batches(self, view: View, size: int = 32) -> Iterator[Batch]:
        """The first samples of the order, seen through another view, in this process."""
        data = TrainSet(self.collection.shards, self.order, view, self.seed)
        size = min(size, len(self.collection.shards))
        steps = len(self.collection.shards) // size
        alone = {"rank": 0, "world_size": 1, "accumulation": 1, "workers": 0}
        return iter(make_loader(data, start_step=0, steps=steps, global_batch=size, micro_batch=size, **alone))


def train(
    context: Context,
    config: TrainingConfig,
    objective: nn.Module,
    groups: list[dict[str, Any]],
    collection: Collection,
    view: View,
    *,
    weights: Mapping[str, float] | None = None,
    evaluation: Evaluation | None = None,
    average_decay: float | None = None,
    keep_best: bool = False,
) -> TrainingResult:
    """Collective. Trains `objective` from its newest resume point to the last step.

    groups: optimizer groups with `params` and `weight_decay`, optionally `lr_scale`. weights: sampling weights by
    dataset. evaluation: every how many steps, what, and the metric to maximise.
    """
    world = context.world
    order = _order(collection, context.seed, weights)
    total = config.total_steps(order.epoch_length)
    engine = Engine(
        objective,
        [{"lr": 0.0, **group} for group in groups],
        context.pipeline.engine,
        world,
        betas=config.optimizer.betas,
        gradient_clipping=config.optimizer.gradient_clipping,
        global_batch_size=config.global_batch_size,
        micro_batch_size=context.pipeline.runtime.micro_batch_size,
    )
    evaluate = Evaluate(*evaluation, context.tracker, keep_best) if evaluation else None
    average = AverageWeights(average_decay) if average_decay is not None else None
    hooks: list[Hook | None] = [
        Beat(context.heartbeat),
        CountBadSamples(config.max_bad_fraction),
        LimitSkippedSteps(config.skipping),
        average,
        LogMetrics(context.plan.name, context.pipeline.tracking.log_every, context.tracker, context.status),
        evaluate,
        SaveResumePoints(config.save_interval(total), context.status),
        StopOnRequest(context.stop),
    ]
    data = TrainSet(collection.shards, order, view, context.seed)
    trainer = Trainer(
        engine,
        _stream(engine, data, total, context.pipeline.runtime.workers),
        config.learning_rate(total, order.epoch_length),
        total_steps=total,
        seed=context.seed,
        points=ResumePoints(context.run_dir, world, context.storage),
        hooks=[hook for hook in hooks if hook is not None],
    )
    trainer.fit()
    state = _final_state(engine, objective, average)
    if keep_best and evaluate is not None and world.is_main:
        state = {name: evaluate.kept[name] for name in state}
    metrics = {"steps": float(total)}
    if trainer.result is not None:
        metrics["final_loss"] = trainer.result.loss
    if evaluate is not None and evaluate.best is not None:
        metrics[f"best_{evaluate.metric}_on_the_way"] = evaluate.best
    return TrainingResult(state, metrics, order, collection, context.seed)


def _stream(engine: Engine, data: TrainSet, total: int, workers: int | None) -> Callable[[int], Iterator[Batch]]:
    """This rank's micro-batches from a step on, to the last step."""
    world = engine.world

    def batches(start_step: int) -> Iterator[Batch]:
        return iter(
            make_loader(
                data,
                start_step=start_step,
                steps=total - start_step + 1,  # one to spare: resuming after the last step still takes a batch
                global_batch=engine.global_batch_size,
                micro_batch=engine.micro_batch_size,
                rank=world.rank,
                world_size=world.size,
                accumulation=engine.accumulation,
                workers=loader_workers(workers, world, on_cpu=1),
            )
        )

    return batches


@torch.no_grad()
def mean_loss(
    model: PoseModel, token: Tensor | None, codec: CodecConfig, datasets: list[str], batches: list[Batch]
) -> float:
    """Mean ground-truth loss of a pose model in eval mode, optionally with a token appended, over batches."""
    pose = PoseObjective(model, codec, datasets)
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for batch in (to_device(batch, device) for batch in batches):
        found, _ = model.forward_mixed(normalise(batch["images"]), batch["dataset"], datasets, tokens=token)
        losses.append(float(sum(pose.ground_truth_losses(found, batch).values())))
    return sum(losses) / len(losses)


def state_digest(module: nn.Module) -> str:
    """sha256 over every parameter and every buffer, batch-norm statistics included."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
        digest.update(repr(tensor.item()).encode() if not tensor.dim() else b"")
    return digest.hexdigest()


def _order(collection: Collection, seed: int, weights: Mapping[str, float] | None) -> Order:
    by_index = None
    if weights is not None:
        unknown = sorted(set(weights) - set(collection.names))
        if unknown:
            raise ConfigError(
                f"weights name {unknown[0]!r}, which the shards do not hold; they hold {', '.join(collection.names)}"
            )
        by_index = {index: weights.get(name, 0.0) for index, name in enumerate(collection.names)}
    return Order(collection.shards.dataset_of, seed, by_index, block=256 if collection.is_remote else None)


def _final_state(engine: Engine, objective: nn.Module, average: AverageWeights | None) -> dict[str, Tensor]:
    """Collective. What is published: whole weights, or their average, and averaged buffers; on rank 0."""
    weights, buffers = engine.weights(), engine.averaged_buffers()
    if average is not None:
        weights |= average.tensors()  # frozen ones have no average
    names = objective.state_dict().keys() if engine.world.is_main else ()
    everything = {**weights, **{name: value.cpu() for name, value in buffers.items()}}
    return {name: everything[name] for name in names if name in everything}
