"""What a run directory holds of tracking: the metrics as JSON lines, and what is to be said of the run.

Each line of `metrics.jsonl` is `{"time": ms, "step": n, "event": "train", "metrics": {...}}`. It is the truth: on resume
it is cut to the resume step, and whatever else shows metrics gets them from it. `tracking.json` has the run's name, tags,
parameters and data sets, so that `vitruvian sync` needs nothing but the folder.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json, write_text


class MetricsFile:
    """The JSONL file of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one line, at once on disk."""
        line = {"time": int(time.time() * 1000), "step": step, "event": event, "metrics": dict(metrics)}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line torn by a kill is left out."""
        return _lines(self.path.read_bytes()) if self.path.is_file() else []

    def cut(self, step: int) -> None:
        """Drops the lines after `step`: the resumed run writes them again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.is_file():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


class MetricsReader:
    """Follows a metrics file: each call gives the lines that came since the last, and reads no others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._inode = 0, 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Lines added since the last call. Of a file that was cut meanwhile, all lines: it is another file."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            status = os.fstat(stream.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._offset, self._inode = 0, status.st_ino
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]  # a last line without an end is still being written
        self._offset += len(whole)
        return _lines(whole)


@dataclass(frozen=True)
class RunRecord:
    """What a tracker says of a run besides its metrics."""

    name: str
    tags: Mapping[str, str]
    parameters: Mapping[str, Any]
    datasets: Sequence[Mapping[str, str]]
    """Of each: name, digest, source."""

    def write(self, run_dir: Path) -> None:
        """Leaves it in the run directory."""
        write_json(run_dir / "tracking.json", asdict(self))

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Of a `tracking.json`. Raises OSError, ValueError or TypeError."""
        return cls(**read_json(path))


def _lines(content: bytes) -> list[dict[str, Any]]:
    found = []
    for text in content.split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_line(line):
            found.append(line)
    return found


def _is_line(line: Any) -> bool:
    if (
        not isinstance(line, dict)
        or not isinstance(line.get("metrics"), dict)
        or not isinstance(line.get("event"), str)
    ):
        return False
    numbers = (line.get("time"), line.get("step"), *line["metrics"].values())
    return all(isinstance(number, (int, float)) for number in numbers)
