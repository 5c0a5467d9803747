"""Faults under the launchers that people use. Faults are numbered as in docs/faults.md."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.status import holder, read_status
from tests.chain.running import (
    ROOT,
    TINY,
    deepspeed_command,
    environment,
    last_step,
    only_run,
    run_stage,
    succeeded,
    vitruvian,
)
from tests.faults.running import Stage, left

ENDLESS = "stages.finetune.steps=4000"


@contextmanager
def launched(command: list[str], extra: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a session of its own, all of which is gone afterwards."""
    process = subprocess.Popen(
        command, env=environment() | (extra or {}), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for one in psutil.process_iter(["pid"]):
            try:
                if os.getsid(one.pid) == process.pid:
                    one.kill()
            except (ProcessLookupError, psutil.Error):
                continue
        process.communicate()


def arguments(stage: Stage, *overrides: str) -> list[str]:
    """Of run_stage.py."""
    common = ["--stage", stage.name, "--config", str(TINY), f"workspace={stage.workspace}", "tracking.uri=null"]
    return [*common, *stage.overrides, *overrides]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Fails where the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def pids(run_dir: Path) -> list[int]:
    """Of the ranks, as their heartbeats say."""
    return [json.loads(path.read_text())["pid"] for path in sorted((run_dir / "heartbeats").glob("rank-*.json"))]


def is_gone(pid: int) -> bool:
    """A process that ended, collected or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.fault(11)
@pytest.mark.slow
def test_a_stage_whose_run_directory_is_gone_ends(stage: Stage) -> None:
    """It can record nothing any more, and its data workers wait for work."""
    given = arguments(stage, "runtime.workers=1", "stages.finetune.save_every=5", ENDLESS)
    with launched([sys.executable, "launchers/run_stage.py", *given]) as process:
        wait_for(lambda: last_step(stage.workspace, stage.name) >= 3, 120, "the third step")
        run_dir = stage.run_dir
        [rank] = pids(run_dir)
        shutil.rmtree(run_dir)
        assert process.wait(60) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert f"can't record in {run_dir} how it ended" in said and "finetune failed" in said
        wait_for(lambda: is_gone(rank), 10, "the end of the rank")


@pytest.mark.fault(2)
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "vitruvian"])
def test_ranks_leave_when_their_launcher_is_killed_and_lose_no_step(launcher: str, stage: Stage) -> None:
    command = deepspeed_command(2, *arguments(stage, ENDLESS))
    if launcher == "vitruvian":
        given = [f"workspace={stage.workspace}", "tracking.uri=null", "runtime.processes=2", *stage.overrides, ENDLESS]
        command = [sys.executable, "-m", "launchers.cli", "run", str(TINY), "--only", "finetune", *given]
    with launched(command, {"PYTHONPATH": str(ROOT)}) as process:
        wait_for(lambda: last_step(stage.workspace, stage.name) >= 3, 120, "the third step")
        ranks = pids(stage.run_dir)
        assert len(ranks) == 2
        process.kill()
        wait_for(lambda: all(map(is_gone, ranks)), 30, "the end of the ranks")
        status = json.loads((stage.run_dir / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        assert status["saved_step"] == last_step(stage.workspace, stage.name)


@pytest.mark.fault(4)
@pytest.mark.slow
def test_a_signal_to_the_deepspeed_launcher_stops_all_ranks_without_losing_a_step(stage: Stage) -> None:
    with launched(deepspeed_command(2, *arguments(stage, ENDLESS))) as process:
        wait_for(lambda: last_step(stage.workspace, stage.name) >= 3, 120, "the third step")
        process.send_signal(signal.SIGTERM)
        # On one machine the launcher does not pass it on: the ranks see that it is gone.
        wait_for(lambda: read_status(stage.run_dir)["state"] == "stopped", 20, "the stop of all ranks")
    status = read_status(stage.run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert status["saved_step"] == last_step(stage.workspace, stage.name)


@pytest.mark.fault(4)
@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_vitruvian_run_ends_after_its_ranks_have_saved_and_the_same_command_goes_on(
    number: int, processes: int, stage: Stage
) -> None:
    given = [f"workspace={stage.workspace}", "tracking.uri=null", f"runtime.processes={processes}", ENDLESS]
    command = [sys.executable, "-m", "launchers.cli", "run", str(TINY), "--only", "finetune", *stage.overrides, *given]
    saved = 0
    for _ in range(2):  # the second meets a stage that goes on
        with launched(command, {"PYTHONPATH": str(ROOT)}) as process:
            wait_for(lambda step=saved + 3: last_step(stage.workspace, stage.name) >= step, 120, "the third step")
            ranks = pids(stage.run_dir)
            assert len(ranks) == processes
            process.send_signal(number)
            assert process.wait(60) == 75
            assert all(map(is_gone, ranks)), "nobody holds the run directory any more"
        status = read_status(stage.run_dir)
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        assert status["saved_step"] == last_step(stage.workspace, stage.name) > saved
        saved = status["saved_step"]
    with launched(command, {"PYTHONPATH": str(ROOT)}) as process:  # and is told while it starts
        wait_for(lambda: holder(stage.run_dir) not in (None, status["pid"]), 120, "the start")
        process.send_signal(number)
        assert process.wait(60) == 75
    assert read_status(stage.run_dir)["state"] == "stopped"
    assert saved <= last_step(stage.workspace, stage.name) <= saved + 1


@pytest.mark.fault(4)
@pytest.mark.slow
def test_vitruvian_run_stops_a_stage_that_does_not_train_and_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    few = "coco_val: 8, aic_train: 8, aic_val: 8, mpii_train: 8, mpii_val: 8"
    people = f"stages.data.people={{coco_train: 6000, {few}}}"
    given = [f"workspace={tmp_path}", "tracking.uri=null", people]
    command = [sys.executable, "-m", "launchers.cli", "run", str(TINY), "--until", "shards", *given]
    work = tmp_path / "tiny" / "shards"
    with launched(command, {"PYTHONPATH": str(ROOT)}) as process:
        wait_for(lambda: any(work.glob("*/work/report-*.json")), 300, "the first shard")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert not any(work.glob("*/artifact"))
    assert f"{len(list(work.glob('*/work/report-*.json')))} of " in succeeded(vitruvian(*command[3:])).stderr


@pytest.mark.fault(15)
@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_under_the_deepspeed_launcher(stage: Stage) -> None:
    with launched(deepspeed_command(2, *arguments(stage, ENDLESS, "runtime.hang_minutes=0.5"))) as process:
        wait_for(lambda: last_step(stage.workspace, stage.name) >= 3, 120, "the third step")
        ranks = pids(stage.run_dir)
        os.kill(ranks[1], signal.SIGSTOP)
        wait_for(lambda: process.poll() is not None, 120, "the end of the job")
        assert process.returncode not in (0, 75)
        assert all(map(is_gone, ranks)), "the stopped one, too"
    log = (stage.run_dir / "log-0.txt").read_text()
    assert "no progress for" in log
    assert f"process {ranks[1]}: " in log, "its last sign of life, at most two seconds older than its last step"
    assert "Thread" in log and "train_step" in log


@pytest.mark.fault(1)
@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(stage: Stage, tmp_path: Path) -> None:
    clean = stage.finish()
    stage.forget()
    command = deepspeed_command(2, *arguments(stage))
    place = command.index("launchers/run_stage.py")
    command[place] = "tests/faults/program.py"
    fault = {"do": "kill", "step": 8, "at": "step", "rank": 1}
    with launched(command, {"FAULT": json.dumps(fault)}) as process:
        assert process.wait(120) != 0
        wait_for(lambda: all(map(is_gone, pids(only_run(stage.workspace, stage.name)))), 35, "the end of the ranks")
    succeeded(run_stage(2, *arguments(stage)))
    assert left(stage.run_dir) == clean
