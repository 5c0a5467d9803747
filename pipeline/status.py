"""The status file of a run directory: what people and scripts read, whatever exit code a launcher makes of it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import ConfigError
from pipeline.files import read_json, write_json


class Status:
    """Writes `<run directory>/status.json`. Only rank 0's writes; the others' does nothing."""

    def __init__(self, run_dir: Path, writes: bool) -> None:
        self._path = run_dir / "status.json"
        self._writes = writes
        before = {key: value for key, value in read_status(run_dir).items() if key not in ("exit_code", "message")}
        self._content: dict[str, Any] = {**before, "pid": os.getpid(), "host": socket.gethostname()}

    def running(self, step: int, steps: int) -> None:
        """Progress of a training stage, in optimizer steps."""
        self._write(state="running", step=step, steps=steps)

    def saved(self, step: int) -> None:
        """A resume point of this step was published."""
        self._write(saved_step=step)

    def ended(self, state: str, exit_code: int, message: str = "") -> None:
        """The process leaves: done, stopped or failed."""
        self._write(state=state, exit_code=exit_code, message=message)

    def _write(self, **values: Any) -> None:
        if self._writes:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._content |= {**values, "updated": now}
            write_json(self._path, self._content)


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds a run directory: a second process on it is refused. The system frees a dead holder's lock.

    Raises ConfigError that says who holds it.
    """
    with _locked(run_dir / "lock", fcntl.LOCK_EX) as lock:
        _sign(lock, f"process {os.getpid()} on {socket.gethostname()}")
        yield


def holder(run_dir: Path) -> int | None:
    """The process of this machine that holds a run directory, or was the last to hold it; None where none was."""
    try:
        words = (run_dir / "lock").read_text(encoding="utf-8").split()
    except OSError:
        return None
    here = len(words) == 4 and words[0] == "process" and words[3] == socket.gethostname()
    return int(words[1]) if here and words[1].isdecimal() else None


@contextmanager
def held_part(run_dir: Path, part: tuple[int, int]) -> Iterator[None]:
    """Holds part I of N of a run directory's work, beside the holders of other parts; nobody holds the whole meanwhile.

    Raises ConfigError that says who holds it.
    """
    name = f"lock-{part[0]}-of-{part[1]}"
    with _locked(run_dir / "lock", fcntl.LOCK_SH) as whole, _locked(run_dir / name, fcntl.LOCK_EX) as own:
        _sign(whole, "the jobs that make its parts")
        _sign(own, f"process {os.getpid()} on {socket.gethostname()}")
        yield


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[TextIO]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ConfigError(
                    f"{path.parent}: is being run by {lock.read().strip() or 'another process'}; wait or stop it"
                ) from None
            if not _is_at(lock, path):  # another process moved the folder meanwhile: this is the lock of the moved one
                continue
            yield lock
            return


def _is_at(lock: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(lock: TextIO, holder: str) -> None:
    lock.truncate(0)
    lock.write(f"{holder}\n")
    lock.flush()


def read_status(run_dir: Path) -> dict[str, Any]:
    """The content of a status file; empty where there is none or it can't be read."""
    try:
        content = read_json(run_dir / "status.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
