"""`vitruvian submit` on a real Slurm: the chain, preemption, a lost node, a failed stage."""

import json
import shutil
from pathlib import Path

import pytest

from launchers import chain, slurm
from pipeline.artifacts import read_artifact
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.errors import ConfigError
from stages import KINDS
from tests.chain.running import TINY, last_step, metrics, only_run, succeeded, vitruvian
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import Start

FOUR_RANKS = ("slurm.nodes=2", "slurm.processes_per_node=2", "runtime.threads=1")
STAGES = ("data", "shards", "mae", "finetune", "token", "student_alone", "distill", "evaluate")
LONG = 3600  # seconds, for a chain on a busy machine


@pytest.fixture(scope="session")
def shards_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose data and shards are done. Read only."""
    workspace = tmp_path_factory.mktemp("shards-made")
    succeeded(vitruvian("run", str(TINY), f"workspace={workspace}", "--until", "shards"))
    return workspace


def load(workspace: Path, *overrides: str) -> tuple[PipelineConfig, list[str]]:
    words = [f"workspace={workspace}", *overrides]
    return load_pipeline(str(TINY), words, KINDS), words


def submit(workspace: Path, *overrides: str, until: str | None = None) -> None:
    """`vitruvian submit`, in this process."""
    config, words = load(workspace, *overrides)
    slurm.submit(config, chain.choose(config, None, until, None), str(TINY), words, dry_run=False)


def log(workspace: Path, stage: str) -> str:
    path = workspace / "tiny" / "slurm" / f"{stage}.log"
    return path.read_text() if path.exists() else ""


def ended(cluster: Cluster, *jobs: str) -> bool:
    states = cluster.jobs()
    return all(states.get(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") for job in jobs)


def wait_for_completion(cluster: Cluster, workspace: Path, stage: str) -> None:
    wait_until(lambda: ended(cluster, f"tiny.{stage}"), LONG, lambda: f"{stage}: {cluster.jobs()}")
    assert cluster.jobs()[f"tiny.{stage}"] == "COMPLETED", log(workspace, stage)[-6000:]


def test_a_failed_stage_cancels_what_waits_for_it(cluster: Start, tmp_path: Path) -> None:
    real = cluster(2)
    submit(tmp_path, 'slurm.setup=["exit 3"]', "slurm.array=2")
    names = [f"tiny.{stage}" for stage in STAGES]
    wait_until(lambda: ended(real, *names), 60, lambda: str(real.jobs()))
    states = real.jobs()
    assert states["tiny.data"] == "FAILED"
    assert {states[name] for name in names[1:]} == {"CANCELLED"}
    assert states["tiny.shards.parts.0"] == states["tiny.shards.parts.1"] == "CANCELLED"
    jobs = slurm.refreshed(load(tmp_path)[0])
    assert slurm.describe(jobs["data"]) == f"{real.job_id('tiny.data')} FAILED"


def test_what_is_in_the_queue_is_not_submitted_twice_and_can_be_cancelled(
    cluster: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = cluster(1)
    real.call("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    workspace = tmp_path / "a folder#with 100% blanks"
    caplog.set_level("INFO")
    submit(workspace, "slurm.array=2", until="mae")
    first = json.loads((workspace / "tiny" / "slurm" / "jobs.json").read_text())
    details = real.details(real.job_id("tiny.mae"))
    assert details["Dependency"].startswith(f"afterok:{real.job_id('tiny.shards')}")
    submit(workspace, "slurm.array=2", until="mae")
    assert caplog.text.count("in the queue already") == 3
    assert list(real.jobs()) == list(dict.fromkeys(real.jobs())) and len(real.jobs()) == 5
    with pytest.raises(ConfigError, match="mae: in the queue with other settings"):
        submit(workspace, "slurm.array=2", "slurm.stages.mae.time=0-1", until="mae")
    submit(workspace, "slurm.array=2", until="finetune")
    second = slurm.refreshed(load(workspace)[0])
    for name in first:
        assert [job["id"] for job in second[name]["jobs"]] == [job["id"] for job in first[name]["jobs"]]
    assert real.details(real.job_id("tiny.finetune"))["Dependency"].startswith("afterok:")
    assert slurm.cancel(load(workspace)[0], "finetune") == ["finetune"]
    assert slurm.cancel(load(workspace)[0], None) == ["data", "mae", "shards"]
    assert slurm.cancel(load(workspace)[0], None) == []
    assert set(real.jobs().values()) == {"CANCELLED"}


def test_a_refused_job_takes_the_chain_back(cluster: Start, tmp_path: Path) -> None:
    real = cluster(1)
    real.call("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    with pytest.raises(Exception, match="sbatch failed: .*invalid partition"):
        submit(tmp_path, "slurm.stages.finetune.partition=nowhere")
    assert set(real.jobs()) == {"tiny.data", "tiny.shards", "tiny.mae"}
    assert set(real.jobs().values()) == {"CANCELLED"}


STAND_IN = """#!/bin/bash
# In place of the interpreter: every stage ends well, but mae, which fails at its first attempt when it is told to.
[[ " $* " == *" --stage mae "* && ! -e FAILED ]] || exit 0
touch "started-$SLURMD_NODENAME"
until [ -e FAIL ]; do sleep 0.1; done
touch FAILED
exit 1
"""


def test_a_process_that_fails_before_slurm_knows_of_the_lost_node_fails_no_job(
    cluster: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cluster(3)
    monkeypatch.chdir(tmp_path)
    Path("stand-in").write_text(STAND_IN)
    Path("stand-in").chmod(0o755)
    submit(tmp_path, f"slurm.python={tmp_path}/stand-in", "slurm.nodes=2", until="mae")
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2, 60, lambda: str(real.jobs()))
    job = real.job_id("tiny.mae")
    real.kill_node("n2")
    (tmp_path / "FAIL").touch()
    wait_until(lambda: "Exited with exit code 1" in log(tmp_path, "mae"), 60, "the failure of the other process")
    real.declare_lost("n2")
    wait_until(lambda: ended(real, "tiny.mae"), 60, lambda: f"{real.jobs()} {log(tmp_path, 'mae')}")
    assert real.jobs()["tiny.mae"] == "COMPLETED"
    assert "n2" not in real.details(job)["NodeList"]


@pytest.mark.slow
@pytest.mark.timeout(LONG)
def test_the_whole_chain_on_two_nodes(cluster: Start, tmp_path: Path) -> None:
    real = cluster(2)
    words = [f"workspace={tmp_path}", *FOUR_RANKS, "slurm.array=3"]
    succeeded(vitruvian("submit", str(TINY), *words))
    for stage in STAGES:
        wait_for_completion(real, tmp_path, stage)
    rows = json.loads(succeeded(vitruvian("status", str(TINY), *words, "--json")).stdout)
    assert {row["stage"]: row["state"] for row in rows} == dict.fromkeys(STAGES, "done")
    assert rows[1]["job"].count("COMPLETED") == 2
    for stage in STAGES:
        read_artifact(only_run(tmp_path, stage) / "artifact").verify()
    assert not list((tmp_path / "tiny" / "slurm").glob("shards.part-3.log"))
    assert all("part" in log(tmp_path, f"shards.part-{part}") for part in range(3))
    assert "shards are there already" in log(tmp_path, "shards")
    assert (only_run(tmp_path, "mae") / "log-3.txt").exists()
    again = succeeded(vitruvian("submit", str(TINY), *words))
    assert again.stderr.count("skipped, finished with the same fingerprint") == len(STAGES)


@pytest.mark.slow
@pytest.mark.timeout(LONG)
def test_a_stage_preempted_twice_ends_like_an_undisturbed_one(
    cluster: Start, shards_made: Path, tmp_path: Path
) -> None:
    real = cluster(2)
    words = (*FOUR_RANKS, "stages.mae.steps=150", "stages.mae.save_every=150", "tracking.log_every=1")
    digests, curves = [], []
    for disturbed in (False, True):
        workspace = tmp_path / f"disturbed-{disturbed}"
        shutil.copytree(shards_made, workspace, symlinks=True)
        submit(workspace, *words, until="mae")
        if disturbed:
            _preempt_twice(real, workspace)
        wait_for_completion(real, workspace, "mae")
        run_dir = only_run(workspace, "mae")
        digests.append(read_artifact(run_dir / "artifact").digest)
        curves.append([(line["step"], line["loss"]) for line in metrics(run_dir)])
    assert log(tmp_path / "disturbed-True", "mae").count("resumes, resume point of step") == 2
    assert curves[0] == curves[1] and len(curves[0]) == 150
    assert digests[0] == digests[1]


def _preempt_twice(real: Cluster, workspace: Path) -> None:
    """Once with the warning to the batch shell, once by a job of the partition `high`, which warns the tasks alone."""
    job = real.job_id("tiny.mae")
    wait_until(lambda: last_step(workspace, "mae") >= 20, LONG, lambda: f"mae: {real.jobs()} {log(workspace, 'mae')}")
    real.call("scancel", "-b", "-s", "USR1", job)
    wait_until(lambda: real.details(job)["Restarts"] == "1", LONG, lambda: f"requeue: {log(workspace, 'mae')[-3000:]}")
    reached = last_step(workspace, "mae")
    assert reached < 150
    wait_until(
        lambda: last_step(workspace, "mae") >= reached + 20, LONG, lambda: f"mae: {log(workspace, 'mae')[-3000:]}"
    )
    real.call("sbatch", "-p", "high", "-N", "2", "-J", "urgent", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_until(lambda: ended(real, "urgent"), LONG, lambda: f"urgent: {real.jobs()} {log(workspace, 'mae')[-3000:]}")
    assert real.jobs()["urgent"] == "COMPLETED"
    assert real.details(job)["Restarts"] == "2"
    assert last_step(workspace, "mae") < 150


@pytest.mark.slow
@pytest.mark.timeout(LONG)
def test_the_job_of_a_lost_node_goes_on_elsewhere(cluster: Start, shards_made: Path, tmp_path: Path) -> None:
    real = cluster(3)
    workspace = tmp_path / "workspace"
    shutil.copytree(shards_made, workspace, symlinks=True)
    submit(workspace, *FOUR_RANKS, "stages.mae.steps=150", "stages.mae.save_every=10", until="mae")
    wait_until(lambda: last_step(workspace, "mae") >= 15, LONG, lambda: f"mae: {real.jobs()} {log(workspace, 'mae')}")
    job = real.job_id("tiny.mae")
    real.kill_node("n2")
    real.declare_lost("n2")
    wait_for_completion(real, workspace, "mae")
    assert real.details(job)["Restarts"] == "1"
    assert "n2" not in real.details(job)["NodeList"]
    assert "resumes, resume point of step" in log(workspace, "mae")
    assert [line["step"] for line in metrics(only_run(workspace, "mae"))] == list(range(1, 151))
