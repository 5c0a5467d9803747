"""What training minimises: modules from a batch to (loss, scalars). The engine wraps one of them.

A batch is what `pipeline.data.loader` yields: uint8 images and keypoints in input pixels; normalisation and heatmap
targets happen here, on the device. Losses are means over the micro-batch, so that the engine's mean over ranks and
accumulation is the mean over the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.codec import CodecConfig, encode
from pipeline.distributed import autocast
from pipeline.models.knowledge_token import INITIAL
from pipeline.models.mae import MAE
from pipeline.models.pose import Heatmaps, PoseModel
from pipeline.models.preprocessing import normalise

Batch = Mapping[str, Any]


def heatmap_loss(predicted: Tensor, target: Tensor, keypoint_weight: Tensor, sample_weight: Tensor) -> Tensor:
    """Squared error averaged over keypoints and pixels of a sample, summed over samples (ViTPose's JointsMSELoss).

    predicted, target (b, K, h, w); keypoint_weight (b, K) of 0 or 1: keypoints of weight 0 stay in the denominator;
    sample_weight (b,).
    """
    error = (predicted.float() - target.float()) * keypoint_weight[:, :, None, None]
    return (error.square().mean(dim=(1, 2, 3)) * sample_weight).sum()


class MAEObjective(nn.Module):
    """The masked autoencoder's own loss (MAE, section 3)."""

    def __init__(self, model: MAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on masked patches of one micro-batch."""
        loss, _ = self.model(normalise(batch["images"]), batch["noise"], batch["weight"])
        return loss, {}


class PoseObjective(nn.Module):
    """Heatmap regression by several decoders: ground truth teaches only its own dataset's decoder."""

    def __init__(self, model: PoseModel, codec: CodecConfig, datasets: Sequence[str | None]) -> None:
        """datasets: what the batch's `dataset` column indexes, None for people without keypoints."""
        super().__init__()
        self.model, self.codec, self.datasets = model, codec, list(datasets)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch and each dataset's share of it."""
        found, zero = self.model.forward_mixed(normalise(batch["images"]), batch["dataset"], self.datasets)
        losses = self.ground_truth_losses(found, batch)
        return sum(losses.values(), zero), {f"loss_{name}": loss for name, loss in losses.items()}

    def ground_truth_losses(self, found: Heatmaps, batch: Batch) -> dict[str, Tensor]:
        """Each dataset's share of the loss, for every dataset on every rank."""
        targets, weights = encode(batch["keypoints"], batch["visible"], self.codec)
        losses = {name: targets.new_zeros(()) for name in self.datasets if name is not None}
        for name, (rows, heatmaps) in found.items():
            count = heatmaps.shape[1]
            error = heatmap_loss(heatmaps, targets[rows, :count], weights[rows, :count], batch["weight"][rows])
            losses[name] = error / len(batch["images"])
        return losses


class TokenObjective(nn.Module):
    """Fits a knowledge token on a frozen teacher (ViTPose, eq. 5): only `token` is a parameter here."""

    token: nn.Parameter

    def __init__(self, teacher: PoseModel, codec: CodecConfig, datasets: Sequence[str], num_tokens: int) -> None:
        super().__init__()
        width = teacher.config.backbone.width
        self.token = nn.Parameter(torch.empty(1, num_tokens, width))
        nn.init.trunc_normal_(self.token, std=INITIAL)
        # In a tuple, the engine neither sees nor shards nor trains the teacher.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._pose = (PoseObjective(teacher, codec, datasets),)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's loss with the token appended to its patches."""
        (teacher,), (pose,) = self._teacher, self._pose
        images = normalise(batch["images"])
        found, zero = teacher.forward_mixed(images, batch["dataset"], pose.datasets, tokens=self.token)
        losses = pose.ground_truth_losses(found, batch)
        return sum(losses.values(), zero), {f"loss_{name}": loss for name, loss in losses.items()}


@dataclass(frozen=True)
class TeacherWeight:
    """The weight of a teacher's term beside the ground truth's."""

    value: float
    falls_over: int | None = None
    """Samples of the whole stage, over which it falls linearly to 0 (Yang et al., DWPose); None: constant."""
    step_of: int = 1
    """Samples of a step: all of them have the weight of its first."""

    def at(self, batch: Batch) -> Tensor | float:
        """The weight in this micro-batch: a pure function of its positions, so that a resumed run needs no state."""
        if self.falls_over is None:
            return self.value
        first = batch["position"][0] // self.step_of * self.step_of
        return self.value * (1 - first / self.falls_over).clamp(min=0)


class DistillObjective(nn.Module):
    """Ground truth plus, where asked for, the teacher's heatmaps (ViTPose, eq. 6).

    Token distillation needs nothing here: the student carries the token.
    """

    def __init__(
        self,
        student: PoseModel,
        codec: CodecConfig,
        datasets: Sequence[str | None],
        teacher: PoseModel | None,
        *,
        weight: TeacherWeight,
        labelled_only: bool,
        precision: str,
    ) -> None:
        """teacher: None for ground truth alone; it is neither trained nor sharded, and runs in its own autocast."""
        super().__init__()
        self.model = student
        self.weight, self.labelled_only, self.precision = weight, labelled_only, precision
        self._pose = (PoseObjective(student, codec, datasets),)
        self._teacher = (teacher.eval().requires_grad_(False) if teacher is not None else None,)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch; scalars tell ground truth and teacher apart."""
        (pose,), (teacher,) = self._pose, self._teacher
        images = normalise(batch["images"])
        found, zero = self.model.forward_mixed(images, batch["dataset"], pose.datasets)
        truth = sum(pose.ground_truth_losses(found, batch).values(), zero)
        if teacher is None:
            return truth, {"loss_ground_truth": truth}
        imitation = self._teacher_loss(teacher, images, found, batch) * self.weight.at(batch)
        return truth + imitation, {"loss_ground_truth": truth, "loss_teacher": imitation}

    def _teacher_loss(self, teacher: PoseModel, images: Tensor, found: Heatmaps, batch: Batch) -> Tensor:
        """Decoders pair by dataset name; one that the teacher lacks learns from ground truth only."""
        shared = {name: rows for name, (rows, _) in found.items() if name in teacher.decoders}
        with torch.no_grad(), autocast(self.precision, images.device):
            soft = {name: heatmaps.float() for name, heatmaps in teacher.forward_rows(images, shared).items()}
        loss = images.new_zeros(())
        for name, target in soft.items():
            rows, heatmaps = found[name]
            weights = batch["visible"][rows, : target.shape[1]].to(target.dtype)
            weights = weights if self.labelled_only else torch.ones_like(weights)
            loss = loss + heatmap_loss(heatmaps, target, weights, batch["weight"][rows]) / len(images)
        return loss
