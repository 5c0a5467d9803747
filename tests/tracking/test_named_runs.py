"""`mlflow:RUN_ID` where a user names a model, on a real server whose address has a password, which no message shows."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from launchers import inputs
from launchers.cli import app
from pipeline import graph, remote
from pipeline.artifacts import Artifact, publish, read_artifact
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.errors import ArtifactError
from pipeline.files import read_json
from stages import KINDS
from tests.faults.fixtures import FIELDS, publish_at, publish_pose
from tests.launchers.test_run_stage import MAE
from tests.mlflow_server import Server, free_port
from tests.tracking.test_tracker import config, new_run, tags, tracker


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda seconds: None))


def with_password(port: int) -> str:
    return f"http://user:secret@127.0.0.1:{port}"


def tracked(artifact: Artifact, uri: str, folder: Path, fingerprint: str) -> str:
    """The run of an artifact that MLflow gets; here it is gone afterwards."""
    run_dir = new_run(folder)
    artifact.path.rename(run_dir / "artifact")
    run = tracker(config(folder, uri, "named"), run_dir, tags=tags(fingerprint))
    run.start(0)
    run.finish("FINISHED", run_dir / "artifact")
    assert run.run_id is not None
    shutil.rmtree(run_dir)
    return run.run_id


def predicted(artifact: str, image: Path, out: Path, *options: str) -> tuple[Any, str]:
    result = CliRunner().invoke(app, ["predict", artifact, str(image), "--out", str(out), *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return read_json(out / "keypoints.json"), result.output


def test_predict_takes_a_model_from_mlflow(
    tmp_path: Path, mlflow_server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = publish_pose(tmp_path / "model")
    image, uri = tmp_path / "one.jpg", with_password(mlflow_server.port)
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8))
    expected, _ = predicted(str(model.path), image, tmp_path / "local")
    run_id = tracked(model, uri, tmp_path, "f")
    found, said = predicted(f"mlflow:{run_id}", image, tmp_path / "out", "--tracking-uri", uri)
    assert found == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert predicted(f"mlflow:{run_id}", image, tmp_path / "again")[0] == expected
    assert "secret" not in said + caplog.text


@pytest.mark.parametrize(("served", "reason"), [(True, "not found"), (False, "127.0.0.1")])
def test_a_model_that_is_not_to_be_had_is_one_line_without_the_password(
    tmp_path: Path, mlflow_server: Server, caplog: pytest.LogCaptureFixture, served: bool, reason: str
) -> None:
    uri = with_password(mlflow_server.port if served else free_port())
    result = CliRunner().invoke(app, ["predict", f"mlflow:{'0' * 32}", "one.jpg", "--tracking-uri", uri])
    said = str(result.exception)
    assert isinstance(result.exception, ArtifactError) and reason in said
    assert said.startswith(f"mlflow:{'0' * 32}: not to be had from http://***@127.0.0.1:")
    assert "secret" not in said + result.output + caplog.text


def pipeline_of(folder: Path, workspace: str, uri: str, **inputs: str) -> PipelineConfig:
    """A stage `last` that starts from what `inputs` says, and the stage `mae` before it; their shards are there."""
    shards = folder / "shards"
    if not shards.exists():
        publish_at(shards, lambda staged: (staged / "payload").touch())
    first = {**MAE, "inputs": {"shards": str(shards)}}
    stages = {"mae": first, "last": {**first, "inputs": {"shards": str(shards), **inputs}}}
    (folder / "named.yaml").write_text(yaml.safe_dump({"name": "named", "stages": stages}))
    words = [f"workspace={folder / workspace}", f"tracking.uri={uri}"]
    return load_pipeline(str(folder / "named.yaml"), words, KINDS)


def test_a_stage_fetches_the_run_that_it_names(
    tmp_path: Path, mlflow_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    uri = with_password(mlflow_server.port)
    model = publish_pose(tmp_path / "model")
    run_id = tracked(model, uri, tmp_path, "f")
    pipeline = pipeline_of(tmp_path, "here", uri, init=f"mlflow:{run_id}")
    assert graph.plan(pipeline)["last"].state == "waiting"
    stage = inputs.ready(pipeline, "last", "named.yaml", [], fresh=False)
    fetched = read_artifact(graph.fetched(pipeline, run_id) / "artifact")
    fetched.verify()
    assert (stage.state, stage.inputs["init"].path) == ("start", fetched.path)
    assert fetched.digest == model.digest == stage.inputs["init"].digest
    assert f"mlflow:{run_id}: fetched from http://***@127.0.0.1:{mlflow_server.port}" in caplog.text
    missing = pipeline_of(tmp_path, "here", uri, init=f"mlflow:{'0' * 32}")
    with pytest.raises(ArtifactError, match=f"mlflow:{'0' * 32}: not to be had from .*not found") as caught:
        inputs.ready(missing, "last", "named.yaml", [], fresh=False)
    assert "secret" not in caplog.text + str(caught.value)


def test_a_stage_that_ended_on_another_machine_is_fetched_by_its_fingerprint(
    tmp_path: Path, mlflow_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    uri = with_password(mlflow_server.port)
    fingerprint = graph.plan(pipeline_of(tmp_path, "there", uri, init="mae"))["mae"].fingerprint
    assert fingerprint is not None
    staged = tmp_path / ".staged"
    staged.mkdir()
    (staged / "payload").write_bytes(b"weights")
    made = publish(staged, tmp_path / "made", **FIELDS | {"fingerprint": fingerprint})
    tracked(made, uri, tmp_path, fingerprint)
    here = pipeline_of(tmp_path, "here", uri, init="mae")
    stage = inputs.ready(here, "last", "named.yaml", [], fresh=False)
    assert (stage.state, stage.inputs["init"].digest) == ("start", made.digest)
    fetched = graph.plan(here)["mae"].artifact
    fetched.verify()
    assert (fetched.path / "payload").read_bytes() == b"weights"
    assert f"mae: fetched from MLflow at http://***@127.0.0.1:{mlflow_server.port}" in caplog.text

    away = pipeline_of(tmp_path, "away", with_password(free_port()), init="mae")
    with pytest.raises(ArtifactError, match="stage 'last' needs the artifact of 'mae'"):
        inputs.ready(away, "last", "named.yaml", [], fresh=False)
    assert "has no help" in caplog.text and "secret" not in caplog.text
