"""The mirror: sends a run directory's metrics and artifact to MLflow, in the background, each line exactly once.

It may lose its server at any point and for any time, and its process at any point. MLflow stores the metrics of a request
together or not at all, and lines are sent in order; so after any doubt (a start, an error) the last step that the server
has says what is left to send, and an answer that was lost doubles nothing.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.artifacts import without_passwords
from pipeline.config import PipelineConfig
from pipeline.files import read_json, write_json
from pipeline.status import held
from pipeline.tracking.metrics_file import MetricsReader, RunRecord
from pipeline.tracking.mlflow_run import METRICS_A_REQUEST, MlflowRun, metrics_of, uploaded_files

logger = logging.getLogger(__name__)

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 60.0
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 5.0
_UPLOAD_BYTES_PER_SECOND = 5e6
_LAST_ATTEMPTS, _LAST_PAUSE_SECONDS = 3, 1.0
_REST_PER_WORK = 4.0


class Mirror:
    """Of one run directory; `start` and `finish` for a thread beside the training, or `push` for all at once."""

    def __init__(self, pipeline: PipelineConfig, run_dir: Path, record: RunRecord, uri: str) -> None:
        self._pipeline, self._run_dir, self._record, self._uri = pipeline, run_dir, record, uri
        self._shown = without_passwords(uri)
        self._load_state()
        self._reader = MetricsReader(run_dir / "metrics.jsonl")
        self._waiting: list[dict[str, Any]] = []
        self._lines_sent = 0
        self._run: MlflowRun | None = None
        self._closing: tuple[str | None, Path | None] = (None, None)
        self._stop, self._attempted = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._holds, self._alone = ExitStack(), False
        self._complaint: str | None = None

    @staticmethod
    def is_complete(run_dir: Path) -> bool:
        """True once the artifact was uploaded and the run closed."""
        return bool(_read_state(run_dir).get("complete"))

    def start(self) -> None:
        """Begins to mirror, in the background."""
        self._thread = threading.Thread(target=self._mirror, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def await_first_attempt(self, seconds: float) -> None:
        """Waits until `run_id` is known or a first error came, at most so long."""
        if self._thread:
            self._attempted.wait(seconds)

    def finish(self, status: str, artifact: Path | None) -> None:
        """Sends the rest and closes the run, within a bound; failing that, the next run of the stage does.

        The bound is a minute, and a second for every 5 MB of the artifact. Who was asked to stop, or failed, leaves after
        five seconds.
        """
        self._closing = (status, artifact)
        self._stop.set()
        if self._thread is None:
            self.start()
        assert self._thread is not None
        size = sum(path.stat().st_size for path in uploaded_files(artifact)) if artifact else 0
        bound = _FINISH_SECONDS + size / _UPLOAD_BYTES_PER_SECOND if status == "FINISHED" else _STOP_SECONDS
        self._thread.join(bound)
        if status == "FINISHED" and not self.is_complete(self._run_dir):
            reason = self._complaint or f"not done after {bound:.0f} s"
            logger.warning(
                "MLflow at %s did not take everything (%s); the same command, or vitruvian sync, sends the rest",
                self._shown,
                reason,
            )

    def push(self, status: str | None, artifact: Path | None) -> int:
        """Sends everything now, in this thread, and returns the number of lines sent. status: None leaves the run open.

        Raises whatever MLflow raises, ConfigError where another process mirrors this run directory.
        """
        self._closing = (status, artifact)
        self._stop.set()
        with self._holds:
            for attempts_left in reversed(range(_LAST_ATTEMPTS)):
                try:
                    self._send_and_close()
                    break
                except Exception:
                    self._run = None
                    if not attempts_left:
                        raise
                    time.sleep(_LAST_PAUSE_SECONDS)
        return self._lines_sent

    def _mirror(self) -> None:
        pause = 0.0
        with self._holds:
            while not self._stop.wait(pause):
                went_well = self._try(self._send)
                pause = _PAUSE_SECONDS if went_well else min(_LONGEST_PAUSE_SECONDS, max(_PAUSE_SECONDS, 2 * pause))
            for attempts_left in reversed(range(_LAST_ATTEMPTS)):
                if self._try(self._send_and_close) or not attempts_left:
                    return
                time.sleep(_LAST_PAUSE_SECONDS)

    def _try(self, action: Callable[[], None]) -> bool:
        """True where it went well. Whatever MLflow raises, training goes on."""
        try:
            action()
        except Exception as error:
            self._run = None  # what arrived is to be asked again
            first, self._complaint = self._complaint is None, short_reason(error)
            if first:
                where = self._run_dir
                logger.warning(
                    "MLflow at %s: %s; metrics stay in %s and are sent later", self._shown, self._complaint, where
                )
            return False
        finally:
            self._attempted.set()
        if self._complaint is not None:
            logger.info("MLflow at %s is back and has everything so far", self._shown)
        self._complaint = None
        return True

    def _send(self) -> None:
        """Sends the lines that the file has and MLflow lacks."""
        run = self._connected()
        self._waiting += self._reader.new_lines()
        while self._waiting:
            began = time.thread_time()
            taken, lines, sent = self._next_request()
            if lines:
                run.send(lines)
                self._sent = sent
                self._lines_sent += len(lines)
                self._save_state()
            del self._waiting[:taken]
            # After an outage there is much to send: leave the interpreter to the training.
            self._stop.wait(_REST_PER_WORK * (time.thread_time() - began))

    def _next_request(self) -> tuple[int, list[dict[str, Any]], dict[str, int]]:
        """How many of the waiting lines to take; those of them that MLflow lacks; what it then has."""
        lines: list[dict[str, Any]] = []
        sent, size = dict(self._sent), 0
        for taken, line in enumerate(self._waiting):
            if line["step"] <= sent.get(line["event"], -1):
                continue
            size += len(line["metrics"])
            if lines and size > METRICS_A_REQUEST:
                return taken, lines, sent
            lines.append(line)
            sent[line["event"]] = line["step"]
        return len(self._waiting), lines, sent

    def _send_and_close(self) -> None:
        status, artifact = self._closing
        self._send()
        run = self._connected()
        if artifact is not None:
            run.upload(artifact)
        if status is not None:
            run.close(status)
        self._save_state(complete=status == "FINISHED")

    def _connected(self) -> MlflowRun:
        if self._run is not None:
            return self._run
        if not self._alone:
            self._holds.enter_context(held(self._run_dir / ".mlflow"))
            self._alone = True
            self._load_state()  # another may have held it until now
        self._reader = MetricsReader(self._run_dir / "metrics.jsonl")
        self._waiting = self._reader.new_lines()
        started = self._waiting[0]["time"] if self._waiting else None
        self._save_state()  # the mark, before there is a run that has it
        run = MlflowRun(self._pipeline, self._uri, self._record, self.run_id, self._mark, started)
        if run.gone:
            text = "MLflow at %s: run %s %s; run %s gets everything again from %s"
            logger.warning(text, self._shown, self.run_id, run.gone, run.run_id, self._run_dir)
            self._sent = {}
        self.run_id = run.run_id
        self._take_stock(run.last_steps)
        self._save_state()
        self._run = run
        return run

    def _take_stock(self, last_steps: dict[str, int]) -> None:
        """Believes the server about what it has: an answer may have been lost, a server set back to a backup.

        It knows the last step of each metric; those that no other event has tell of their event.
        """
        names: dict[str, set[str]] = {}
        for line in self._waiting:
            names.setdefault(line["event"], set()).update(metrics_of(line))
        for event, own in names.items():
            own = own.difference(*(others for other, others in names.items() if other != event))
            if own:
                self._sent[event] = max((last_steps[name] for name in own if name in last_steps), default=-1)

    def _load_state(self) -> None:
        state = _read_state(self._run_dir)
        self._mark: str = state.get("mark") or uuid.uuid4().hex
        same = state.get("uri") == self._shown  # another server knows nothing of the run, or knows its mark
        self.run_id: str | None = state.get("run_id") if same else None
        self._sent: dict[str, int] = state.get("sent", {}) if same else {}

    def _save_state(self, complete: bool = False) -> None:
        state = {"run_id": self.run_id, "uri": self._shown, "mark": self._mark, "sent": self._sent}
        write_json(self._run_dir / "mlflow.json", state | {"complete": complete})


def _read_state(run_dir: Path) -> dict[str, Any]:
    """What the mirror remembers; nothing where that can't be read: the server knows the rest."""
    try:
        state = read_json(run_dir / "mlflow.json")
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def short_reason(error: BaseException) -> str:
    """The first line of what an error comes from: `Connection refused` rather than the libraries' wrappings."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
