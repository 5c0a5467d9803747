"""Artifacts fetched from MLflow: whole and what they are said to be, or refused."""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, read_artifact, without_passwords
from pipeline.errors import ArtifactError
from pipeline.files import publish_folder, read_json, write_json
from pipeline.remote import retried
from pipeline.tracking.mlflow_run import mlflow_client


def download(uri: str, destination: Path, *, run_id: str | None = None, fingerprint: str | None = None) -> bool:
    """Fetches the artifact of an MLflow run, by id or by the fingerprint of a FINISHED run, as `destination/artifact`.

    False where no such run exists. Nothing is left there unless every file has the digest that its manifest names, and
    the manifest is what the run's tags say. Raises ArtifactError for that, and where finished runs of the fingerprint have
    different artifacts, and whatever MLflow raises.
    """
    where = f"MLflow at {without_passwords(uri)}"
    return retried(lambda: _download(mlflow_client(uri), uri, destination, run_id, fingerprint), where)


def published_digest(uri: str, fingerprint: str) -> str | None:
    """The digest of the artifact that MLflow has of a finished run of a fingerprint; None where it has none.

    Raises ArtifactError where finished runs differ, and whatever MLflow raises.
    """
    client = mlflow_client(uri)
    run = _finished_run(client, uri, fingerprint)
    return _digest(client, run) if run is not None else None


def _download(client: Any, uri: str, destination: Path, run_id: str | None, fingerprint: str | None) -> bool:
    run = client.get_run(run_id) if run_id else _finished_run(client, uri, str(fingerprint))
    if run is None:
        return False
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=destination) as folder:
        client.download_artifacts(run.info.run_id, "artifact", folder)
        artifact = _verified(Path(folder) / "artifact", run, uri)
        _compare(artifact, run, uri, fingerprint)
        publish_folder(artifact.path, destination / "artifact")
    # It is there already: nothing is left to send.
    state = {"run_id": run.info.run_id, "uri": without_passwords(uri), "sent": {}, "complete": True}
    write_json(destination / "mlflow.json", state)
    return True


def _verified(path: Path, run: Any, uri: str) -> Artifact:
    try:
        artifact = read_artifact(path)
        artifact.verify()
    except ArtifactError as error:
        found = str(error).replace(f"{path}/", "").split(";")[0]
        raise ArtifactError(
            f"MLflow at {without_passwords(uri)}: the artifact of run {run.info.run_id} is damaged or not whole: {found}; "
            f"delete the run there and make the artifact again"
        ) from None
    return artifact


def _finished_run(client: Any, uri: str, fingerprint: str) -> Any:
    """The finished run of a fingerprint, None without one. Raises ArtifactError where several differ."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    runs = client.search_runs(experiments, query, order_by=["start_time ASC"])
    by_digest = {_digest(client, run) if len(runs) > 1 else "": run for run in reversed(runs)}
    if len(by_digest) > 1:
        named = ", ".join(f"{run.info.run_id} ({digest[:12]})" for digest, run in by_digest.items())
        raise ArtifactError(
            f"MLflow at {without_passwords(uri)} has two different answers for fingerprint {fingerprint[:12]}: the "
            f"artifacts of runs {named}; delete the wrong run there, or give the right one as an input: mlflow:RUN_ID"
        )
    return next(iter(by_digest.values()), None)


def _digest(client: Any, run: Any) -> str:
    """Of a run's artifact, by its tag, else by its manifest."""
    if "digest" in run.data.tags:
        return str(run.data.tags["digest"])
    with tempfile.TemporaryDirectory() as folder:
        manifest = client.download_artifacts(run.info.run_id, "artifact/manifest.json", folder)
        return str(read_json(Path(manifest))["digest"])


def _compare(artifact: Artifact, run: Any, uri: str, fingerprint: str | None) -> None:
    """Raises ArtifactError where an artifact is another one than its run's tags and the caller say."""
    manifest = artifact.manifest
    tags = run.data.tags
    expected = {
        "fingerprint": (fingerprint or tags.get("fingerprint"), manifest.fingerprint),
        "digest": (tags.get("digest"), manifest.digest),
    }
    for name, (said, found) in expected.items():
        if said not in (None, found):
            raise ArtifactError(
                f"MLflow at {without_passwords(uri)}: run {run.info.run_id} is tagged with {name} {said[:12]}, but its "
                f"artifact has {found[:12]}; delete the run there and make the artifact again"
            )
