"""Real ranks of a stage, forked from a process that has imported everything: a launch takes a second, not ten.

Run as a program it is that process: it reads one request a line (JSON) and answers each with a line. It does what a
launcher does: starts the ranks, and kills the others when one ends badly.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from stages import KINDS, module_of
from tests.chain.running import ROOT, environment


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    codes: list[int]
    """Of each rank; -9 for one that was killed."""
    seconds: float
    log: str
    """What all ranks printed."""


class Ranks:
    """The client. A context manager: leaving it ends the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __enter__(self) -> "Ranks":
        command = [sys.executable, "-m", "tests.faults.ranks"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(
        self, ranks: int, arguments: list[str], fault: dict[str, Any] | None = None, port: int | None = None
    ) -> Outcome:
        """One launch of `run_stage.py arguments`, to its end. port: where the ranks meet; a free one unless given."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        log = self._folder / f"launch-{self._count}.txt"
        request = {"ranks": ranks, "arguments": arguments, "fault": fault, "log": str(log), "port": port}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Outcome(answer["codes"], answer["seconds"], log.read_text())


def _serve() -> None:
    _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        codes = _launch(request)
        print(json.dumps({"codes": codes, "seconds": time.perf_counter() - started}), flush=True)


def _import_everything() -> None:
    """No thread may run yet: only the forking thread lives on in a child."""
    for name in (
        "deepspeed",
        "launchers.run_stage",
        "pipeline.training",
        "pipeline.engine",
        "pipeline.evaluation.report",
    ):
        import_module(name)
    for kind in KINDS:
        module_of(kind)


def _launch(request: dict[str, Any]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = request["port"] or probe.getsockname()[1]
    count = request["ranks"]
    sys.stdout.flush()
    ranks: dict[int, int] = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _be(rank, port, request)
        ranks[child] = rank
    codes = [0] * count
    while ranks:
        child, status = os.wait()
        if child not in ranks:
            continue
        code = os.waitstatus_to_exitcode(status)
        codes[ranks.pop(child)] = code
        if code not in (0, 75):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return codes


def _be(rank: int, port: int, request: dict[str, Any]) -> None:
    """The life of one rank."""
    from launchers import run_stage
    from tests.faults.injection import install

    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0), os.dup2(output, 1), os.dup2(output, 2)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
    os.environ |= {**{key: str(value) for key, value in world.items()}, "MASTER_ADDR": "127.0.0.1"}
    install(request["fault"], rank)
    run_stage.leave(run_stage.main(request["arguments"]))


if __name__ == "__main__":
    _serve()
