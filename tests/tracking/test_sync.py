"""`vitruvian sync`: one process sends what all stages left, such as from nodes that share a network file system."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from launchers.cli import app
from pipeline.errors import ConfigError, VitruvianError
from pipeline.files import write_json
from pipeline.status import Status, held
from pipeline.tracking.metrics_file import MetricsFile
from pipeline.tracking.mounts import network_file_system
from pipeline.tracking.tracker import is_synced, sync, sync_all
from tests.mlflow_server import Proxy, Server
from tests.tracking.test_tracker import DATASETS, PARAMETERS, config, history, publish_in, tags, tracker


def mounted(*pairs: tuple[str, str]) -> list[Any]:
    return [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in pairs]


@pytest.fixture
def client(mlflow_server: Server) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(mlflow_server.store)


def work(workspace: Path, name: str, stage: str, state: str, uri: str | None = None) -> Path:
    """A run directory that a job left: three lines, and an artifact if it is done."""
    fingerprint = (stage * 64)[:64]
    run_dir = workspace / name / stage / fingerprint[:12]
    run_dir.mkdir(parents=True)
    job = tracker(config(workspace, uri, name), run_dir, tags=tags(fingerprint))
    job.start(0)
    for step in (1, 2, 3):
        job.log("train", step, {"loss": step})
    if state == "done":
        publish_in(run_dir, fingerprint)
    Status(run_dir, writes=True).ended(state, 0)
    job.finish("FINISHED" if state == "done" else "KILLED")
    return run_dir


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "9p", "fuse.sshfs"]
)
def test_a_network_file_system_is_known_by_its_mount(kind: str) -> None:
    partitions = mounted(("/", "ext4"), ("/home", kind), ("/home/scratch", "xfs"))
    assert network_file_system(Path("/home/me/workspace/mlflow.db"), partitions) == kind
    assert network_file_system(Path("/home/scratch/mlflow.db"), partitions) is None
    assert network_file_system(Path("/homes/mlflow.db"), partitions) is None


def test_the_last_of_several_mounts_on_a_point_counts() -> None:
    assert (
        network_file_system(Path("/data/x"), mounted(("/", "ext4"), ("/data", "autofs"), ("/data", "nfs4"))) == "nfs4"
    )
    assert network_file_system(Path("/data/x"), mounted(("/", "nfs"), ("/", "overlay"))) is None
    assert network_file_system(Path("/x"), mounted(("/", "fuse.fuse-overlayfs"))) is None
    assert network_file_system(Path("/x"), mounted(("/", "fuseblk"))) is None
    assert network_file_system(Path("/x"), []) is None


def test_a_link_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    partitions = mounted(("/", "ext4"), (str((tmp_path / "there").resolve()), "nfs"))
    assert network_file_system(tmp_path / "link" / "mlflow.db", partitions) == "nfs"


def test_jobs_leave_a_database_on_a_network_file_system_alone_and_sync_fills_it(
    tmp_path: Path,
    mlflow_server: Server,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = mlflow_server.store
    folder = str(mlflow_server.folder.resolve())
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted(("/", "ext4"), (folder, "nfs4")))
    pipeline = config(tmp_path, store, "network")
    run_dir = work(tmp_path, "network", "a", "done", store)
    assert f"{store} lies on a network file system" in caplog.text and "vitruvian sync PIPELINE" in caplog.text
    sync(pipeline, run_dir, "mae", tags("a" * 64), PARAMETERS, DATASETS)
    assert is_synced(pipeline, run_dir), "the stage's own command has nothing to send"
    assert client.get_experiment_by_name("network") is None and not (run_dir / "mlflow.json").exists()

    [row] = sync_all(pipeline)
    assert (row["lines"], row["state"], row["failed"]) == (3, "finished", False)
    [run] = client.search_runs([client.get_experiment_by_name("network").experiment_id], "tags.stage = 'mae'")
    assert [point[:2] for point in history(client, run.info.run_id, "loss")] == [(1, 1), (2, 2), (3, 3)]
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "0" and run.inputs.dataset_inputs


def test_everything_of_every_stage_is_sent_once_and_in_the_state_that_it_is_in(
    tmp_path: Path, mlflow_server: Server, client: Any
) -> None:
    states = {"a": "done", "b": "stopped", "c": "failed", "d": "running"}
    folders = {stage: work(tmp_path, "every", stage, state) for stage, state in states.items()}
    aside = folders["a"].with_name(f"{folders['a'].name}.old-1")
    aside.mkdir()
    (aside / "tracking.json").write_text((folders["a"] / "tracking.json").read_text())
    command = ["sync", "demo", f"workspace={tmp_path}", "name=every", f"tracking.uri={mlflow_server.store}"]
    called = CliRunner().invoke(app, [*command, "--json"])
    assert called.exit_code == 0, called.output
    rows = {row["stage"]: row for row in json.loads(called.stdout)}
    assert {stage: (row["lines"], row["state"]) for stage, row in rows.items()} == {
        "a": (3, "finished"),
        "b": (3, "sent so far"),
        "c": (3, "sent so far"),
        "d": (3, "sent so far"),
    }
    experiment = client.get_experiment_by_name("every").experiment_id
    runs = {run.data.tags["fingerprint"][0]: run for run in client.search_runs([experiment], "tags.stage = 'mae'")}
    found = {stage: run.info.status for stage, run in runs.items()}
    assert found == {"a": "FINISHED", "b": "KILLED", "c": "FAILED", "d": "RUNNING"}

    MetricsFile(folders["d"] / "metrics.jsonl").append("train", 4, {"loss": 4})
    called = CliRunner().invoke(app, command)
    assert called.exit_code == 0 and "nothing left" in called.stdout
    assert [point[0] for point in history(client, runs["d"].info.run_id, "loss")] == [1, 2, 3, 4]
    assert [point[0] for point in history(client, runs["b"].info.run_id, "loss")] == [1, 2, 3]
    assert len(client.search_runs([experiment])) == 5


def test_what_a_job_mirrors_by_itself_is_left_to_it(tmp_path: Path, mlflow_server: Server) -> None:
    run_dir = work(tmp_path, "own", "a", "running")
    with held(run_dir / ".mlflow"):
        [row] = sync_all(config(tmp_path, mlflow_server.store, "own"))
    assert (row["state"], row["failed"]) == ("another process sends it", False)


def test_two_syncs_do_not_run_at_once(tmp_path: Path, mlflow_server: Server) -> None:
    pipeline = config(tmp_path, mlflow_server.store, "both")
    for stage in ("a", "b"):
        work(tmp_path, "both", stage, "stopped")
    first = sync_all(pipeline)
    next(first)
    with pytest.raises(ConfigError, match="another `vitruvian sync` is at work here"):
        next(sync_all(pipeline))
    assert next(first)["lines"] == 3
    assert list(first) == [] and len(list(sync_all(pipeline))) == 2


def test_a_sync_that_reaches_no_server_says_so_and_loses_nothing(
    tmp_path: Path, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = work(tmp_path, "unreached", "a", "done")
    write_json(tmp_path / "unreached" / "a" / "tracking.json", {})  # not a run directory's
    uri = Proxy(mlflow_server).uri
    called = CliRunner().invoke(app, ["sync", "demo", f"workspace={tmp_path}", "name=unreached", f"tracking.uri={uri}"])
    assert isinstance(called.exception, VitruvianError) and called.exception.exit_code == 1
    assert "Connection refused" in called.stdout
    assert len(MetricsFile(run_dir / "metrics.jsonl").read()) == 3
    with pytest.raises(ConfigError, match=r"tracking.uri is null"):
        list(sync_all(config(tmp_path, None, "unreached")))
