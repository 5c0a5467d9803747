"""A run whose copy is on S3: it outlives its machine, and the S3's outage."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import graph
from pipeline.artifacts import read_artifact
from pipeline.config_file import load_pipeline
from pipeline.run_storage import RunStorage
from stages import KINDS
from tests.chain.conftest import Copy
from tests.chain.running import (
    TINY,
    kill_when,
    last_step,
    metrics,
    only_run,
    outage_in,
    run_stage,
    succeeded,
    vitruvian,
)
from tests.s3 import BUCKET, S3Server

URL = f"s3://{BUCKET}/runs"


def _arguments(workspace: Path, stage: str, *overrides: str) -> list[str]:
    return ["--stage", stage, "--config", str(TINY), f"workspace={workspace}", f"storage.url={URL}", *overrides]


def _whole_points(s3: S3Server, stage: str) -> list[str]:
    """Steps of the resume points that lie on S3, whole."""
    found = s3.filesystem.glob(f"{BUCKET}/runs/tiny/{stage}/*/resume/step-*/upload.json")
    return sorted(path.split("/")[-2] for path in found)


@pytest.mark.slow
def test_a_run_whose_machine_is_gone_goes_on_from_s3_bit_for_bit(without: Copy, s3: S3Server, tmp_path: Path) -> None:
    workspace = without("finetune")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(workspace, undisturbed, symlinks=True)
    succeeded(run_stage(2, *_arguments(undisturbed, "finetune", "storage.url=null")))
    expected = only_run(undisturbed, "finetune")

    command = _arguments(workspace, "finetune", "stages.finetune.save_every=1")
    kill_when(lambda: bool(_whole_points(s3, "finetune")) and last_step(workspace, "finetune") >= 8, *command)
    shutil.rmtree(only_run(workspace, "finetune"))
    done = succeeded(run_stage(2, *command))
    assert "resumes, resume point of step" in done.stderr and f"fetched from {URL}" in done.stderr

    run_dir = only_run(workspace, "finetune")
    assert read_artifact(run_dir / "artifact").digest == read_artifact(expected / "artifact").digest
    for key in ("step", "loss", "sample_checksum"):
        assert [line[key] for line in metrics(run_dir)] == [line[key] for line in metrics(expected)], key

    shutil.rmtree(run_dir)  # and once more: now it is finished, elsewhere
    done = succeeded(run_stage(2, *command))
    assert "skipped, finished elsewhere" in done.stderr
    assert read_artifact(run_dir / "artifact").digest == read_artifact(expected / "artifact").digest


@pytest.mark.slow
def test_an_outage_of_s3_stops_no_training_and_what_is_missing_is_sent_later(without: Copy, s3: S3Server) -> None:
    workspace = without("mae")
    # As many steps as the storage is asked again for: the artifact's turn comes after the resume point's.
    command = _arguments(workspace, "mae", "stages.mae.steps=400", "stages.mae.save_every=10")
    code, said = outage_in(workspace, "mae", s3.stop, *command)
    assert code == 0, said[-3000:]
    assert "training goes on, the next save tries again" in said
    assert "the same command sends it later" in said
    run_dir = only_run(workspace, "mae")
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    digest = read_artifact(run_dir / "artifact").digest

    s3.start()
    done = succeeded(vitruvian("run", str(TINY), "--only", "mae", *command[4:]))
    assert "mae: skipped" in done.stderr and "goes to s3://" in done.stderr
    assert "mae: skipped" in (again := succeeded(vitruvian("run", str(TINY), "--only", "mae", *command[4:]))).stderr
    assert "goes to s3://" not in again.stderr, "once is enough"
    shutil.rmtree(run_dir)
    done = succeeded(vitruvian("run", str(TINY), "--only", "mae", *command[4:]))
    assert f"mae: its artifact was fetched from {URL}" in done.stderr
    assert read_artifact(run_dir / "artifact").digest == digest


@pytest.mark.slow
def test_a_stage_finds_its_inputs_in_the_storage(without: Copy, s3: S3Server, tmp_path: Path) -> None:
    workspace = without()
    pipeline = load_pipeline(TINY, [f"workspace={workspace}", f"storage.url={URL}"], KINDS)
    for stage in graph.plan(pipeline, ["finetune"]).values():
        RunStorage(pipeline, stage).upload_artifact()
    elsewhere = tmp_path / "elsewhere"
    done = succeeded(run_stage(2, *_arguments(elsewhere, "token", "stages.token.steps=2")))
    for stage in ("data", "shards", "mae", "finetune"):
        assert f"{stage}: its artifact was fetched from" in done.stderr
        one, other = (read_artifact(only_run(place, stage) / "artifact") for place in (workspace, elsewhere))
        assert one.digest == other.digest
        other.verify()


@pytest.mark.slow
def test_a_storage_out_of_reach_at_the_start_says_what_to_do(without: Copy, s3: S3Server) -> None:
    workspace = without("mae")
    command = _arguments(workspace, "mae", "stages.mae.steps=4")
    wrong = run_stage(1, *command, "storage.url=s3://nosuchbucket/runs")
    assert wrong.returncode != 0
    [line] = [line for line in wrong.stderr.splitlines() if "error: storage.url:" in line]
    assert "s3://nosuchbucket/runs/tiny/mae: can't be written" in line and "storage.url=null" in line
    assert not (only_run(workspace, "mae") / "resume").exists()
