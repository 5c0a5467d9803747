"""A rank that stops answering ends the job, with the stacks of the ranks that still run and a word on each of them.

Every rank keeps `<run directory>/heartbeats/rank-00000.json`: what its main thread last did, and when. A thread watches
that of its own: one silent rank holds up all others in their next collective, so each that is not stopped itself
notices. It tells what every rank did last, prints all stacks and ends the process; the launcher ends the others.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.files import read_json, write_json

logger = logging.getLogger(__name__)

EXIT_HUNG = 1
_WRITE_EVERY = 2.0  # seconds
LAUNCHER_VARIABLE = "VITRUVIAN_LAUNCHER"
"""The process on whose behalf a stage runs, where it says so."""
STOP_FILE = "STOP"
"""In the run directory: whoever makes it asks the stage to stop."""


class Heartbeat:
    """This rank's sign of life, and the thread that watches it."""

    def __init__(
        self, run_dir: Path, rank: int, limit: float | None, leave: Callable[[], None], *, looks: bool = False
    ) -> None:
        """limit: seconds without a beat after which the process ends; None: never.

        leave is called when the launcher of this process is gone: nobody would collect it. With `looks` also when
        somebody touches the file `STOP`, for which a training stage looks itself.
        """
        self._folder, self._rank, self.limit = run_dir / "heartbeats", rank, limit
        self._leave = leave
        self._file, self._looks = run_dir / STOP_FILE, looks
        self._touched = _time_of(self._file)  # by an earlier request, which is not for this process
        self._what, self._last, self._written = "", 0.0, 0.0
        self._stopped = threading.Event()
        self._every = 1.0 if looks else min(5.0, (limit or 50.0) / 10)
        self._launchers = _launchers()

    def start(self, what: str) -> None:
        """The first beat."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.beat(what)
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def beat(self, what: str) -> None:
        """The main thread is alive and has done this. Cheap enough for every batch."""
        self._what, self._last = what, time.monotonic()
        if self._last - self._written > _WRITE_EVERY:
            self._written = self._last
            said = {"what": what, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
            write_json(self._folder / f"rank-{self._rank:05d}.json", said)
            if self.limit is not None:
                # For a hang that holds the interpreter's lock, where the thread below can't run either.
                faulthandler.dump_traceback_later(self.limit * 1.5 + 10, exit=True)

    def stop(self) -> None:
        """The stage is over."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._every):
            silent = time.monotonic() - self._last
            if self.limit is not None and silent > self.limit:
                self._give_up(silent)
            if not all(map(_is_alive, self._launchers)):
                logger.error("the launcher is gone: stopping")
                self._launchers = []
                self._leave()
            if self._looks and _time_of(self._file) not in (None, self._touched):
                self._looks = False
                self._leave()

    def _give_up(self, silent: float) -> None:
        logger.error("no progress for %.0f s (runtime.hang_minutes); the last signs of life:", silent)
        for line in last_signs(self._folder):
            logger.error("  %s", line)
        streams = [handler.stream for handler in logging.getLogger().handlers if hasattr(handler, "stream")]
        for stream in streams or [sys.stderr]:
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        # The launcher ends the others as soon as one leaves: they, who wait for the same step, get to tell theirs.
        time.sleep(2 * self._every + 1)
        os._exit(EXIT_HUNG)


def last_signs(folder: Path) -> list[str]:
    """A line for each rank, the one that has been silent longest first."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            said = read_json(path)
            rank, when = int(path.stem.removeprefix("rank-")), float(said["time"])
            found.append((when, f"rank {rank} on {said['host']}, process {said['pid']}: {said['what']}"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    now = time.time()
    return [f"{line}, {now - when:.0f} s ago" for when, line in sorted(found)]


def _launchers() -> list[psutil.Process]:
    """The processes that wait for this one, where it was started by a launcher; a plain python has none.

    deepspeed has two, one inside the other.
    """
    found = []
    if os.environ.get(LAUNCHER_VARIABLE, "").isdigit():
        found.append(int(os.environ[LAUNCHER_VARIABLE]))
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in parent.cmdline():
            found += [parent.pid, parent.ppid()]
        elif "TORCHELASTIC_RUN_ID" in os.environ or parent.name() == "slurmstepd":
            found.append(parent.pid)
        return [psutil.Process(pid) for pid in found if pid > 1]
    except psutil.Error:
        return []


def _time_of(file: Path) -> int | None:
    """When a file was last touched; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
