"""Metrics and artifacts of a run: the local files are the truth, MLflow mirrors them in the background.

Training never waits for MLflow: `log` appends a line to `metrics.jsonl`, and a thread (`mirror.Mirror`) sends
lines on. What it could not send is sent later, by the same command or by `vitruvian sync`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig
from pipeline.errors import ConfigError
from pipeline.status import held, read_status
from pipeline.tracking.metrics_file import MetricsFile, RunRecord
from pipeline.tracking.mirror import Mirror, short_reason
from pipeline.tracking.mounts import network_file_system

logger = logging.getLogger(__name__)

_RUN_ID_SECONDS = 5.0
_CLOSED_AS = {"stopped": "KILLED", "failed": "FAILED"}


class Tracker:
    """What a stage reports to. Only rank 0 has one that writes; the others' does nothing."""

    def __init__(
        self,
        pipeline: PipelineConfig,
        run_dir: Path | None,
        run_name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, Any],
        datasets: Sequence[Mapping[str, str]],
    ) -> None:
        self._run_dir, self._mirror = run_dir, None
        self._record = RunRecord(run_name, tags, parameters, datasets)
        self._file = MetricsFile(run_dir / "metrics.jsonl") if run_dir else None
        uri = live_uri(pipeline) if run_dir else None
        if run_dir and uri:
            self._mirror = Mirror(pipeline, run_dir, self._record, uri)
        elif run_dir and tracking_uri(pipeline):
            logger.warning(
                "%s lies on a network file system, where several writers damage a database: metrics and artifacts stay "
                "in %s; send them with: vitruvian sync PIPELINE",
                tracking_uri(pipeline),
                run_dir,
            )

    def start(self, resume_step: int) -> None:
        """Cuts the local file to `resume_step` and opens the mirror, in the background."""
        if self._file and self._run_dir:
            self._file.cut(resume_step)
            self._record.write(self._run_dir)
        if self._mirror:
            self._mirror.start()

    def log(self, event: str, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of a step. An event (`train`, `evaluation`) has at most one line per step."""
        if self._file:
            self._file.append(event, step, metrics)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, where there is one by now."""
        return self._mirror.run_id if self._mirror else None

    def await_run_id(self) -> str | None:
        """The MLflow run. Waits up to five seconds while the mirror makes its first attempt to connect."""
        if self._mirror:
            self._mirror.await_first_attempt(_RUN_ID_SECONDS)
        return self.run_id

    def finish(self, status: str, artifact: Path | None = None) -> None:
        """Sends what is left, within a bound (see `Mirror.finish`), and closes the run as FINISHED, FAILED or KILLED."""
        if self._mirror:
            self._mirror.finish(status, artifact)


def tracking_uri(pipeline: PipelineConfig) -> str | None:
    """The MLflow URI in force; None for none."""
    if pipeline.tracking.uri != "auto":
        return pipeline.tracking.uri
    return f"sqlite:///{pipeline.workspace.absolute() / 'mlflow.db'}"


def live_uri(pipeline: PipelineConfig) -> str | None:
    """Where a stage may send while it runs: nowhere if that is a sqlite file on a network file system."""
    uri = tracking_uri(pipeline)
    if uri and uri.startswith("sqlite:///") and network_file_system(Path(uri.removeprefix("sqlite:///"))):
        return None
    return uri


def is_synced(pipeline: PipelineConfig, run_dir: Path | None) -> bool:
    """True where the stage's own command has nothing to send for a finished stage."""
    return run_dir is None or Mirror.is_complete(run_dir) or live_uri(pipeline) is None


def sync(
    pipeline: PipelineConfig,
    run_dir: Path,
    run_name: str,
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    datasets: Sequence[Mapping[str, str]],
) -> None:
    """Uploads what a finished stage could not upload while MLflow was down. Does nothing where nothing is left."""
    uri = live_uri(pipeline)
    if uri and not is_synced(pipeline, run_dir):
        mirror = Mirror(pipeline, run_dir, RunRecord(run_name, tags, parameters, datasets), uri)
        mirror.finish("FINISHED", run_dir / "artifact")


def sync_all(pipeline: PipelineConfig) -> Iterator[dict[str, Any]]:
    """Sends what all run directories of a pipeline hold and MLflow lacks, of finished stages and others, one by one.

    Gives a row for each: `stage`, `run directory`, `lines` sent, `state`, and `failed`. Only one process at a time may do
    this in a workspace. Raises ConfigError where another does, or where tracking.uri is null.
    """
    uri = tracking_uri(pipeline)
    if uri is None:
        raise ConfigError("tracking.uri is null: say where MLflow is, as in tracking.uri=http://127.0.0.1:5000")
    with _only_sync(pipeline.workspace):
        for path in sorted((pipeline.workspace / pipeline.name).glob("*/*/tracking.json")):
            if ".old-" not in path.parent.name:  # set aside by --fresh: another run has taken its place
                yield {"stage": path.parent.parent.name, "run directory": str(path.parent)} | _send(pipeline, path, uri)


def _send(pipeline: PipelineConfig, path: Path, uri: str) -> dict[str, Any]:
    run_dir = path.parent
    if Mirror.is_complete(run_dir):
        return {"lines": 0, "state": "nothing left", "failed": False}
    artifact = run_dir / "artifact"
    done = (artifact / "manifest.json").is_file()
    status = "FINISHED" if done else _CLOSED_AS.get(read_status(run_dir).get("state", ""))
    try:
        mirror = Mirror(pipeline, run_dir, RunRecord.read(path), uri)
        lines = mirror.push(status, artifact if done else None)
    except ConfigError:
        return {"lines": 0, "state": "another process sends it", "failed": False}
    except Exception as error:  # whatever MLflow raises: the other runs may be in order
        return {"lines": 0, "state": short_reason(error), "failed": True}
    return {"lines": lines, "state": "finished" if done else "sent so far", "failed": False}


@contextmanager
def _only_sync(workspace: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(held(workspace / ".sync"))
        except ConfigError:
            raise ConfigError(f"{workspace}: another `vitruvian sync` is at work here; wait for it") from None
        yield


def system_metrics() -> dict[str, float]:
    """Load of the machine and memory of this process, for the run's record."""
    import psutil
    import torch

    found = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_gib": psutil.Process().memory_info().rss / 2**30,
        "system/memory_percent": psutil.virtual_memory().percent,
    }
    if torch.cuda.is_available():
        found["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
