"""Faults of MLflow: training goes on, and every metric arrives exactly once. The servers, answers and losses are real."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.errors import ArtifactError
from pipeline.files import read_json
from pipeline.tracking import mirror
from pipeline.tracking.download import download
from pipeline.tracking.metrics_file import MetricsFile, MetricsReader
from pipeline.tracking.tracker import Tracker, is_synced, sync
from tests.mlflow_server import Proxy, Server
from tests.tracking.test_tracker import DATASETS, PARAMETERS, config, new_run, publish_in, tags, tracker


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(mirror, "_LAST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(mirror, "_LONGEST_PAUSE_SECONDS", 0.4)


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[Proxy]:
    proxy = Proxy(mlflow_server)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def client(mlflow_server: Server) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(mlflow_server.store)


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def log(to: Tracker, steps: range, scale: float = 1.0) -> float:
    """Logs a loss at each step. Returns the longest time that one took, in seconds."""
    slowest = 0.0
    for step in steps:
        before = time.monotonic()
        to.log("train", step, {"loss": step * scale, "lr": 0.1})
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.002)  # another time stamp
    return slowest


def sent(run_dir: Path) -> int:
    state = run_dir / "mlflow.json"
    return read_json(state)["sent"].get("train", 0) if state.is_file() else 0


def assert_each_line_once(client: Any, run_id: str | None, run_dir: Path) -> None:
    for key in ("loss", "lr"):
        points = client.get_metric_history(run_id, key)
        lines = MetricsFile(run_dir / "metrics.jsonl").read()
        expected = [(line["step"], line["metrics"][key], line["time"]) for line in lines]
        assert sorted((point.step, point.value, point.timestamp) for point in points) == expected


def only_run(client: Any, name: str) -> Any:
    """The one stage's run of an experiment."""
    [run] = client.search_runs([client.get_experiment_by_name(name).experiment_id], "tags.stage = 'mae'")
    return run


@pytest.mark.fault(16)
def test_a_server_that_dies_in_the_middle_delays_metrics_and_nothing_else(
    tmp_path: Path, proxy: Proxy, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 16."""
    caplog.set_level("INFO")
    run_dir = new_run(tmp_path)
    stage = tracker(config(tmp_path, proxy.uri, "dies"), run_dir)
    stage.start(0)
    log(stage, range(1, 11))
    until(lambda: sent(run_dir) == 10)
    proxy.stop()
    assert log(stage, range(11, 21)) < 1.0
    until(lambda: "metrics stay in" in caplog.text)
    proxy.fault = lambda path: None
    proxy.start()
    until(lambda: sent(run_dir) == 20)
    until(lambda: "is back" in caplog.text)
    log(stage, range(21, 31))
    stage.finish("FINISHED", publish_in(run_dir).path)
    assert is_synced(config(tmp_path, proxy.uri, "dies"), run_dir)
    assert_each_line_once(client, stage.run_id, run_dir)


@pytest.mark.fault(16)
def test_answers_that_are_lost_double_no_run_and_no_metric(tmp_path: Path, proxy: Proxy, client: Any) -> None:
    """Fault 16: each kind of request is done by the server the first time, but the answer does not arrive."""
    lost: set[str] = set()

    def lose_the_first(path: str) -> str | None:
        kind = path.split("?")[0]
        if "/artifacts" in kind or kind in lost:
            return None
        lost.add(kind)
        return "lost"

    proxy.fault = lose_the_first
    run_dir = new_run(tmp_path)
    stage = tracker(config(tmp_path, proxy.uri, "lost"), run_dir)
    stage.start(0)
    log(stage, range(1, 11))
    until(lambda: sent(run_dir) == 10)
    log(stage, range(11, 21))
    stage.finish("FINISHED", publish_in(run_dir).path)
    sync(config(tmp_path, proxy.uri, "lost"), run_dir, "mae", tags(), PARAMETERS, DATASETS)  # what three attempts left
    assert {path.rsplit("/", 1)[-1] for path in lost} >= {
        "create",
        "log-batch",
        "update",
        "get",
        "search",
        "log-inputs",
    }
    run = only_run(client, "lost")
    assert run.info.run_id == stage.run_id and run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 2, "the pipeline's run was made twice"
    assert_each_line_once(client, stage.run_id, run_dir)


@pytest.mark.fault(16)
def test_lines_that_are_written_again_after_a_lost_answer_and_a_kill_arrive_once(
    tmp_path: Path, proxy: Proxy, client: Any
) -> None:
    """Faults 16 and 17: MLflow tells equal points apart by their times, which differ in the resumed run."""
    run_dir = new_run(tmp_path)
    pipeline = config(tmp_path, proxy.uri, "rewritten")
    killed = tracker(pipeline, run_dir)
    killed.start(0)
    log(killed, range(1, 4))
    until(lambda: sent(run_dir) == 3)
    arrived: list[str] = []

    def lose_a_batch_then_all(path: str) -> str:
        if path.endswith("log-batch") and not arrived:
            arrived.append(path)
            return "lost"
        return "refused"

    proxy.fault = lose_a_batch_then_all
    log(killed, range(4, 9))
    until(lambda: arrived)
    killed.finish("KILLED")
    assert sent(run_dir) == 3
    doubtful = max(point.step for point in client.get_metric_history(killed.run_id, "loss"))
    assert doubtful > 3

    proxy.fault = lambda path: None
    resumed = tracker(pipeline, run_dir)
    resumed.start(3)
    log(resumed, range(4, 13), scale=10)
    resumed.finish("FINISHED", publish_in(run_dir).path)
    assert resumed.run_id == killed.run_id
    points = {}
    for point in client.get_metric_history(resumed.run_id, "loss"):
        assert point.step not in points, "a step arrived twice"
        points[point.step] = point.value
    assert points == {step: step * (1 if step <= doubtful else 10) for step in range(1, 13)}


@pytest.mark.fault(16)
def test_a_server_that_answers_500_is_tried_again(tmp_path: Path, proxy: Proxy, client: Any) -> None:
    """Fault 16."""
    count = iter(range(1000))
    proxy.fault = lambda path: "500" if next(count) % 3 else None
    run_dir = new_run(tmp_path)
    stage = tracker(config(tmp_path, proxy.uri, "fails"), run_dir)
    stage.start(0)
    assert log(stage, range(1, 11)) < 1.0
    until(lambda: proxy.requests[8:])
    proxy.fault = lambda path: None
    until(lambda: sent(run_dir) == 10)
    stage.finish("KILLED")
    assert_each_line_once(client, stage.run_id, run_dir)
    assert only_run(client, "fails").info.status == "KILLED"


@pytest.mark.fault(16)
def test_a_server_that_hangs_holds_up_the_end_for_a_bounded_time(
    tmp_path: Path, proxy: Proxy, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 16: slow. A minute for a finished stage, five seconds for one that was stopped; here shorter."""
    assert (mirror._FINISH_SECONDS, mirror._STOP_SECONDS) == (60, 5)
    monkeypatch.setattr(mirror, "_FINISH_SECONDS", 1.0)
    monkeypatch.setattr(mirror, "_STOP_SECONDS", 0.5)
    proxy.fault = lambda path: 8.0
    pipeline = config(tmp_path, proxy.uri, "hangs")
    for name, status, bound in (("finished", "FINISHED", 1.0), ("stopped", "KILLED", 0.5)):
        run_dir = new_run(tmp_path / name)
        stage = tracker(pipeline, run_dir, tags=tags(name * 8))
        stage.start(0)
        assert log(stage, range(1, 21)) < 1.0
        artifact = publish_in(run_dir, name * 8) if status == "FINISHED" else None
        before = time.monotonic()
        stage.finish(status, artifact.path if artifact else None)
        assert bound <= time.monotonic() - before < bound + 1.5
    assert "did not take everything (not done after 1 s)" in caplog.text


@pytest.mark.fault(16)
def test_a_request_to_a_slow_server_is_waited_for_and_done_once(tmp_path: Path, proxy: Proxy, client: Any) -> None:
    """Fault 16: slow."""
    proxy.fault = lambda path: 0.6 if path.endswith(("runs/create", "log-batch")) else None
    run_dir = new_run(tmp_path)
    stage = tracker(config(tmp_path, proxy.uri, "slow"), run_dir)
    stage.start(0)
    assert log(stage, range(1, 31)) < 0.5
    stage.finish("FINISHED", publish_in(run_dir).path)
    assert_each_line_once(client, only_run(client, "slow").info.run_id, run_dir)
    assert sum(path.endswith("runs/create") for path in proxy.requests) == 2  # the pipeline's and the stage's


@pytest.mark.slow
@pytest.mark.fault(16)
def test_answers_after_30_seconds_are_waited_for(tmp_path: Path, proxy: Proxy, client: Any) -> None:
    """Fault 16: slow 30 s. The stage leaves in time, and the next run of the command sends the rest."""
    proxy.fault = lambda path: 30.0 if path.endswith(("runs/create", "log-batch")) else None
    run_dir = new_run(tmp_path)
    pipeline = config(tmp_path, proxy.uri, "slowest")
    stage = tracker(pipeline, run_dir)
    stage.start(0)
    assert log(stage, range(1, 31)) < 1.0
    artifact = publish_in(run_dir)
    before = time.monotonic()
    stage.finish("FINISHED", artifact.path)
    assert time.monotonic() - before < 62
    until(lambda: is_synced(pipeline, run_dir), 240)
    assert_each_line_once(client, only_run(client, "slowest").info.run_id, run_dir)


@pytest.mark.slow
@pytest.mark.fault(16)
def test_a_server_process_that_is_killed_and_started_again_has_everything_once(tmp_path: Path) -> None:
    """Fault 16: SIGKILL of a real server in the middle of requests."""
    from mlflow.tracking import MlflowClient

    server = Server(tmp_path)
    server.start()
    try:
        run_dir = new_run(tmp_path)
        stage = tracker(config(tmp_path, server.uri, "killed"), run_dir)
        stage.start(0)
        stop = threading.Event()
        steps = 0

        def train() -> None:
            nonlocal steps
            while not stop.wait(0.005):
                steps += 1
                stage.log("train", steps, {"loss": steps, "lr": 0.1})

        training = threading.Thread(target=train)
        training.start()
        for _ in range(2):
            seen = sent(run_dir)
            until(lambda seen=seen: sent(run_dir) > seen + 20)
            server.kill()
            before = steps
            time.sleep(1.0)
            assert steps > before + 50
            server.start()
        stop.set()
        training.join()
        stage.finish("FINISHED", publish_in(run_dir).path)
        assert is_synced(config(tmp_path, server.uri, "killed"), run_dir)
        client = MlflowClient(server.store)
        assert_each_line_once(client, only_run(client, "killed").info.run_id, run_dir)
    finally:
        server.kill()


def purge(client: Any, store: str, run_id: str) -> None:
    """Takes a run out of the database, as `mlflow gc` does."""
    with sqlite3.connect(store.removeprefix("sqlite:///"), timeout=60) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))


def delete(client: Any, store: str, run_id: str) -> None:
    client.delete_run(run_id)


@pytest.mark.parametrize(("how", "said"), [(delete, "was deleted"), (purge, "does not exist any more")])
@pytest.mark.fault(17)
def test_a_run_that_was_deleted_is_replaced_by_one_with_every_line(
    tmp_path: Path,
    mlflow_server: Server,
    proxy: Proxy,
    client: Any,
    caplog: pytest.LogCaptureFixture,
    how: Any,
    said: str,
) -> None:
    """Fault 17."""
    run_dir, name = new_run(tmp_path), how.__name__
    stage = tracker(config(tmp_path, proxy.uri, name), run_dir)
    stage.start(0)
    log(stage, range(1, 6))
    until(lambda: sent(run_dir) == 5)
    before = stage.run_id
    how(client, mlflow_server.store, before)
    log(stage, range(6, 11))
    stage.finish("FINISHED", publish_in(run_dir).path)
    run = only_run(client, name)
    assert run.info.run_id == stage.run_id != before and run.info.status == "FINISHED"
    assert_each_line_once(client, stage.run_id, run_dir)
    assert f"run {before} {said}; run {stage.run_id} gets everything again" in caplog.text
    assert run.data.params == {"seed": "0", "optimizer.lr": "0.001"}


@pytest.mark.fault(17)
def test_a_run_id_that_is_another_stages_is_not_written_to(
    tmp_path: Path, mlflow_server: Server, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 17: id reused."""
    pipeline = config(tmp_path, mlflow_server.store, "reused")
    other_dir, run_dir = new_run(tmp_path / "other"), new_run(tmp_path)
    other = tracker(pipeline, other_dir, tags={**tags("9" * 64), "stage": "other"})
    other.start(0)
    log(other, range(1, 4))
    other.finish("KILLED")
    state = read_json(other_dir / "mlflow.json")
    (run_dir / "mlflow.json").write_text(json.dumps({**state, "mark": "0" * 32}))
    stage = tracker(pipeline, run_dir)
    stage.start(0)
    log(stage, range(1, 6), scale=10)
    stage.finish("FINISHED", publish_in(run_dir).path)
    assert "is another stage's" in caplog.text
    assert_each_line_once(client, stage.run_id, run_dir)
    assert_each_line_once(client, other.run_id, other_dir)
    assert client.get_run(other.run_id).info.status == "KILLED"


@pytest.mark.fault(17)
def test_a_parameter_that_is_another_than_before_stops_no_metric(
    tmp_path: Path, mlflow_server: Server, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 17: param conflict on resume."""
    caplog.set_level("INFO")
    pipeline, run_dir = config(tmp_path, mlflow_server.store, "parameters"), new_run(tmp_path)
    first = tracker(pipeline, run_dir)
    first.start(0)
    log(first, range(1, 4))
    first.finish("KILLED")
    resumed = tracker(pipeline, run_dir, parameters={**PARAMETERS, "optimizer.lr": 0.5, "new": "here"})
    resumed.start(3)
    log(resumed, range(4, 7))
    resumed.finish("FINISHED", publish_in(run_dir).path)
    assert_each_line_once(client, resumed.run_id, run_dir)
    assert client.get_run(resumed.run_id).data.params == {"seed": "0", "optimizer.lr": "0.001", "new": "here"}
    assert "keeps its first value of optimizer.lr, such as optimizer.lr = 0.001 where this is 0.5" in caplog.text


@pytest.mark.fault(16)
def test_a_server_set_back_to_a_backup_gets_the_missing_lines_again(
    tmp_path: Path, mlflow_server: Server, client: Any
) -> None:
    """Fault 17: sqlite edit."""
    pipeline, run_dir = config(tmp_path, mlflow_server.store, "backup"), new_run(tmp_path)
    first = tracker(pipeline, run_dir)
    first.start(0)
    log(first, range(1, 11))
    first.finish("KILLED")
    with sqlite3.connect(mlflow_server.store.removeprefix("sqlite:///"), timeout=60) as database:
        database.execute("DELETE FROM metrics WHERE run_uuid = ? AND step > 4", (first.run_id,))
        database.execute("UPDATE latest_metrics SET step = 4 WHERE run_uuid = ?", (first.run_id,))
    resumed = tracker(pipeline, run_dir)
    resumed.start(10)
    log(resumed, range(11, 13))
    resumed.finish("FINISHED", publish_in(run_dir).path)
    assert_each_line_once(client, resumed.run_id, run_dir)


@pytest.mark.fault(16)
def test_a_torn_state_file_stops_nothing(tmp_path: Path, mlflow_server: Server, client: Any) -> None:
    pipeline, run_dir = config(tmp_path, mlflow_server.store, "torn"), new_run(tmp_path)
    (run_dir / "mlflow.json").write_text('{"run_id": "abc')
    stage = tracker(pipeline, run_dir)
    stage.start(0)
    log(stage, range(1, 4))
    stage.finish("FINISHED", publish_in(run_dir).path)
    assert_each_line_once(client, stage.run_id, run_dir)


def test_a_workspace_may_have_quotes_in_its_path(tmp_path: Path, mlflow_server: Server, client: Any) -> None:
    workspace = tmp_path / """it's "mine" & 100 % so"""
    pipeline = config(workspace, mlflow_server.store, "quotes")
    for stage in ("one", "two"):
        run_dir = new_run(workspace / stage)
        sent_from = tracker(pipeline, run_dir)
        sent_from.start(0)
        log(sent_from, range(1, 3))
        sent_from.finish("FINISHED", publish_in(run_dir).path)
        assert is_synced(pipeline, run_dir)
        assert client.list_artifacts(sent_from.run_id, "artifact")
    runs = client.search_runs([client.get_experiment_by_name("quotes").experiment_id])
    assert len(runs) == 3 and len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2


def finished(pipeline: PipelineConfig, run_dir: Path, fingerprint: str, weights: bytes = b"weights") -> str:
    artifact = publish_in(run_dir, fingerprint, weights)
    sync(pipeline, run_dir, "mae", tags(fingerprint), PARAMETERS, DATASETS)
    assert is_synced(pipeline, run_dir) and artifact.path.is_dir()
    return str(read_json(run_dir / "mlflow.json")["run_id"])


@pytest.mark.fault(16)
def test_an_artifact_that_is_not_what_its_run_says_is_refused_and_leaves_nothing(
    tmp_path: Path, mlflow_server: Server, client: Any
) -> None:
    """Fault 16: returns the wrong artifact."""
    fingerprint = "1" * 64
    run_id = finished(config(tmp_path, mlflow_server.uri, "wrong"), new_run(tmp_path), fingerprint)
    to = tmp_path / "fetched"
    client.set_tag(run_id, "digest", "0" * 64)
    with pytest.raises(ArtifactError, match=r"tagged with digest 0{12}, but its artifact has"):
        download(mlflow_server.uri, to, fingerprint=fingerprint)
    client.set_tag(run_id, "fingerprint", "2" * 64)
    with pytest.raises(ArtifactError, match=r"tagged with fingerprint 2{12}, but its artifact has 1{12}"):
        download(mlflow_server.uri, to, fingerprint="2" * 64)
    [served] = (mlflow_server.folder / "served").glob(f"*/{run_id}/artifacts/artifact/model.safetensors")
    served.write_bytes(b"Weights" * 1000)
    with pytest.raises(ArtifactError, match=f"artifact of run {run_id} is damaged or not whole: model.safetensors"):
        download(mlflow_server.uri, to, run_id=run_id)
    assert not list(to.iterdir())


@pytest.mark.fault(16)
def test_finished_runs_with_different_artifacts_are_two_answers(
    tmp_path: Path, mlflow_server: Server, client: Any
) -> None:
    fingerprint, pipeline = "3" * 64, config(tmp_path, mlflow_server.uri, "answers")
    runs = [finished(pipeline, new_run(tmp_path / name), fingerprint) for name in ("one", "same")]
    assert download(mlflow_server.uri, tmp_path / "agreed", fingerprint=fingerprint)
    assert read_json(tmp_path / "agreed" / "mlflow.json")["run_id"] == runs[0]
    runs.append(finished(pipeline, new_run(tmp_path / "other"), fingerprint, b"heavier"))
    client.delete_tag(runs[2], "digest")  # then the manifest tells
    with pytest.raises(ArtifactError, match="two different answers for fingerprint 333333333333") as raised:
        download(mlflow_server.uri, tmp_path / "fetched", fingerprint=fingerprint)
    assert runs[0] in str(raised.value) and runs[2] in str(raised.value)
    client.delete_run(runs[2])
    assert download(mlflow_server.uri, tmp_path / "fetched", fingerprint=fingerprint)


@pytest.mark.fault(16)
def test_a_second_mirror_of_a_run_directory_waits_for_the_first(
    tmp_path: Path, mlflow_server: Server, client: Any
) -> None:
    pipeline, run_dir = config(tmp_path, mlflow_server.store, "twice"), new_run(tmp_path)
    first = tracker(pipeline, run_dir)
    first.start(0)
    log(first, range(1, 4))
    until(lambda: sent(run_dir) == 3)
    second = tracker(pipeline, run_dir)
    second.start(3)
    assert second.await_run_id() == first.run_id
    first.finish("KILLED")
    log(second, range(4, 7))
    second.finish("FINISHED", publish_in(run_dir).path)
    assert second.run_id == first.run_id == only_run(client, "twice").info.run_id
    assert_each_line_once(client, second.run_id, run_dir)


@pytest.mark.fault(16)
def test_a_stage_that_ends_at_once_still_knows_its_run(tmp_path: Path, mlflow_server: Server) -> None:
    run_dir = new_run(tmp_path)
    stage = tracker(config(tmp_path, mlflow_server.store, "short"), run_dir)
    stage.start(0)
    plan = SimpleNamespace(name="mae", config=SimpleNamespace(kind="mae", description="", model_dump=lambda mode: {}))
    plan.inputs, plan.run_dir, plan.fingerprint = {}, run_dir, "f" * 64
    world: Any = SimpleNamespace(is_main=True, size=1)
    Context(config(tmp_path, None), plan, world, stage, Any, None, Any).publish(lambda folder: None)  # type: ignore[arg-type]
    manifest = read_json(run_dir / "artifact" / "manifest.json")
    assert manifest["mlflow_run"] == stage.run_id is not None
    stage.finish("KILLED")


@pytest.mark.fault(16)
def test_nobody_waits_for_the_run_of_a_server_that_is_down(tmp_path: Path, mlflow_server: Server) -> None:
    stage = tracker(config(tmp_path, Proxy(mlflow_server).uri, "nobody"), new_run(tmp_path))
    assert stage.await_run_id() is None
    stage.start(0)
    stage.await_run_id()
    before = time.monotonic()
    assert stage.await_run_id() is None
    assert time.monotonic() - before < 0.5
    stage.finish("KILLED")


def test_only_what_was_added_is_read_again_and_a_cut_file_from_its_start(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    reader = MetricsReader(file.path)
    assert reader.new_lines() == []
    for step in (1, 2):
        file.append("train", step, {"loss": 1})
    assert [line["step"] for line in reader.new_lines()] == [1, 2]
    content = bytearray(file.path.read_bytes())
    content[:5] = b"xxxxx"  # in place: nobody looks there again
    with file.path.open("r+b") as stream:
        stream.write(content)
    assert reader.new_lines() == []
    with file.path.open("a") as stream:
        stream.write('{"time": 1, "step": 3, "event": "train", ')
    assert reader.new_lines() == []
    with file.path.open("a") as stream:
        stream.write('"metrics": {}}\n{"a": 1}\n[]\n{"time": 1, "step": 4, "event": "x", "metrics": {"y": null}}\n')
    assert [line["step"] for line in reader.new_lines()] == [3]
    file.cut(2)
    assert [line["step"] for line in reader.new_lines()] == [2]
