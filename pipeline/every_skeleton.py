"""Every-skeleton distillation: a teacher of several datasets teaches all decoders on every crop, labelled or not.

A crop of one dataset has ground truth for one skeleton. A teacher trained on several has an answer in each, right or
wrong, and nobody to check it. What it says of a crop and of its mirror image are two opinions, though, and where they
differ it does not know. So each keypoint of each decoder is taught only where both agree and both are sure.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.data.codec import CodecConfig, flip_heatmaps
from pipeline.data.definitions import DatasetDefinition
from pipeline.distributed import autocast
from pipeline.models.pose import Heatmaps, PoseModel
from pipeline.models.preprocessing import normalise
from pipeline.objectives import Batch, PoseObjective, TeacherWeight, heatmap_loss

Lesson = tuple[Tensor, Tensor]
"""Of one decoder: target heatmaps (B, K, h, w), and where they count (B, K), 0 or 1."""


def agreement(upright: Tensor, mirrored: Tensor, distance: float, floor: float) -> Tensor:
    """Where heatmaps (B, K, h, w) of a crop and of its mirror image, mirrored back, say the same: (B, K) of 0 or 1.

    Their highest pixels are at most `distance` heatmap pixels apart and both at least `floor` high.
    """
    columns = upright.shape[-1]
    (height, place), (other_height, other_place) = (maps.flatten(2).max(-1) for maps in (upright, mirrored))
    across = place % columns - other_place % columns
    down = place // columns - other_place // columns
    near = across.square() + down.square() <= distance**2
    return (near & (torch.minimum(height, other_height) >= floor)).to(upright.dtype)


class EverySkeletonObjective(nn.Module):
    """Ground truth for each crop's own decoder, and the teacher's agreed heatmaps for every decoder that it has, too.

    The target is the mean of both heatmaps, as in the flip test: the better answer, and it was computed for the gate
    anyway. The student sees the crop as it is, once.
    """

    def __init__(
        self,
        student: PoseModel,
        codec: CodecConfig,
        datasets: Sequence[str | None],
        teacher: PoseModel,
        definitions: Mapping[str, DatasetDefinition],
        *,
        distance: float,
        floor: float,
        weight: TeacherWeight,
        precision: str,
    ) -> None:
        """datasets: what the batch's `dataset` column indexes, None for people without keypoints; definitions: of the
        student's decoders. The teacher is neither trained nor sharded, and runs in its own autocast."""
        super().__init__()
        self.model = student
        self.distance, self.floor, self.weight, self.precision = distance, floor, weight, precision
        self.taught = [name for name in student.decoders if name in teacher.decoders]
        self._flip_index = {name: torch.from_numpy(definitions[name].flip_index) for name in self.taught}
        self._pose = (PoseObjective(student, codec, datasets),)
        self._teacher = (teacher.eval().requires_grad_(False),)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch; scalars tell ground truth and teacher apart, and the share of keypoints taught."""
        (pose,) = self._pose
        images = normalise(batch["images"])
        own, others, zero = self.model.forward_everywhere(images, batch["dataset"], pose.datasets, self.taught)
        truth = sum(pose.ground_truth_losses(own, batch).values(), zero)
        lessons = self.lessons(images)
        imitation = sum((self._loss(found, lessons, batch) for found in (own, others)), images.new_zeros(()))
        imitation = imitation * self.weight.at(batch)
        scalars = {"loss_ground_truth": truth, "loss_teacher": imitation}
        counted = batch["weight"].sum().clamp(min=1)
        for name, (_, gate) in lessons.items():
            scalars[f"taught_{name}"] = (gate.mean(1) * batch["weight"]).sum() / counted
        return truth + imitation, scalars

    @torch.no_grad()
    def lessons(self, images: Tensor) -> dict[str, Lesson]:
        """What the teacher says of normalised crops (B, 3, H, W), by decoder."""
        (teacher,) = self._teacher
        with autocast(self.precision, images.device):
            upright = teacher(images, self.taught)
            mirrored = teacher(images.flip(-1), self.taught)
        found = {}
        for name in self.taught:
            first = upright[name].float()
            second = flip_heatmaps(mirrored[name].float(), self._flip_index[name])
            found[name] = (first + second) / 2, agreement(first, second, self.distance, self.floor)
        return found

    def _loss(self, found: Heatmaps, lessons: Mapping[str, Lesson], batch: Batch) -> Tensor:
        """Of some rows of each decoder, as a share of the micro-batch."""
        loss = batch["weight"].new_zeros(())
        for name, (rows, heatmaps) in found.items():
            if name in lessons:
                target, gate = lessons[name]
                loss = loss + heatmap_loss(heatmaps, target[rows], gate[rows], batch["weight"][rows])
        return loss / len(batch["images"])
