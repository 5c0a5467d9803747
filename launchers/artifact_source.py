"""An artifact that a user names: a folder, or a run of MLflow."""

import os
from pathlib import Path

from pipeline.artifacts import without_passwords
from pipeline.errors import ArtifactError, ConfigError
from pipeline.remote import reason
from pipeline.tracking.download import download


def local_artifact(artifact: str, tracking_uri: str | None, folder: Path) -> Path:
    """The artifact's folder, downloaded from MLflow into `folder` where it is named by a run: `mlflow:RUN_ID`.

    Raises ConfigError where nobody says which server, ArtifactError where it can't be had.
    """
    if not artifact.startswith("mlflow:"):
        return Path(artifact)
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(f"{artifact}: say where MLflow is, by --tracking-uri or MLFLOW_TRACKING_URI")
    try:
        download(uri, folder, run_id=artifact.removeprefix("mlflow:"))
    except Exception as error:  # whatever MLflow raises
        raise ArtifactError(f"{artifact}: not to be had from {without_passwords(uri)}: {reason(error)}") from None
    return folder / "artifact"
