"""Runs commands as a user types them, and reads what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
TIMEOUT = 400  # seconds, for the slowest command on a busy machine


def environment() -> dict[str, str]:
    """Without a launcher's variables, with the interpreter's folder on PATH."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}", "DS_ACCELERATOR": "cpu"}


def vitruvian(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line tool, to its end."""
    command = [sys.executable, "-m", "launchers.cli", *arguments]
    extra = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment() | extra, cwd=cwd or ROOT
    )


def deepspeed_command(ranks: int, *arguments: str) -> list[str]:
    """`deepspeed --num_gpus N launchers/run_stage.py ...`, on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), "launchers/run_stage.py", *arguments]


def run_stage(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A stage under the deepspeed launcher, to its end."""
    command = deepspeed_command(ranks, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(), cwd=ROOT)


def kill_when(condition: Callable[[], bool], *arguments: str, ranks: int = 2) -> None:
    """Starts a stage and kills launcher, ranks and workers with -9 as soon as the condition holds."""
    process = subprocess.Popen(
        deepspeed_command(ranks, *arguments),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert process.poll() is None, "the stage ended before it could be killed"
            assert time.monotonic() < deadline, "the stage never got that far"
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outage_in(workspace: Path, stage: str, stop: Callable[[], None], *arguments: str) -> tuple[int, str]:
    """A stage of two ranks whose server is stopped after three steps: exit code, and what it said."""
    process = subprocess.Popen(
        deepspeed_command(2, *arguments), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while last_step(workspace, stage) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    stop()
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Fails with the process's output unless it ended well."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def only_run(workspace: Path, stage: str, pipeline: str = "tiny") -> Path:
    """The one run directory of a stage."""
    found = [path for path in (workspace / pipeline / stage).iterdir() if ".old-" not in path.name]
    assert len(found) == 1, found
    return found[0]


def metrics(run_dir: Path, event: str = "train") -> list[dict[str, Any]]:
    """The metrics of each logged step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **line["metrics"]} for line in lines if line["event"] == event]


def last_step(workspace: Path, stage: str, pipeline: str = "tiny") -> int:
    """How far a running stage is; 0 before it has begun."""
    files = list((workspace / pipeline / stage).glob("*/metrics.jsonl"))
    if not files:
        return 0
    lines = files[0].read_text().splitlines()
    try:
        return max((json.loads(line)["step"] for line in lines), default=0)
    except ValueError:
        return 0
