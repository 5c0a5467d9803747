"""Stage kind `distill`, in this process: the controls differ in the token alone, and crops without keypoints train."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pipeline.artifacts import Artifact, read_artifact
from pipeline.config_file import load_pipeline
from pipeline.data.definitions import DatasetSource
from pipeline.distributed import World, leave_process_group
from pipeline.errors import ConfigError
from pipeline.models.loading import load_pose
from pipeline.models.pose import PoseModel
from pipeline.objectives import TeacherWeight
from pipeline.pose_training import PoseSetup
from stages import KINDS, distill
from tests.chain.running import metrics
from tests.faults.fixtures import BACKBONE, DECODER, context, publish_pose, publish_shards, publish_token

PEOPLE = DatasetSource(
    name="people", annotations="coco/annotations/person_keypoints_train2017.json", images="coco/train2017"
)


class Begun(Exception):
    """Training would start now."""


class NeverAsked:
    """Nobody asks this stage to stop."""

    def agreed(self, world: World) -> bool:
        return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Shards of COCO, and with people without keypoints; a teacher of COCO and its token."""
    folder = tmp_path_factory.mktemp("shared")
    teacher = publish_pose(folder / "teacher")
    generator = torch.Generator().manual_seed(0)
    return {
        "shards": publish_shards(folder / "shards"),
        "unlabelled": publish_shards(folder / "people", datasets=[PEOPLE]),
        "mixed": publish_shards(folder / "mixed", datasets=[DatasetSource(name="coco"), PEOPLE]),
        "teacher": teacher,
        "token": publish_token(folder / "token", teacher.digest, torch.randn(1, 2, 32, generator=generator)),
    }


def section(shared: dict[str, Artifact], inputs: dict[str, str], **terms: Any) -> dict[str, Any]:
    """A distill stage with a student of width 16; inputs by role, as names of shared artifacts."""
    backbone = {"width": 16, "depth": 1, "heads": 2, **{key: value for key, value in BACKBONE.items() if key != "size"}}
    return {
        "kind": "distill",
        "inputs": {role: str(shared[name].path) for role, name in inputs.items()},
        "distillation": terms,
        "model": {"backbone": {**backbone, "drop_path": 0.1}, "decoder": DECODER},
        "steps": 4,
        "global_batch_size": 4,
        "optimizer": {"lr": 1e-3, "layer_decay": 0.9, "weight_decay": 0.1},
    }


def begin(folder: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[PoseModel, Any, Tensor]:
    """The student, the objective and the random state as training starts."""
    found: list[Any] = []

    def train(setup: PoseSetup, objective: Any, model: PoseModel) -> None:
        found.extend([model, objective, torch.get_rng_state()])
        raise Begun

    monkeypatch.setattr(PoseSetup, "train", train)
    folder.mkdir()
    opened = context(folder, stage)
    with pytest.raises(Begun):
        distill.run(opened, opened.plan.config)
    return found[0], found[1], found[2]


SHARDS = {"shards": "shards"}
FITTED = {**SHARDS, "teacher": "teacher", "token": "token"}
STUDENTS: dict[str, tuple[dict[str, str], dict[str, Any], int]] = {
    "fitted": (FITTED, {}, 2),
    "random": (FITTED, {"token_source": "random"}, 2),
    "learned": (FITTED, {"token_source": "learned"}, 2),
    "truncated": (FITTED, {"bridge": "truncate"}, 2),
    "random without a fitted one": ({**SHARDS, "teacher": "teacher"}, {"token_source": "random"}, 1),
    "learned without a teacher": (SHARDS, {"token_source": "learned"}, 1),
}


def test_students_differ_in_the_token_and_in_nothing_else(
    tmp_path: Path, shared: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other weight, every buffer and the random state are equal bit for bit, with the student without a token."""
    plain, _, random = begin(tmp_path / "plain", section(shared, SHARDS), monkeypatch)
    tokens = {}
    for name, (inputs, terms, count) in STUDENTS.items():
        stage = section(shared, inputs, token=True, **terms)
        student, _, state = begin(tmp_path / name.replace(" ", "_"), stage, monkeypatch)
        tensors = student.state_dict()
        tokens[name] = tensors.pop("knowledge_token")
        assert tensors.keys() == plain.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in plain.state_dict().items()), name
        assert torch.equal(state, random), name
        trained = {key for key, _ in student.named_parameters()} - {key for key, _ in plain.named_parameters()}
        assert trained == ({"knowledge_token"} if name.startswith("learned") else set()), name
        assert tokens[name].shape == (1, count, 16)
    size = tokens["fitted"].square().mean().sqrt().item()
    for name in ("random", "learned"):
        assert tokens[name].square().mean().sqrt().item() == pytest.approx(size, rel=0.35), name
    distinct = [value for value in tokens.values() if value.shape[1] == 2]
    assert all(not torch.allclose(one, other) for one in distinct for other in distinct if one is not other)


def test_the_teachers_weight_falls_over_the_stages_samples(
    tmp_path: Path, shared: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"output": True, "output_weight": 0.5, "output_decay": "linear"}
    stage = section(shared, {**SHARDS, "teacher": "teacher"}, **terms)
    _, objective, _ = begin(tmp_path / "falling", stage, monkeypatch)
    assert objective.weight == TeacherWeight(0.5, falls_over=16, step_of=4)


@pytest.mark.parametrize(
    ("shards", "terms", "said"),
    [
        ("mixed", {}, "the shards hold 'people', people without keypoints"),
        ("mixed", {"output": True}, r"distillation\.every_skeleton"),
        ("unlabelled", {"every_skeleton": {}}, "people without keypoints only"),
    ],
)
def test_people_without_keypoints_need_somebody_who_teaches_them(
    tmp_path: Path, shared: dict[str, Artifact], shards: str, terms: dict[str, Any], said: str
) -> None:
    opened = context(tmp_path, section(shared, {"shards": shards, "teacher": "teacher"}, **terms))
    with pytest.raises(ConfigError, match=said) as caught:
        distill.run(opened, opened.plan.config)
    assert "\n" not in str(caught.value)


def pipeline_file(folder: Path, shared: dict[str, Artifact], datasets: list[str], terms: dict[str, Any]) -> Path:
    """A pipeline that makes its shards itself."""
    stage = section(shared, {"shards": "shards", "teacher": "teacher"}, **terms)
    stage["inputs"]["shards"] = "crops"
    crops = {"kind": "shards", "inputs": {"data": str(folder)}, "datasets": datasets}
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "stages": {"crops": crops, "one": stage}}))
    return file


@pytest.mark.parametrize(
    ("datasets", "terms", "said"),
    [
        (["coco", "people"], {"output": True}, "holds 'people', people without keypoints"),
        (["people"], {"every_skeleton": {}}, "people without keypoints only"),
    ],
)
def test_the_pipeline_file_is_refused_before_any_shard_is_made(
    tmp_path: Path, shared: dict[str, Artifact], datasets: list[str], terms: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_pipeline(pipeline_file(tmp_path, shared, datasets, terms), [], KINDS)
    assert "\n" not in str(caught.value)


def test_a_dry_run_shows_the_student_that_learns_from_people_without_keypoints(
    tmp_path: Path, shared: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its decoders are those of the datasets with keypoints."""
    from launchers.dry_run import print_dry_run

    file = pipeline_file(tmp_path, shared, ["coco", "people"], {"every_skeleton": {"floor": 0.3}})
    print_dry_run(load_pipeline(file, [f"workspace={tmp_path / 'workspace'}"], KINDS))
    printed = capsys.readouterr().out
    assert "one" in printed and "4 = 4 x 1 x 1" in printed


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, gone afterwards with everything that it put into the environment."""
    from pipeline.process_group import start_process_group

    before = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    start_process_group(World(0, 0, 1, torch.device("cpu")))
    yield
    leave_process_group()
    os.environ.clear()
    os.environ |= before


def test_crops_without_keypoints_train_a_student_with_a_learned_token(
    tmp_path: Path, shared: dict[str, Artifact], alone: None
) -> None:
    """The stage from its shards to its artifact: the token moved, is published, and loads as any other."""
    inputs = {**FITTED, "shards": "mixed"}
    terms = {"token": True, "token_source": "learned", "every_skeleton": {"floor": 1e-9, "agreement": 30}}
    stage = section(shared, inputs, **terms)
    opened = dataclasses.replace(context(tmp_path, stage), stop=NeverAsked())
    opened.heartbeat.start("a test")
    distill.run(opened, opened.plan.config)
    opened.heartbeat.stop()
    student, spec = load_pose(read_artifact(opened.run_dir / "artifact"))
    assert list(spec.datasets) == ["coco"] and spec.config.knowledge_tokens == 2
    lines = metrics(opened.run_dir)
    assert all(0 < line["taught_coco"] <= 1 and line["loss_teacher"] > 0 for line in lines) and lines
    teacher = load_pose(shared["teacher"])[1]
    started = distill._token(opened, opened.plan.config, teacher)
    assert student.knowledge_token is not None and not torch.equal(student.knowledge_token, started)
    assert "knowledge_token" not in dict(student.named_parameters())
