"""Artifacts that do not belong together are refused before training starts, with both sides named."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError, ConfigError
from stages import module_of
from tests.faults.fixtures import (
    BACKBONE,
    DECODER,
    change_json,
    context,
    pose_spec,
    publish_pose,
    publish_shards,
    publish_token,
    republish,
)

pytestmark = pytest.mark.fault(26)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Shards, and a teacher of width 32."""
    folder = tmp_path_factory.mktemp("shared")
    teacher = publish_pose(folder / "teacher")
    return {"shards": publish_shards(folder / "shards"), "teacher": teacher}


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a refusal comes too late."""
    import pipeline.pose_training
    import pipeline.training

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("training started")

    monkeypatch.setattr(pipeline.training, "train", started)
    monkeypatch.setattr(pipeline.pose_training, "train", started)


def distill(shared: dict[str, Artifact], **inputs: Artifact) -> dict[str, Any]:
    """A distill stage with a student of width 16."""
    paths = {name: str(artifact.path) for name, artifact in {"shards": shared["shards"], **inputs}.items()}
    backbone = {"width": 16, "depth": 1, "heads": 2, **{key: value for key, value in BACKBONE.items() if key != "size"}}
    return {
        "kind": "distill",
        "inputs": paths,
        "distillation": {"output": "teacher" in inputs, "token": "token" in inputs},
        "model": {"backbone": backbone, "decoder": DECODER},
        "steps": 1,
        "global_batch_size": 2,
        "optimizer": {"lr": 1e-3},
    }


def refused(
    folder: Path, stage: dict[str, Any], kind: type[Exception] | tuple[type[Exception], ...], said: str
) -> None:
    """The stage's `run` ends in one line, before training, with nothing published."""
    found = context(folder, stage)
    with pytest.raises(kind, match=said) as caught:
        module_of(stage["kind"]).run(found, found.plan.config)
    assert "\n" not in str(caught.value)
    assert not (found.run_dir / "artifact").exists() and not (found.run_dir / "resume").exists()


def test_what_belongs_together_is_let_through(tmp_path: Path, shared: dict[str, Artifact]) -> None:
    """The refusals below are of what was changed and of nothing else: the sound pair reaches training."""
    token = publish_token(tmp_path / "token", shared["teacher"].digest, torch.ones(1, 1, 32))
    found = context(tmp_path, distill(shared, teacher=shared["teacher"], token=token))
    with pytest.raises(BaseException, match="training started"):
        module_of("distill").run(found, found.plan.config)


TOKENS = {
    "of another width than its teacher": (torch.ones(1, 1, 24), {}),
    "described with another width": (torch.ones(1, 1, 24), {"width": 32}),
    "with another number of tokens than described": (torch.ones(1, 2, 32), {"tokens": 1}),
    "without its first dimension": (torch.ones(1, 32), {"tokens": 1}),
    "with a fourth dimension": (torch.ones(1, 1, 32, 1), {"width": 32}),
    "that is not finite": (torch.full((1, 1, 32), float("nan")), {}),
    "of another teacher": (torch.ones(1, 1, 32), {"teacher": "d" * 64}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_does_not_fit_its_teacher_is_refused(
    tmp_path: Path, shared: dict[str, Artifact], name: str
) -> None:
    """Width, number, values and the teacher's digest: all must be the teacher's, and the message says what was found."""
    tensor, described = TOKENS[name]
    token = publish_token(tmp_path / "token", **{"teacher": shared["teacher"].digest, "token": tensor, **described})
    said = "was fitted on dddddddddddd, not on" if "teacher" in described else "expected a finite token"
    refused(tmp_path, distill(shared, teacher=shared["teacher"], token=token), ArtifactError, said)


def test_a_model_in_the_place_of_a_token_and_the_other_way_round(tmp_path: Path, shared: dict[str, Artifact]) -> None:
    """A kind of artifact is not taken for another."""
    teacher = shared["teacher"]
    refused(tmp_path, distill(shared, teacher=teacher, token=teacher), ArtifactError, "expected a knowledge token")
    token = publish_token(tmp_path / "token", teacher.digest, torch.ones(1, 1, 32))
    refused(tmp_path, distill(shared, teacher=token), ArtifactError, "expected a pose model")
    refused(tmp_path, distill(shared, teacher=shared["shards"]), ArtifactError, r"without 'model\.json'")


def test_a_teacher_of_other_keypoints_datasets_or_codec_is_refused(tmp_path: Path, shared: dict[str, Artifact]) -> None:
    """What the teacher's heatmaps mean must be what the student's mean."""
    sound = pose_spec()
    coco = sound.datasets["coco"]
    renamed = coco.model_copy(update={"keypoints": (*coco.keypoints[1:], coco.keypoints[0])})
    specs = {
        "different keypoints": sound.model_copy(update={"datasets": {"coco": renamed}}),
        "no decoder for any of coco": sound.model_copy(update={"datasets": {"mpii": coco}}),
        "differ in input_size": pose_spec(image_size=[96, 72]),
    }
    for number, (said, spec) in enumerate(specs.items()):
        teacher = publish_pose(tmp_path / f"teacher{number}", spec)
        refused(tmp_path, distill(shared, teacher=teacher), ConfigError, said)


def test_a_token_is_not_fitted_on_a_teacher_of_other_data(tmp_path: Path, shared: dict[str, Artifact]) -> None:
    """The token stage checks its teacher against the shards in the same way."""
    coco = pose_spec().datasets["coco"]
    teacher = publish_pose(tmp_path / "teacher", pose_spec().model_copy(update={"datasets": {"mpii": coco}}))
    stage = {
        "kind": "token",
        "inputs": {"shards": str(shared["shards"].path), "teacher": str(teacher.path)},
        "steps": 1,
        "global_batch_size": 2,
        "optimizer": {"lr": 0.1},
    }
    refused(tmp_path, stage, ConfigError, "the teacher has no decoder")


def test_a_backbone_of_another_width_does_not_initialise_a_student(tmp_path: Path, shared: dict[str, Artifact]) -> None:
    """By the settings that differ: no tensor is read."""
    refused(tmp_path, distill(shared, init=shared["teacher"]), ArtifactError, "width 32 instead of 16")


@pytest.mark.parametrize("huge", [{"width": 65_536, "mlp_width": 262_144, "heads": 1}, {"depth": 900}])
def test_a_description_that_promises_more_than_the_weights_costs_no_memory(
    tmp_path: Path, shared: dict[str, Artifact], huge: dict[str, int]
) -> None:
    """A small file that describes a model of terabytes is refused by comparing shapes, before memory is taken."""
    import resource

    spec = pose_spec()
    config = spec.model_dump(mode="json")["config"]
    config["backbone"] |= huge

    teacher = republish(
        shared["teacher"], tmp_path / "t", lambda staged: change_json(staged / "model.json", config=config)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path, distill(shared, teacher=teacher), ArtifactError, "the weights do not fit the model")
    assert sys.platform != "linux" or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
