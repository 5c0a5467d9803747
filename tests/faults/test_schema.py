"""Files of another version of this program are refused or ignored by rule; nothing in them is guessed.

Of a manifest and of a resume point's manifest: tests/test_artifacts.py and tests/test_checkpoint.py. Of a model
description: tests/models/test_loading.py. Of a shard index: tests/data/test_shards.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import Artifact, read_artifact
from pipeline.checkpoint import ResumePoints, verify
from pipeline.data.collection import open_shards
from pipeline.data.shard_index import ShardIndex, index_path
from pipeline.data.shards import ShardSet, shard_name, write_shard
from pipeline.distributed import World
from pipeline.errors import ArtifactError, CheckpointError, DataError
from pipeline.files import read_json, sha256, write_json
from pipeline.models.loading import read_spec
from pipeline.status import Status, read_status
from pipeline.tracking.tracker import MetricsFile
from tests.data.test_shards import samples
from tests.faults.fixtures import change_json, publish_pose, publish_shards, republish

pytestmark = pytest.mark.fault(31)

ALONE = World(0, 0, 1, torch.device("cpu"))
VERSIONS = [2, 99, 0, -1, 1.5, "1", "2", None, [], True + 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A pose model."""
    return publish_pose(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Shards."""
    return publish_shards(tmp_path_factory.mktemp("shards") / "artifact")


@pytest.mark.parametrize("version", VERSIONS)
def test_artifacts_of_another_version_are_refused(
    tmp_path: Path, model: Artifact, shards: Artifact, version: Any
) -> None:
    """The manifest, the model's description and that of shards: one line that says where."""
    other = republish(model, tmp_path / "manifest", lambda staged: None)
    change_json(other.path / "manifest.json", schema_version=version)
    with pytest.raises(ArtifactError, match=r"manifest\.json: (not a manifest|schema version)"):
        read_artifact(other.path)
    other = republish(model, tmp_path / "m", lambda staged: change_json(staged / "model.json", schema_version=version))
    with pytest.raises(ArtifactError, match=r"model\.json.*schema_version"):
        read_spec(other)
    other = republish(
        shards, tmp_path / "s", lambda staged: change_json(staged / "shards.json", schema_version=version)
    )
    with pytest.raises(ArtifactError, match=r"shards\.json.*schema_version"):
        open_shards(other)


def test_a_manifest_without_a_version_is_refused(tmp_path: Path, model: Artifact) -> None:
    """It is not taken for the first."""
    other = republish(model, tmp_path / "a", lambda staged: None)
    manifest = read_json(other.path / "manifest.json")
    del manifest["schema_version"]
    write_json(other.path / "manifest.json", manifest)
    with pytest.raises(ArtifactError, match="not a manifest"):
        read_artifact(other.path)


@pytest.mark.parametrize("version", ["2", "0", '"1"', "null"])
def test_a_shard_index_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    """One line, when the shards are opened."""
    write_shard(tmp_path / shard_name(0), samples(2))
    place = Path(index_path(tmp_path / shard_name(0)))
    whole = place.read_bytes()
    index = ShardIndex.from_bytes(whole, "x")
    import safetensors.numpy

    about = json.dumps({"schema_version": json.loads(version), "datasets": index.datasets})
    arrays = {name: value for name, value in index.__dict__.items() if name != "datasets"}
    place.write_bytes(safetensors.numpy.save(arrays, {"index": about}))
    with pytest.raises(DataError, match="schema version .*, this program reads 1"):
        ShardSet(tmp_path)


def saved(run_dir: Path, *steps: int) -> ResumePoints:
    points = ResumePoints(run_dir, ALONE)
    for step in steps:
        points.save(step, {"a": torch.ones(1)}, {}, {"hooks": {}})
    return points


def change_state(point: Path, **changes: Any) -> None:
    """Changes state.json and lets the manifest agree."""
    change_json(point / "state.json", **changes)
    record = {"sha256": sha256(point / "state.json"), "size": (point / "state.json").stat().st_size}
    manifest = read_json(point / "manifest.json")
    manifest["files"]["state.json"] = record
    write_json(point / "manifest.json", manifest)


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_a_newer_resume_point_stops_the_stage_and_stays(tmp_path: Path, file: str) -> None:
    """Falling back to an older point would lead to removing the newer one, as soon as the stage saves again."""
    points = saved(tmp_path, 4, 8)
    point = tmp_path / "resume" / "step-00000008"
    (change_state if file == "state.json" else lambda p, **c: change_json(p / file, **c))(point, schema_version=2)
    assert verify(point) is not None
    with pytest.raises(CheckpointError, match="step-00000008: written by a newer version"):
        points.newest()
    assert point.is_dir()


@pytest.mark.parametrize("changes", [{"schema_version": 0}, {"schema_version": "1"}, {"step": 7}, {"hooks": []}])
def test_a_state_that_is_not_this_points_is_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    """Of another version, another step, or another form: the point before it is taken, loudly."""
    points = saved(tmp_path, 4, 8)
    change_state(tmp_path / "resume" / "step-00000008", **changes)
    with caplog.at_level(logging.ERROR):
        assert points.newest() == tmp_path / "resume" / "step-00000004"
    assert "FALLING BACK" in caplog.text and "state.json" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '{"saved_step": []}', '{"state": 5, "new": {}}', "[" * 99999]
)
def test_a_status_file_of_another_form_is_ignored_and_replaced(tmp_path: Path, text: str) -> None:
    """It is for people and scripts: nothing depends on it but the knowledge that something was saved once."""
    (tmp_path / "status.json").write_text(text)
    assert isinstance(read_status(tmp_path), dict)
    assert ResumePoints(tmp_path, ALONE).newest() is None
    Status(tmp_path, writes=True).running(1, 2)
    assert read_status(tmp_path)["state"] == "running"


def test_metrics_of_another_form_are_left_out(tmp_path: Path) -> None:
    """A line is used if it has a time, a step, an event and numbers; what another version added to it is left alone."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    good = {"time": 1, "step": 3, "event": "train", "metrics": {"loss": 0.5}}
    lines = [good, {**good, "new": [1]}, {}, [], 5, None, {**good, "step": "3"}, {**good, "metrics": [1]}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n{torn\n" + "[" * 99999)
    assert file.read() == lines[:2]
    file.cut(3)
    assert file.read() == lines[:2]
    file.cut(2)
    assert file.read() == []
