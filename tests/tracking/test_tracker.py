"""Tracking: the local file is the truth; MLflow gets every line once, also late."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Artifact, publish, read_artifact
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.files import read_json
from pipeline.tracking.download import download
from pipeline.tracking.metrics_file import MetricsFile
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.tracker import Tracker, is_synced, sync, tracking_uri
from stages import KINDS
from tests.mlflow_server import Proxy, Server

PARAMETERS = {"seed": 0, "optimizer.lr": 0.001}
DATASETS = [{"name": "shards: shards", "digest": "d" * 64, "source": "/somewhere/artifact"}]


def config(workspace: Path, uri: str | None, name: str = "trial") -> PipelineConfig:
    given = "null" if uri is None else uri
    return load_pipeline("demo", [f"workspace={workspace}", f"tracking.uri={given}", f"name={name}"], KINDS)


def tags(fingerprint: str = "f" * 64) -> dict[str, str]:
    return {"fingerprint": fingerprint, "stage": "mae", "kind": "mae", "parent.shards": "d" * 64}


def new_run(folder: Path) -> Path:
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    return run_dir


def publish_in(run_dir: Path, fingerprint: str = "f" * 64, weights: bytes = b"weights") -> Artifact:
    staged = run_dir / ".artifact"
    (staged / "pictures").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(weights * 1000)
    (staged / "pictures" / "a.jpg").write_bytes(b"picture")
    return publish(
        staged,
        run_dir / "artifact",
        pipeline="trial",
        stage="mae",
        kind="mae",
        fingerprint=fingerprint,
        config={},
        parents={},
        metrics={},
        licences=[],
    )


def tracker(pipeline: PipelineConfig, run_dir: Path, **changes: Any) -> Tracker:
    given = {"tags": tags(), "parameters": PARAMETERS, "datasets": DATASETS, **changes}
    return Tracker(pipeline, run_dir, "mae", given["tags"], given["parameters"], given["datasets"])


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float, int]]:
    points = client.get_metric_history(run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


@pytest.fixture
def store(mlflow_server: Server) -> str:
    """A sqlite store, the server's; making one takes seconds, so all tests share it under experiments of their own."""
    return mlflow_server.store


@pytest.fixture
def client(store: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(store)


def test_each_line_is_at_once_on_disk_with_its_time(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    before = int(time.time() * 1000)
    file.append("train", 1, {"loss": 0.5})
    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (line["event"], line["step"], line["metrics"]) == ("train", 1, {"loss": 0.5})
    assert before <= line["time"] <= int(time.time() * 1000)


def test_a_torn_last_line_is_left_out_and_goes_on_resume(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append("train", step, {"loss": step})
    whole = file.path.read_text()
    file.path.write_text(whole + '{"time": 1, "step": 3, "ev')
    assert [line["step"] for line in file.read()] == [1, 2]
    file.cut(2)
    assert file.path.read_text() == whole
    file.append("train", 3, {"loss": 3})
    assert [line["step"] for line in file.read()] == [1, 2, 3]


def test_the_file_is_cut_to_the_resume_step(tmp_path: Path) -> None:
    local = tracker(config(tmp_path, None), tmp_path)
    local.start(0)
    for step in (1, 2, 3, 4):
        local.log("train", step, {"loss": step})
    local.log("evaluation", 4, {"AP": 1})
    resumed = tracker(config(tmp_path, None), tmp_path)
    resumed.start(2)
    resumed.log("train", 3, {"loss": 30})
    lines = MetricsFile(tmp_path / "metrics.jsonl").read()
    assert [(line["step"], line["metrics"]["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    assert resumed.run_id is None
    resumed.finish("FINISHED")


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.cut(5)
    assert file.read() == [] and not file.path.exists()


def test_a_rank_without_a_run_directory_writes_nothing(tmp_path: Path) -> None:
    silent = Tracker(config(tmp_path, "auto"), None, "mae", tags(), PARAMETERS, DATASETS)
    silent.start(0)
    silent.log("train", 1, {"loss": 1})
    silent.finish("FINISHED")
    assert not list(tmp_path.iterdir())


def test_the_address_is_a_sqlite_file_unless_told_otherwise(tmp_path: Path) -> None:
    assert tracking_uri(config(tmp_path, "auto")) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert tracking_uri(config(tmp_path, None)) is None
    assert tracking_uri(config(tmp_path, "http://host:1")) == "http://host:1"


def test_mlflow_gets_every_line_with_its_recorded_time_and_step(tmp_path: Path, store: str, client: Any) -> None:
    run_dir = new_run(tmp_path)
    started = tracker(config(tmp_path, store, "first"), run_dir)
    started.start(0)
    started.log("train", 1, {"loss": 0.5, "AP of mine (flip)": 7})
    time.sleep(0.02)
    started.log("train", 2, {"loss": 0.25})
    started.log("evaluation", 2, {"loss_on_val": 0.75})
    artifact = publish_in(run_dir)
    started.finish("FINISHED", artifact.path)

    run = client.get_run(started.run_id)
    times = {(line["event"], line["step"]): line["time"] for line in MetricsFile(run_dir / "metrics.jsonl").read()}
    assert history(client, run.info.run_id, "loss") == [(1, 0.5, times["train", 1]), (2, 0.25, times["train", 2])]
    assert history(client, run.info.run_id, "loss_on_val") == [(2, 0.75, times["evaluation", 2])]
    assert history(client, run.info.run_id, "AP of mine _flip_")[0][:2] == (1, 7)
    assert run.info.status == "FINISHED" and run.info.run_name == "mae"
    assert run.data.params == {"seed": "0", "optimizer.lr": "0.001"}
    assert tags().items() <= run.data.tags.items()
    [given] = run.inputs.dataset_inputs
    assert given.dataset.name == "shards: shards" and given.dataset.digest == "d" * 36

    experiment = client.get_experiment_by_name("first").experiment_id
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert run.info.experiment_id == parent.info.experiment_id == experiment and parent.info.run_name == "first"
    assert {file.path for file in client.list_artifacts(run.info.run_id, "artifact")} == {
        "artifact/manifest.json",
        "artifact/model.safetensors",
        "artifact/pictures",
    }
    assert Mirror.is_complete(run_dir) and is_synced(config(tmp_path, store, "first"), run_dir)


def test_a_resumed_stage_goes_on_in_its_run_and_repeats_nothing(tmp_path: Path, store: str, client: Any) -> None:
    pipeline, run_dir = config(tmp_path, store, "second"), new_run(tmp_path)
    killed = tracker(pipeline, run_dir)
    killed.start(0)
    for step in (1, 2, 3):
        killed.log("train", step, {"loss": step})
    killed.finish("KILLED")
    assert client.get_run(killed.run_id).info.status == "KILLED" and not Mirror.is_complete(run_dir)

    resumed = tracker(pipeline, run_dir)
    resumed.start(2)
    for step in (3, 4):
        resumed.log("train", step, {"loss": step * 10})
    resumed.finish("FINISHED")
    assert resumed.run_id == killed.run_id
    points = history(client, resumed.run_id, "loss")
    assert [point[:2] for point in points] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    run = client.get_run(resumed.run_id)
    assert run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 1
    children = client.search_runs([run.info.experiment_id], "tags.stage = 'mae'")
    assert len(children) == 1
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_two_stages_share_the_run_of_their_pipeline(tmp_path: Path, store: str, client: Any) -> None:
    runs = []
    for stage in ("one", "two"):
        run_dir = new_run(tmp_path / stage)
        stage_tracker = tracker(config(tmp_path, store, "third"), run_dir)
        stage_tracker.start(0)
        stage_tracker.finish("FAILED")
        runs.append(client.get_run(stage_tracker.run_id))
    assert runs[0].data.tags["mlflow.parentRunId"] == runs[1].data.tags["mlflow.parentRunId"]
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
    assert not is_synced(config(tmp_path, store, "third"), tmp_path / "one" / "run")


def test_another_server_gets_a_run_of_its_own_with_every_line(tmp_path: Path, store: str, client: Any) -> None:
    from mlflow.tracking import MlflowClient

    run_dir, other = new_run(tmp_path), f"sqlite:///{tmp_path / 'other.db'}"
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "other.db")
    first = tracker(config(tmp_path, store, "fourth"), run_dir)
    first.start(0)
    first.log("train", 1, {"loss": 1})
    first.finish("KILLED")
    second = tracker(config(tmp_path, other, "fourth"), run_dir)
    second.start(1)
    second.log("train", 2, {"loss": 2})
    second.finish("FINISHED")
    assert second.run_id != first.run_id
    assert [point[0] for point in history(MlflowClient(other), second.run_id, "loss")] == [1, 2]
    assert [point[0] for point in history(client, first.run_id, "loss")] == [1]


def test_a_server_that_was_down_gets_everything_later_and_serves_the_artifact(
    tmp_path: Path, mlflow_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults 16: down at the start."""
    from mlflow.tracking import MlflowClient

    server = Proxy(mlflow_server)
    uri = server.uri
    pipeline, run_dir = config(tmp_path, uri, "down"), new_run(tmp_path)
    given = tags("a" * 64)
    alone = tracker(pipeline, run_dir, tags=given)
    alone.start(0)
    slowest = 0.0
    for step in range(1, 41):
        before = time.monotonic()
        alone.log("train", step, {"loss": 1 / step})
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 1.0, "logging waited for the server"
    artifact = publish_in(run_dir, "a" * 64)
    before = time.monotonic()
    alone.finish("FINISHED", artifact.path)
    assert time.monotonic() - before < 15
    assert not is_synced(pipeline, run_dir) and alone.run_id is None
    assert "did not take everything" in caplog.text
    assert len(MetricsFile(run_dir / "metrics.jsonl").read()) == 40

    server.start()
    sync(pipeline, run_dir, "mae", given, PARAMETERS, DATASETS)
    assert is_synced(pipeline, run_dir)
    client = MlflowClient(uri)
    run = client.get_run(read_json(run_dir / "mlflow.json")["run_id"])
    lines = MetricsFile(run_dir / "metrics.jsonl").read()
    expected = [(line["step"], line["metrics"]["loss"], line["time"]) for line in lines]
    assert history(client, run.info.run_id, "loss") == expected
    assert run.data.params == {"seed": "0", "optimizer.lr": "0.001"} and len(run.inputs.dataset_inputs) == 1
    assert run.info.status == "FINISHED"
    sync(pipeline, run_dir, "mae", given, PARAMETERS, DATASETS)
    assert len(history(client, run.info.run_id, "loss")) == 40

    assert download(uri, tmp_path / "fetched", fingerprint="a" * 64)
    fetched = read_artifact(tmp_path / "fetched" / "artifact")
    fetched.verify()
    assert fetched.digest == artifact.digest
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == {"artifact", "mlflow.json"}
    assert download(uri, tmp_path / "by_id", run_id=run.info.run_id)
    assert read_artifact(tmp_path / "by_id" / "artifact").manifest == artifact.manifest
    assert not download(uri, tmp_path / "none", fingerprint="e" * 64)
    assert not (tmp_path / "none").exists()
