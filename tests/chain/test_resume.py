"""Killed with -9 at a random step under the deepspeed launcher with two ranks, the same command goes on bit for bit."""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.artifacts import read_artifact
from pipeline.status import held
from tests.chain.conftest import Copy
from tests.chain.running import (
    ROOT,
    TINY,
    deepspeed_command,
    environment,
    kill_when,
    last_step,
    metrics,
    only_run,
    run_stage,
    succeeded,
)

TRAINING = ("mae", "finetune", "token", "distill")


def _arguments(workspace: Path, stage: str, *overrides: str) -> list[str]:
    return ["--stage", stage, "--config", str(TINY), f"workspace={workspace}", *overrides]


def _resume_points(run_dir: Path) -> dict[str, dict[str, str]]:
    """The digest of every file with weights, moments, steps or buffers, by resume point."""
    found = {}
    for point in sorted((run_dir / "resume").iterdir()):
        files = json.loads((point / "manifest.json").read_text())["files"]
        found[point.name] = {name: record["sha256"] for name, record in files.items() if name.endswith(".safetensors")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_a_killed_stage_ends_like_one_never_killed(without: Copy, stage: str, tmp_path: Path) -> None:
    workspace = without(stage)
    command = _arguments(workspace, stage)
    succeeded(run_stage(2, *command))
    undisturbed = only_run(workspace, stage)
    expected = _resume_points(undisturbed), metrics(undisturbed), read_artifact(undisturbed / "artifact").digest
    undisturbed.rename(tmp_path / "undisturbed")

    at = random.Random(stage).randint(6, 17)
    kill_when(lambda: last_step(workspace, stage) >= at, *command)
    assert not (only_run(workspace, stage) / "artifact").exists()
    done = succeeded(run_stage(2, *command))
    assert "resumes, resume point of step" in done.stderr

    resumed = only_run(workspace, stage)
    assert _resume_points(resumed) == expected[0]
    again = metrics(resumed)
    for key in ("step", "loss", "sample_checksum", "gradient_norm"):
        assert [line[key] for line in again] == [line[key] for line in expected[1]], key
    assert read_artifact(resumed / "artifact").digest == expected[2]


@pytest.mark.slow
def test_a_stage_killed_while_it_publishes_loses_no_training(without: Copy) -> None:
    workspace = without()
    run_dir = only_run(workspace, "finetune")
    digest = read_artifact(run_dir / "artifact").digest
    shutil.rmtree(run_dir / "artifact")
    done = succeeded(run_stage(1, *_arguments(workspace, "finetune")))
    assert "resumes, resume point of step 20" in done.stderr
    assert read_artifact(run_dir / "artifact").digest == digest


@pytest.mark.fault(10)
def test_a_second_process_on_a_run_directory_is_refused(without: Copy) -> None:
    workspace = without()
    run_dir = only_run(workspace, "mae")
    shutil.rmtree(run_dir / "artifact")
    with held(run_dir):
        done = run_stage(1, *_arguments(workspace, "mae"))
    assert done.returncode == 2
    assert f"is being run by process {os.getpid()}" in done.stderr


@pytest.mark.slow
def test_killed_shards_go_on_where_they_were(without: Copy) -> None:
    workspace = without("shards")
    expected = None
    command = _arguments(workspace, "shards")
    succeeded(run_stage(2, *command))
    expected = read_artifact(only_run(workspace, "shards") / "artifact").digest
    for path in sorted(only_run(workspace, "shards").iterdir()):
        path.rename(path.with_name(f"kept-{path.name}"))
    only_run(workspace, "shards").rename(workspace / "kept")

    def some_are_done() -> bool:
        return len(list((workspace / "tiny" / "shards").glob("*/work/report-*.json"))) >= 1

    kill_when(some_are_done, *command)
    succeeded(run_stage(2, *command))
    assert read_artifact(only_run(workspace, "shards") / "artifact").digest == expected


@pytest.mark.slow
def test_a_run_goes_on_with_another_zero_stage_and_another_number_of_ranks(without: Copy) -> None:
    workspace = without("finetune")
    plain = _arguments(workspace, "finetune", "stages.finetune.average_decay=null")
    kill_when(lambda: last_step(workspace, "finetune") >= 7, *plain)
    kill_when(lambda: last_step(workspace, "finetune") >= 12, *plain, "engine.zero_stage=3")
    done = succeeded(run_stage(1, *plain, "engine.zero_stage=2"))
    assert "resumes, resume point of step 10" in done.stderr
    elastic = [line["loss"] for line in metrics(only_run(workspace, "finetune"))]
    reference = only_run(workspace, "finetune")
    reference.rename(workspace / "elastic")
    succeeded(run_stage(2, *plain))
    undisturbed = [line["loss"] for line in metrics(only_run(workspace, "finetune"))]
    assert elastic[:10] == pytest.approx(undisturbed[:10], rel=1e-5)
    assert elastic == pytest.approx(undisturbed, rel=0.1)


@pytest.mark.slow
def test_a_stop_file_saves_and_leaves_with_75_and_the_same_command_goes_on(without: Copy) -> None:
    workspace = without("mae")
    command = _arguments(workspace, "mae", "stages.mae.steps=400", "stages.mae.save_every=400")
    process = subprocess.Popen(
        deepspeed_command(2, *command), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while last_step(workspace, "mae") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    run_dir = only_run(workspace, "mae")
    (run_dir / "STOP").touch()
    process.communicate(timeout=60)  # its end of file needs every worker to be gone
    assert process.returncode == 75
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert status["saved_step"] == last_step(workspace, "mae") < 400
