"""What a stage reads, found or made before it runs: raw data, and artifacts that another machine published."""

import logging
import os
import shlex
import subprocess
import sys
import time

from launchers.storage import fetch_stored
from pipeline import graph
from pipeline.artifacts import without_passwords
from pipeline.config import PipelineConfig
from pipeline.errors import EXIT_FAILURE, ArtifactError, VitruvianError
from pipeline.graph import StagePlan
from pipeline.remote import reason
from pipeline.tracking.download import download
from pipeline.tracking.tracker import tracking_uri

logger = logging.getLogger("vitruvian")

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and the deepspeed launcher tell a rank."""


def rank() -> int:
    """Of this process, by the launcher's environment."""
    return int(os.environ.get("RANK", "0"))


def ready(pipeline: PipelineConfig, name: str, config: str, overrides: list[str], fresh: bool) -> StagePlan:
    """The plan of a stage whose inputs exist. Rank 0 makes missing data, fetches missing models; the others wait.

    Raises ArtifactError with the command to type where a trained input is missing, DataError where raw data is.
    """
    while True:
        plans = graph.plan(pipeline, [name], fresh=fresh)
        if plans[name].state != "waiting":
            return plans[name]
        if _fetch_named(pipeline, plans):
            continue
        graph.require_raw_data(plans[name])
        missing = next(stage for stage in plans.values() if stage.state != "done" and stage.name != name)
        prepares = type(missing.config).prepares
        if rank() > 0:
            if not prepares and missing.state != "waiting":
                time.sleep(5.0)  # rank 0 may be fetching it; where it gives up, the launcher ends this process
            time.sleep(2.0)
        elif prepares:
            logger.info("%s needs %s: making it first (%s)", name, missing.name, missing.reason)
            _run_alone(missing.name, config, overrides)
        elif not fetch_stored(pipeline, missing) and not _fetch(pipeline, missing):
            words = shlex.join([*overrides])
            raise ArtifactError(
                f"stage {name!r} needs the artifact of {missing.name!r}, which has not finished "
                f"({missing.reason.split(';')[0]}); make it with: vitruvian run {config} --until {missing.name} {words}".rstrip()
            )


def _run_alone(name: str, config: str, overrides: list[str]) -> None:
    """One stage in a process of its own, outside the launcher's world."""
    hidden = ("SLURM_STEP_ID", *LAUNCHER_VARIABLES)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [sys.executable, "-m", "launchers.run_stage", "--stage", name, "--config", config, *overrides]
    code = subprocess.run(command, env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}).returncode
    if code:
        error = VitruvianError(f"stage {name!r} ended with exit code {code}; its message is above")
        error.exit_code = code if code > 0 else EXIT_FAILURE
        raise error


def _fetch(pipeline: PipelineConfig, stage: StagePlan) -> bool:
    """Takes a finished stage's artifact from MLflow, found by its fingerprint, where this machine lacks it."""
    uri = tracking_uri(pipeline)
    if uri is None or stage.run_dir is None or stage.fingerprint is None or pipeline.tracking.uri == "auto":
        return False
    try:
        found = download(uri, stage.run_dir, fingerprint=stage.fingerprint)
    except ArtifactError:
        raise
    except Exception as error:  # MLflow may raise anything; the user learns why it did not help
        logger.warning("MLflow at %s has no help: %s", without_passwords(uri), reason(error))
        return False
    if found:
        logger.info("%s: fetched from MLflow at %s", stage.name, without_passwords(uri))
    return found


def _fetch_named(pipeline: PipelineConfig, plans: dict[str, StagePlan]) -> bool:
    """True if inputs name MLflow runs that this machine lacked. Rank 0 downloads them, the others wait.

    Raises ArtifactError where one can't be had.
    """
    sources = [source for stage in plans.values() for source in stage.inputs.values() if source.digest is None]
    runs = {run_id for source in sources if (run_id := graph.mlflow_run(source.reference))}
    if rank() > 0:
        time.sleep(bool(runs))
        return bool(runs)
    for run_id in sorted(runs):
        uri = tracking_uri(pipeline)
        if uri is None:
            raise ArtifactError(f"mlflow:{run_id} is an input, but tracking.uri is null: say where MLflow is")
        try:
            download(uri, graph.fetched(pipeline, run_id), run_id=run_id)
        except Exception as error:  # MLflow may raise anything
            raise ArtifactError(
                f"mlflow:{run_id}: not to be had from {without_passwords(uri)}: {reason(error)}"
            ) from None
        logger.info("mlflow:%s: fetched from %s", run_id, without_passwords(uri))
    return bool(runs)
