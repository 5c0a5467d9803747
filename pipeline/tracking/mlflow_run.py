"""One run on an MLflow server: found or made, told what it is, sent metrics and an artifact. Only here MLflow is imported.

Every call may fail, and any answer may be lost. All of it can be done again: an experiment, the pipeline's run and a
stage's run are looked for before they are made, the last by a mark of its run directory.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_artifact, without_passwords
from pipeline.config import PipelineConfig
from pipeline.files import digest_of
from pipeline.tracking.metrics_file import RunRecord

logger = logging.getLogger(__name__)

# Nobody waits for the mirror, so it waits for a slow server. It repeats by itself what may be repeated; MLflow's own
# client would also repeat the creation of a run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

METRICS_A_REQUEST = 1000
"""MLflow takes no more, and stores those of one request together or not at all."""
_PARAMETERS_A_REQUEST = 100
_MARK, _PARENT_MARK = "vitruvian.run_mark", "vitruvian.pipeline_mark"


class MlflowRun:
    """An open connection to the run of one run directory. All methods raise whatever MLflow raises."""

    def __init__(
        self, pipeline: PipelineConfig, uri: str, record: RunRecord, run_id: str | None, mark: str, started: int | None
    ) -> None:
        """Finds the run by its id, else by the directory's mark, else makes it; and says what it is.

        started: when the run began, in ms since 1970, for one that is made now.
        """
        self._pipeline, self._uri, self._record, self._mark = pipeline, uri, record, mark
        self._client = mlflow_client(uri)
        self.gone: str | None = None
        """What happened to the run that was asked for, where this is another."""
        run = (self._known(run_id) if run_id else None) or self._marked() or self._new(started)
        self.run_id = str(run.info.run_id)
        self.last_steps = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
        """The last step that the server has of each metric."""
        if run.info.status in ("KILLED", "FAILED"):
            self._client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(run.data.params)
        self._log_datasets()

    def send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines of a metrics file, with their recorded times. With up to METRICS_A_REQUEST values all arrive or none."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, line["time"], line["step"]) for line in lines for key, value in metrics_of(line).items()
        ]
        for first in range(0, len(metrics), METRICS_A_REQUEST):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + METRICS_A_REQUEST])

    def upload(self, artifact: Path) -> None:
        """Sends the files that are not there yet in their whole size: the answer to a large one is easily lost."""
        there = self._sizes("artifact")
        for path in uploaded_files(artifact):
            place = Path("artifact") / path.relative_to(artifact)
            if there.get(place.as_posix()) != path.stat().st_size:
                self._client.log_artifact(self.run_id, str(path), place.parent.as_posix())
        self._client.set_tag(self.run_id, "digest", read_artifact(artifact).digest)

    def close(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status=status)

    def _known(self, run_id: str) -> Any:
        """The run of that id, if it is still there and still this stage's."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.gone = "does not exist any more"
            return None
        if run.info.lifecycle_stage != "active":
            self.gone = "was deleted"
        elif run.data.tags.get("fingerprint") != self._record.tags.get("fingerprint"):
            self.gone = "is another stage's"
        return None if self.gone else run

    def _marked(self) -> Any:
        """The run whose creation was not answered, or that was made while another server was in use."""
        query = f"tags.`{_MARK}` = '{self._mark}'"
        found = self._client.search_runs([self._experiment()], query, max_results=1, order_by=["start_time ASC"])
        return found[0] if found else None

    def _new(self, started: int | None) -> Any:
        experiment = self._experiment()
        own = {"mlflow.runName": self._record.name, "mlflow.parentRunId": self._parent(experiment), _MARK: self._mark}
        tags = {tracked_name(name): value for name, value in self._record.tags.items()} | own
        return self._client.create_run(experiment, start_time=started, tags=tags)

    def _experiment(self) -> str:
        name = self._pipeline.tracking.experiment or self._pipeline.name
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise RuntimeError(f"experiment {name!r} was deleted there; restore it, or set tracking.experiment")
            return str(found.experiment_id)
        local = self._uri.startswith("sqlite:")
        store = self._pipeline.workspace.absolute() / "mlartifacts"
        return str(self._client.create_experiment(name, artifact_location=store.as_uri() if local else None))

    def _parent(self, experiment: str) -> str:
        """The pipeline's run, under which its stages' runs are nested."""
        where = str(self._pipeline.workspace.absolute() / self._pipeline.name)
        mark = digest_of(where)[:32]  # a path may hold quotes, which a filter can't
        query = f"tags.`{_PARENT_MARK}` = '{mark}'"
        found = self._client.search_runs([experiment], query, max_results=1, order_by=["start_time ASC"])
        if found:
            return str(found[0].info.run_id)
        tags = {"mlflow.runName": self._pipeline.name, "vitruvian.pipeline_dir": where, _PARENT_MARK: mark}
        run = self._client.create_run(experiment, tags=tags)
        self._client.set_terminated(run.info.run_id, status="FINISHED")
        return str(run.info.run_id)

    def _log_parameters(self, there: Mapping[str, str]) -> None:
        """What the run lacks. MLflow lets no parameter change, and a change must not stop the metrics."""
        from mlflow.entities import Param

        wanted = {tracked_name(key): str(value)[:6000] for key, value in self._record.parameters.items()}
        other = [key for key, value in wanted.items() if there.get(key, value) != value]
        if other:
            logger.info(
                "MLflow at %s: run %s keeps its first value of %s, such as %s = %s where this is %s",
                without_passwords(self._uri),
                self.run_id,
                ", ".join(other),
                other[0],
                there[other[0]],
                wanted[other[0]],
            )
        new = [Param(key, value) for key, value in wanted.items() if key not in there]
        for first in range(0, len(new), _PARAMETERS_A_REQUEST):
            self._client.log_batch(self.run_id, params=new[first : first + _PARAMETERS_A_REQUEST])

    def _log_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput

        inputs = [
            DatasetInput(Dataset(data["name"][:500], data["digest"][:36], "local", json.dumps({"uri": data["source"]})))
            for data in self._record.datasets
        ]
        if inputs:
            self._client.log_inputs(self.run_id, inputs)

    def _sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for info in self._client.list_artifacts(self.run_id, folder):
            found |= self._sizes(info.path) if info.is_dir else {info.path: info.file_size}
        return found


def mlflow_client(uri: str) -> Any:
    """MLflow's client, which takes seconds to import, and for a new sqlite file seconds to make."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def uploaded_files(artifact: Path) -> list[Path]:
    """An artifact's files but for raw data and shards: those stay where they are, named by the manifest."""
    files = (path for path in sorted(artifact.rglob("*")) if path.is_file())
    return [path for path in files if path.relative_to(artifact).parts[0] not in ("raw", "shards")]


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line under the names that MLflow has them by."""
    return {tracked_name(name): float(value) for name, value in line["metrics"].items()}


def tracked_name(name: str) -> str:
    """A name that MLflow takes: what users call their models is up to them."""
    clean = re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)
    parts = (part.lstrip(".") for part in clean.split("/"))
    return "/".join(part for part in parts if part)[:250].rstrip("/") or "_"
