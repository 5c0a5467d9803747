"""Shards on a real S3 endpoint: a moto server on loopback."""

import json
import shutil

import pytest

from pipeline.artifacts import read_artifact
from pipeline.data.collection import open_shards
from tests.chain.conftest import Copy
from tests.chain.running import (
    TINY,
    metrics,
    only_run,
    outage_in,
    run_stage,
    succeeded,
    vitruvian,
)
from tests.s3 import BUCKET, S3Server


@pytest.mark.slow
def test_shards_are_written_to_s3_and_trained_on_from_there(without: Copy, s3: S3Server) -> None:
    workspace = without("shards", "mae")
    remote = ["stages.shards.output=s3://crops/tiny", "storage.cache_gb=0.1", f"storage.cache={workspace}/cache"]
    succeeded(vitruvian("run", str(TINY), "--until", "mae", f"workspace={workspace}", *remote, "stages.mae.steps=4"))
    artifact = read_artifact(only_run(workspace, "shards") / "artifact")
    assert not list(artifact.path.rglob("*.tar"))
    collection = open_shards(artifact)
    assert collection.is_remote
    assert collection.counts() == {"aic": 30, "coco": 60, "mpii": 16}
    assert collection.shards.read(5).jpg[:2] == b"\xff\xd8"
    assert read_artifact(only_run(workspace, "mae") / "artifact").manifest.kind == "mae"
    cached = [path for path in (workspace / "cache").glob("??/*") if path.is_file()]
    assert 4 * 16 <= len(cached) <= 106, "what the loader's workers read"


@pytest.mark.slow
@pytest.mark.fault(32)
def test_an_outage_of_the_shards_ends_all_ranks_and_the_same_command_goes_on(
    without: Copy, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of a request; ours wait all the same
    workspace = without("shards", "mae")
    remote = [f"workspace={workspace}", f"stages.shards.output=s3://{BUCKET}/tiny"]
    succeeded(vitruvian("run", str(TINY), "--until", "shards", *remote))
    kept = s3.filesystem.cat(s3.filesystem.find(BUCKET))
    command = ["--stage", "mae", "--config", str(TINY), *remote, "stages.mae.steps=40", "stages.mae.save_every=1"]
    code, said = outage_in(workspace, "mae", s3.stop, *command)
    assert code == 1, said[-3000:]
    errors = [line for line in said.splitlines() if " error: " in line]
    assert errors and all(f"s3://{BUCKET}/tiny/" in line and "goes on" in line for line in errors), said[-3000:]
    assert "StorageError" not in said, "no traceback of ours"
    run_dir = only_run(workspace, "mae")
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] != "done" and status["exit_code"] in (1, None)  # rank 0 may have been ended by the other

    s3.start()
    for path, content in kept.items():
        s3.filesystem.pipe_file(path, content)
    assert "mae: resumes" in succeeded(run_stage(2, *command)).stderr
    undisturbed = workspace.with_name("undisturbed")
    shutil.copytree(workspace, undisturbed, symlinks=True)
    shutil.rmtree(only_run(undisturbed, "mae"))
    succeeded(run_stage(2, *command, f"workspace={undisturbed}"))
    expected = only_run(undisturbed, "mae")
    assert read_artifact(run_dir / "artifact").digest == read_artifact(expected / "artifact").digest
    for key in ("step", "loss", "sample_checksum"):
        assert [line[key] for line in metrics(run_dir)] == [line[key] for line in metrics(expected)], key
