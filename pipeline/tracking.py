"""Metrics: the local JSONL is the truth, MLflow mirrors it in the background.

Each line of `metrics.jsonl` is `{"time": ms, "step": n, "event": "train", "metrics": {...}}`. On resume the file is cut
to the resume step. A thread sends lines to MLflow with their recorded time, remembering per event the last step it
sent: a repeated step is not sent again, and an outage only delays. Training never waits for MLflow.
"""

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig
from pipeline.files import publish_folder, read_json, write_json, write_text

logger = logging.getLogger(__name__)

# A dead server must not hold a thread for minutes: the mirror retries by itself.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

_FINAL_SYNC_SECONDS = 30.0
_STOPPED_SYNC_SECONDS = 1.0
_LINES_A_REQUEST = 50
_UPLOAD_BYTES_PER_SECOND = 5e6


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
        """All whole lines; a line torn by a kill, or of another form, is left out."""
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if _is_line(line):
                lines.append(line)
        return lines

    def cut(self, step: int) -> None:
        """Drops the lines after `step`: the resumed run writes them again."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.is_file():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def _is_line(line: Any) -> bool:
    kinds = {"time": int, "step": int, "event": str, "metrics": dict}
    return isinstance(line, dict) and all(isinstance(line.get(key), kind) for key, kind in kinds.items())


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
        self._file = MetricsFile(run_dir / "metrics.jsonl") if run_dir else None
        uri = tracking_uri(pipeline)
        self._mirror = Mirror(pipeline, run_dir, run_name, tags, uri) if run_dir and uri else None
        self._parameters, self._datasets = parameters, datasets

    def start(self, resume_step: int) -> None:
        """Cuts the local file to `resume_step` and opens the mirror, in the background."""
        if self._file:
            self._file.cut(resume_step)
        if self._mirror:
            self._mirror.start(self._parameters, self._datasets)

    def log(self, event: str, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of a step. An event (`train`, `evaluation`) has at most one line per step."""
        if self._file:
            self._file.append(event, step, metrics)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, where there is one by now."""
        return self._mirror.run_id if self._mirror else None

    def finish(self, status: str, artifact: Path | None = None) -> None:
        """Sends what is left, within a bound, and closes the run as FINISHED, FAILED or KILLED."""
        if self._mirror:
            self._mirror.finish(status, artifact)


def tracking_uri(pipeline: PipelineConfig) -> str | None:
    """The MLflow URI in force; None for none."""
    if pipeline.tracking.uri != "auto":
        return pipeline.tracking.uri
    return f"sqlite:///{pipeline.workspace.absolute() / 'mlflow.db'}"


def is_synced(pipeline: PipelineConfig, run_dir: Path | None) -> bool:
    """True where `sync` has nothing to do for a finished stage."""
    return tracking_uri(pipeline) is None or run_dir is None or Mirror.is_complete(run_dir)


def sync(
    pipeline: PipelineConfig,
    run_dir: Path,
    run_name: str,
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
    datasets: Sequence[Mapping[str, str]],
) -> None:
    """Uploads what a finished stage could not upload while MLflow was down. Does nothing where nothing is left."""
    uri = tracking_uri(pipeline)
    if uri and not is_synced(pipeline, run_dir):
        mirror = Mirror(pipeline, run_dir, run_name, tags, uri)
        mirror.start(parameters, datasets)
        mirror.finish("FINISHED", run_dir / "artifact")


class Mirror:
    """The thread that copies one run directory's metrics and artifact to its MLflow run."""

    def __init__(
        self, pipeline: PipelineConfig, run_dir: Path, run_name: str, tags: Mapping[str, str], uri: str
    ) -> None:
        self._pipeline, self._run_dir, self._run_name = pipeline, run_dir, run_name
        self._tags, self._uri = {_key(name): value for name, value in tags.items()}, uri
        self._state_path = run_dir / "mlflow.json"
        state = read_json(self._state_path) if self._state_path.is_file() else {}
        if state.get("uri") != uri:  # another server knows nothing of the run
            state = {}
        self.run_id: str | None = state.get("run_id")
        self._sent: dict[str, int] = state.get("sent", {})
        self._client: Any = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._parameters: Mapping[str, Any] = {}
        self._datasets: Sequence[Mapping[str, str]] = ()
        self._complained = False

    @staticmethod
    def is_complete(run_dir: Path) -> bool:
        """True once the artifact was uploaded and the run closed."""
        path = run_dir / "mlflow.json"
        return path.is_file() and bool(read_json(path).get("complete"))

    def start(self, parameters: Mapping[str, Any], datasets: Sequence[Mapping[str, str]]) -> None:
        """Begins to mirror."""
        self._parameters, self._datasets = parameters, datasets
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def finish(self, status: str, artifact: Path | None) -> None:
        """Stops the thread, then sends the rest within a bound; failing that, the next run of the stage does."""
        self._stop.set()
        # Who was asked to stop, stops: the next run of the stage sends what is left.
        patience = _FINAL_SYNC_SECONDS if status == "FINISHED" else _STOPPED_SYNC_SECONDS
        if self._thread:
            self._thread.join(patience)
        closing = threading.Thread(target=self._close, args=(status, artifact), daemon=True)
        closing.start()
        size = sum(path.stat().st_size for path in _uploaded(artifact)) if artifact else 0
        closing.join(patience * 4 + size / _UPLOAD_BYTES_PER_SECOND)
        if not self.is_complete(self._run_dir) and status == "FINISHED":
            logger.warning("MLflow at %s did not take everything; the same command sends the rest later", self._uri)

    def _loop(self) -> None:
        wait = 2.0
        while True:
            done = self._stop.wait(wait)
            try:
                with self._lock:
                    self._send_new_lines()
                wait, self._complained = 2.0, False
            except Exception as error:  # whatever MLflow raises, training goes on
                self._complain(error)
                wait = min(60.0, wait * 2)
            if done:
                return

    def _close(self, status: str, artifact: Path | None) -> None:
        try:
            with self._lock:
                self._send_new_lines()
                assert self._client is not None
                if artifact is not None:
                    self._upload(artifact)
                self._client.set_terminated(self.run_id, status=status)
                self._save_state(complete=status == "FINISHED")
        except Exception as error:  # see _loop
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            logger.warning(
                "MLflow at %s: %s; metrics stay in %s and are sent later", self._uri, _short(error), self._run_dir
            )
        self._complained = True

    def _connect(self) -> None:
        if self._client is not None:
            return
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        experiment = self._experiment(client)
        if self.run_id is None:
            parent = self._parent_run(client, experiment)
            tags = {**self._tags, "mlflow.runName": self._run_name, "mlflow.parentRunId": parent}
            self.run_id = client.create_run(experiment, tags=tags).info.run_id
            self._save_state()
        else:
            client.update_run(self.run_id, status="RUNNING")
        for key, value in self._parameters.items():
            client.log_param(self.run_id, _key(key), str(value)[:6000])
        self._log_datasets(client)
        self._client = client

    def _experiment(self, client: Any) -> str:
        name = self._pipeline.tracking.experiment or self._pipeline.name
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        local = self._uri.startswith("sqlite:")
        store = self._pipeline.workspace.absolute() / "mlartifacts"
        return client.create_experiment(name, artifact_location=store.as_uri() if local else None)

    def _parent_run(self, client: Any, experiment: str) -> str:
        """The pipeline's run, under which its stages' runs are nested."""
        where = str(self._pipeline.workspace.absolute() / self._pipeline.name)
        found = client.search_runs([experiment], f"tags.`vitruvian.pipeline_dir` = '{where}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"mlflow.runName": self._pipeline.name, "vitruvian.pipeline_dir": where}
        run = client.create_run(experiment, tags=tags)
        client.set_terminated(run.info.run_id, status="FINISHED")
        return run.info.run_id

    def _log_datasets(self, client: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput

        inputs = [
            DatasetInput(Dataset(data["name"][:500], data["digest"][:36], "local", json.dumps({"uri": data["source"]})))
            for data in self._datasets
        ]
        if inputs:
            client.log_inputs(self.run_id, inputs)

    def _send_new_lines(self) -> None:
        from mlflow.entities import Metric

        self._connect()
        lines = MetricsFile(self._run_dir / "metrics.jsonl").read()
        new = [line for line in lines if line["step"] > self._sent.get(line["event"], -1)]
        for start in range(0, len(new), _LINES_A_REQUEST):
            chunk = new[start : start + _LINES_A_REQUEST]
            metrics = [
                Metric(_key(key), float(value), line["time"], line["step"])
                for line in chunk
                for key, value in line["metrics"].items()
            ]
            for first in range(0, len(metrics), 1000):
                self._client.log_batch(self.run_id, metrics=metrics[first : first + 1000])
            for line in chunk:
                self._sent[line["event"]] = line["step"]
            self._save_state()

    def _upload(self, artifact: Path) -> None:
        for path in _uploaded(artifact):
            folder = path.parent.relative_to(artifact).as_posix()
            self._client.log_artifact(self.run_id, str(path), "artifact" if folder == "." else f"artifact/{folder}")

    def _save_state(self, complete: bool = False) -> None:
        write_json(
            self._state_path, {"run_id": self.run_id, "uri": self._uri, "sent": self._sent, "complete": complete}
        )


def _uploaded(artifact: Path) -> list[Path]:
    """An artifact's files but for raw data and shards: those stay where they are, named by the manifest."""
    files = (path for path in sorted(artifact.rglob("*")) if path.is_file())
    return [path for path in files if path.relative_to(artifact).parts[0] not in ("raw", "shards")]


def download(uri: str, destination: Path, *, run_id: str | None = None, fingerprint: str | None = None) -> bool:
    """Fetches the artifact of an MLflow run, by id or by the fingerprint of a FINISHED run, as `destination/artifact`.

    False where no such run exists. The caller verifies the digests. Raises whatever MLflow raises.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if run_id is None:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        query = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
        runs = client.search_runs(experiments, query, max_results=1)
        if not runs:
            return False
        run_id = runs[0].info.run_id
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=destination) as folder:
        client.download_artifacts(run_id, "artifact", folder)
        publish_folder(Path(folder) / "artifact", destination / "artifact")
    # It is there already: nothing is left to send.
    write_json(destination / "mlflow.json", {"run_id": run_id, "uri": uri, "sent": {}, "complete": True})
    return True


def published_digest(uri: str, fingerprint: str) -> str | None:
    """The digest of the artifact that MLflow has of a FINISHED run; None where it has none. Raises whatever it raises."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    runs = client.search_runs(experiments, query, max_results=1)
    if not runs:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(runs[0].info.run_id, "artifact/manifest.json", folder)
        return read_json(Path(path))["digest"]


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


def _key(name: str) -> str:
    """A name that MLflow takes: what users call their models is up to them."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
