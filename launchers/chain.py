"""A chain on this machine: which stages, and each in a process, or several, of its own."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import typer

from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import did_you_mean
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from pipeline.graph import StagePlan
from pipeline.heartbeat import LAUNCHER_VARIABLE, STOP_FILE
from pipeline.run_storage import RunStorage
from pipeline.status import holder
from pipeline.tracking.tracker import is_synced

logger = logging.getLogger("vitruvian")

_LOOK_SECONDS = 1.0


def choose(config: PipelineConfig, start: str | None, until: str | None, only: str | None) -> list[str]:
    """Stage names to run, parents first. Raises ConfigError for unknown names, and for options that leave no stage."""
    for option, name in {"--from": start, "--until": until, "--only": only}.items():
        if name is not None and name not in config.stages:
            raise ConfigError(f"{option}: no stage {name!r}{did_you_mean(name, list(config.stages))}")
    if only is not None:
        if start is not None or until is not None:
            raise ConfigError(f"--only {only} is one stage: leave out --from and --until, or --only")
        return [only]
    chosen = graph.order(config)
    if until is not None:
        chosen = [*graph.ancestors(config, until), until]
    if start is not None:
        later = [name for name in graph.order(config) if name == start or start in graph.ancestors(config, name)]
        chosen = [name for name in chosen if name in later]
        if not chosen:
            raise ConfigError(
                f"--from {start} --until {until}: {until} does not need {start}, so nothing would run; end at one of "
                f"{', '.join(later)}, or leave out --from"
            )
    return chosen


def run_stages(config: PipelineConfig, chosen: list[str], arguments: list[str], fresh: bool = False) -> None:
    """Each chosen stage that is not done, in a process of its own; arguments: the pipeline's name and its overrides.

    Raises typer.Exit with the exit code of the first that fails, and with that of a stop after SIGTERM or SIGUSR1.
    """
    with _stop_requests() as requests:
        for name in chosen:
            stage = graph.plan(config, [name], fresh=fresh)[name]
            if stage.state == "done" and is_synced(config, stage.run_dir) and _is_stored(config, stage):
                logger.info("%s: skipped, %s (%s)", name, stage.reason, stage.run_dir)
                continue
            command = command_of(config, name, arguments, fresh)
            code = EXIT_STOPPED if requests else _wait_for(command, config, name, requests)
            if requests and code == EXIT_DONE:
                code = EXIT_STOPPED
            if code:
                if code == EXIT_STOPPED:
                    logger.error("stopped on request; the same command goes on")
                raise typer.Exit(code if code > 0 else 1)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals that have asked this process to stop, as they come."""
    requests: list[int] = []
    signals = (signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda number, _: requests.append(number)) for number in signals}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_stored(config: PipelineConfig, stage: StagePlan) -> bool:
    storage = RunStorage.of(config, stage)
    return storage is None or storage.has_artifact()


def command_of(config: PipelineConfig, name: str, arguments: list[str], fresh: bool) -> list[str]:
    """The process that runs a stage: under the deepspeed launcher where it trains on several processes."""
    pipeline, *overrides = arguments
    script = ["--stage", name, "--config", pipeline, *(["--fresh"] if fresh else []), *overrides]
    number = processes(config) if type(config.stages[name]).distributed else 1
    if number == 1:
        return [sys.executable, "-m", "launchers.run_stage", *script]
    # The launcher ignores CUDA_VISIBLE_DEVICES where it is given a number.
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    some = visible and config.runtime.device != "cpu"
    devices = ["--include", f"localhost:{','.join(visible[:number])}"] if some else ["--num_gpus", str(number)]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *devices,
        "--master_addr",
        "127.0.0.1",
    ]
    return [*launcher, "--master_port", str(_free_port()), "--module", "launchers.run_stage", *script]


def _wait_for(command: list[str], config: PipelineConfig, name: str, requests: list[int]) -> int:
    """Runs a stage's process to its end, which comes soon once there are requests to stop."""
    process = subprocess.Popen(command, env=_environment(config))
    while True:
        # After a Ctrl-C the terminal told the stage, too: it saves and leaves.
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            if requests:
                _ask_to_stop(config, name, process.pid)
            return process.wait(_LOOK_SECONDS)


def _ask_to_stop(config: PipelineConfig, name: str, pid: int) -> None:
    """Touches the `STOP` of the runs that a process, or those below it, holds: of the stage, or of data that it lacks.

    To be called until the process is gone: a stage that starts takes away what it finds. A signal would not do: the
    deepspeed launcher ends at once, before the ranks have saved.
    """
    with suppress(psutil.NoSuchProcess, FileNotFoundError):  # the process has ended, or moves the run aside just now
        below = {pid, *(process.pid for process in psutil.Process(pid).children(recursive=True))}
        for stage in graph.plan(config, [name], fresh=True).values():  # its own artifact is not looked at
            if stage.run_dir is not None and holder(stage.run_dir) in below:
                (stage.run_dir / STOP_FILE).touch()


def processes(config: PipelineConfig) -> int:
    """Processes of a training stage on this machine."""
    if config.runtime.processes is not None:
        return config.runtime.processes
    if config.runtime.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _environment(config: PipelineConfig) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cpu = {"DS_ACCELERATOR": "cpu"} if config.runtime.device == "cpu" else {}
    cpu[LAUNCHER_VARIABLE] = str(os.getpid())
    return {**os.environ, **cpu, "PATH": path, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
