"""Every-skeleton distillation: the gate, and who teaches whom on which crop."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.every_skeleton import EverySkeletonObjective, agreement
from pipeline.models.config import PoseConfig
from pipeline.models.pose import PoseModel
from pipeline.models.preprocessing import normalise
from pipeline.objectives import TeacherWeight

DEFINITIONS = {name: load_definition(name) for name in ("coco", "aic", "mpii")}
KEYPOINTS = {name: definition.num_keypoints for name, definition in DEFINITIONS.items()}
DATASETS = ["mpii", None, "coco", "aic"]
CODEC = CodecConfig(input_size=(64, 48), heatmap_size=(32, 24))
UNLABELLED, COCO = 1, 2


def build(keypoints: dict[str, int], seed: int) -> PoseModel:
    """A model whose heatmaps are all over the place."""
    torch.manual_seed(seed)
    backbone = {"size": "micro", "image_size": (64, 48), "patch_size": 8}
    model = PoseModel(PoseConfig.model_validate({"backbone": backbone, "decoder": {"filters": 8}}), keypoints)
    model.init_weights()
    for decoder in model.decoders.values():
        torch.nn.init.normal_(decoder.final_layer.weight, std=0.2)
    return model


def objective(teacher: dict[str, int] = KEYPOINTS, **changes: Any) -> EverySkeletonObjective:
    """A student of all three datasets; without a gate unless one is asked for."""
    options = {"distance": 1e3, "floor": -1e3, "weight": TeacherWeight(1.0), "precision": "float32", **changes}
    student = build(KEYPOINTS, 0).train()
    return EverySkeletonObjective(student, CODEC, DATASETS, build(teacher, 1), DEFINITIONS, **options)


def batch(*datasets: int, seed: int = 0) -> dict[str, Tensor]:
    """Crops of these datasets, with keypoints where there are any."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(datasets), 3, 64, 48), dtype=torch.uint8, generator=generator)
    index = torch.tensor(datasets)
    return {
        "images": images,
        "keypoints": torch.rand(len(datasets), 17, 2, generator=generator) * 40,
        "visible": (index != UNLABELLED).float().unsqueeze(1).repeat(1, 17),
        "dataset": index,
        "weight": torch.ones(len(datasets)),
    }


def gradients(taught: EverySkeletonObjective, found: dict[str, Tensor], only: str | None = None) -> dict[str, Tensor]:
    """Of every parameter, by the whole loss or by one of its parts."""
    taught.zero_grad()
    loss, scalars = taught(found)
    (loss if only is None else scalars[only]).backward()
    return {name: p.grad.clone() for name, p in taught.model.named_parameters() if p.grad is not None}


def of_decoder(found: dict[str, Tensor], name: str) -> list[Tensor]:
    return [value for key, value in found.items() if key.startswith(f"decoders.{name}.")]


def test_the_gate_is_what_two_pictures_of_the_same_person_say() -> None:
    """Computed with loops and names instead of indices, on a teacher that sometimes agrees with itself."""
    taught = objective(distance=12.0, floor=3e-5)
    crops = normalise(batch(COCO, COCO, COCO, COCO)["images"])
    lessons = taught.lessons(crops)
    teacher = taught._teacher[0]
    passed = 0
    for name, definition in DEFINITIONS.items():
        partner = {one: other for pair in definition.flip_pairs for one, other in (pair, pair[::-1])}
        with torch.no_grad():
            upright = teacher(crops, [name])[name].numpy()
            mirror = teacher(torch.from_numpy(crops.numpy()[..., ::-1].copy()), [name])[name].numpy()
        target, gate = (value.numpy() for value in lessons[name])
        for sample in range(4):
            for k, keypoint in enumerate(definition.keypoints):
                one = upright[sample, k]
                other = np.fliplr(mirror[sample, definition.keypoints.index(partner.get(keypoint, keypoint))])
                (y, x), (v, u) = (np.unravel_index(image.argmax(), image.shape) for image in (one, other))
                expected = math.hypot(x - u, y - v) <= 12 and min(one.max(), other.max()) >= 3e-5
                assert gate[sample, k] == expected, (name, sample, keypoint)
                np.testing.assert_allclose(target[sample, k], (one + other) / 2, atol=1e-9)
                passed += expected
    assert 0 < passed < 4 * sum(KEYPOINTS.values()), "a gate that is always open or closed shows nothing"


@pytest.mark.parametrize(
    ("shift", "height", "open_"), [((0, 0), 1.0, 1), ((1, 1), 1.0, 1), ((1, 2), 1.0, 0), ((0, 0), 0.49, 0)]
)
def test_both_the_distance_and_the_lower_peak_count(shift: tuple[int, int], height: float, open_: int) -> None:
    first, second = torch.zeros(1, 1, 16, 12), torch.zeros(1, 1, 16, 12)
    first[0, 0, 5, 11], second[0, 0, 5 + shift[1], 11 - shift[0]] = 1.0, height
    assert agreement(first, second, distance=1.5, floor=0.5).tolist() == [[open_]]
    assert agreement(second, first, distance=1.5, floor=0.5).tolist() == [[open_]]


def test_the_loss_is_the_mean_over_crops_of_every_decoders_error_where_the_gate_is_open() -> None:
    taught = objective(distance=8.0, floor=3e-5, weight=TeacherWeight(0.5))
    taught.model.eval()  # one set of statistics, so that the heatmaps can be had by the public call
    found = batch(COCO, UNLABELLED, 0)
    found["weight"][1] = 0.0
    _, scalars = taught(found)
    heatmaps, lessons = taught.model(normalise(found["images"])), taught.lessons(normalise(found["images"]))
    expected = 0.0
    for name, (target, gate) in lessons.items():
        error = ((heatmaps[name] - target).square().mean((2, 3)) * gate).mean(1)
        expected += float((error * found["weight"]).sum().detach()) / 3
        share = float((gate * found["weight"][:, None]).sum() / (2 * KEYPOINTS[name]))
        assert scalars[f"taught_{name}"].item() == pytest.approx(share, rel=1e-6)
    assert scalars["loss_teacher"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_people_without_keypoints_teach_through_the_teacher_alone_and_all_decoders() -> None:
    taught, crops = objective(), batch(UNLABELLED, UNLABELLED)
    whole, by_teacher = gradients(taught, crops), gradients(taught, crops, only="loss_teacher")
    assert all(torch.equal(whole[name], by_teacher[name]) for name in whole)
    assert float(taught(crops)[1]["loss_ground_truth"].detach()) == 0
    for name in KEYPOINTS:
        assert all(gradient.any() for gradient in of_decoder(whole, name)), name
    assert whole["backbone.patch_embed.proj.weight"].any()


def test_on_coco_crops_the_teacher_teaches_the_decoders_of_all_that_it_knows() -> None:
    found = gradients(objective({"coco": 17, "aic": 14}), batch(COCO, COCO))
    assert all(gradient.any() for gradient in of_decoder(found, "aic"))
    assert not any(gradient.any() for gradient in of_decoder(found, "mpii")), "the teacher has no such decoder"
    assert len(of_decoder(found, "mpii")) == len(of_decoder(found, "aic")), "ZeRO needs every gradient"


def test_a_decoder_that_the_teacher_lacks_learns_its_ground_truth() -> None:
    found = gradients(objective({"coco": 17}), batch(0, COCO))
    assert all(gradient.any() for gradient in of_decoder(found, "mpii"))


def test_ground_truth_teaches_its_own_decoder_only() -> None:
    crops = batch(COCO, 0)
    moved = {**crops, "keypoints": crops["keypoints"].clone()}
    moved["keypoints"][0] += 7
    before, after = gradients(objective(), crops), gradients(objective(), moved)
    for name in ("aic", "mpii"):
        assert all(map(torch.equal, of_decoder(before, name), of_decoder(after, name))), name
    assert not torch.equal(before["decoders.coco.final_layer.bias"], after["decoders.coco.final_layer.bias"])


def test_batch_norm_sees_its_own_dataset_and_nothing_else() -> None:
    """Statistics move as without the teacher; on other crops a decoder is normalised as at test time."""
    taught, plain, crops = objective(), build(KEYPOINTS, 0).train(), batch(COCO, COCO, UNLABELLED, 0)
    taught(crops)
    plain.forward_mixed(normalise(crops["images"]), crops["dataset"], DATASETS)
    for (name, one), (_, other) in zip(taught.model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    _, others, _ = plain.forward_everywhere(normalise(crops["images"]), crops["dataset"], DATASETS, ["coco"])
    rows, heatmaps = others["coco"]
    assert rows.tolist() == [2, 3] and all(module.training for module in plain.modules())
    torch.testing.assert_close(heatmaps, plain.eval()(normalise(crops["images"]), ["coco"])["coco"][2:])


def test_every_decoder_runs_twice_in_the_same_order_whatever_the_batch() -> None:
    taught, ran = objective(), []
    for name, decoder in taught.model.decoders.items():
        decoder.register_forward_pre_hook(lambda module, inputs, name=name: ran.append(name))
    for datasets in ((COCO, COCO), (0, 3), (UNLABELLED,)):
        taught(batch(*datasets))
    assert ran == [*KEYPOINTS, *KEYPOINTS] * 3


def test_the_teachers_weight_falls_with_the_samples_and_is_one_within_a_step() -> None:
    constant, falling = TeacherWeight(2.0), TeacherWeight(2.0, falls_over=80, step_of=8)
    weights = [float(falling.at({"position": torch.arange(start, start + 4)})) for start in (0, 4, 8, 40, 76, 80)]
    assert weights == pytest.approx([2.0, 2.0, 1.8, 1.0, 0.2, 0.0])
    assert constant.at({}) == 2.0
