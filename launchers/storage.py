"""What a stage finds in the storage before it runs."""

import logging
from dataclasses import replace

from pipeline.artifacts import without_passwords
from pipeline.config import PipelineConfig
from pipeline.errors import ArtifactError, StorageError
from pipeline.graph import StagePlan, step_of
from pipeline.remote import reason
from pipeline.run_storage import RunStorage
from pipeline.storage import DamagedError
from pipeline.tracking.download import published_digest
from pipeline.tracking.tracker import tracking_uri

logger = logging.getLogger("vitruvian")


def take_over(pipeline: PipelineConfig, stage: StagePlan, storage: RunStorage) -> StagePlan:
    """For rank 0, before a stage runs: fetches its artifact, or a resume point newer than this machine's.

    Gives the plan as it is then. Raises StorageError where nothing of the stage is here and the storage can't be
    asked: a stage begun elsewhere is not started anew in silence.
    """
    try:
        storage.begin()
        if fetch_artifact(pipeline, stage, storage):
            return replace(stage, state="done", reason="finished elsewhere with the same fingerprint")
        point = storage.restore_newer()
    except DamagedError as error:
        raise StorageError(f"{error}; restore it, or start over on purpose with --fresh") from None
    except StorageError as error:
        if stage.state == "start":
            raise StorageError(
                f"storage.url: {error}; nothing of this stage is on this machine, and whether it was begun on another "
                f"can't be known. Check network, bucket and credentials, or go without: storage.url=null"
            ) from None
        logger.warning("storage.url: %s; going on with what is on this machine", error)
        return stage
    if point is None:
        return stage
    return replace(stage, state="resume", reason=f"resume point of step {step_of(point)}, fetched from {storage.url}")


def fetch_artifact(pipeline: PipelineConfig, stage: StagePlan, storage: RunStorage) -> bool:
    """Takes a finished stage's artifact from the storage; False where it has none.

    Raises ArtifactError where MLflow has another under the same fingerprint, StorageError where the storage can't be
    reached or its copy is damaged.
    """
    digest = storage.artifact_digest()
    if digest is None:
        return False
    uri = tracking_uri(pipeline)
    if uri is not None and pipeline.tracking.uri != "auto":
        assert stage.fingerprint is not None
        try:
            other = published_digest(uri, stage.fingerprint)
        except Exception as error:  # MLflow may raise anything
            logger.warning(
                "MLflow at %s was not asked whether it has the same artifact: %s",
                without_passwords(uri),
                reason(error),
            )
            other = None
        if other not in (None, digest):
            raise ArtifactError(
                f"{stage.name}: two artifacts of one fingerprint: digest {digest[:12]} at {storage.url}, {other[:12]} "
                f"in MLflow at {without_passwords(uri)}; remove one, or make a third with --fresh"
            )
    return storage.fetch_artifact()


def fetch_stored(pipeline: PipelineConfig, stage: StagePlan) -> bool:
    """Takes a finished stage's artifact from the storage, where there is one and this machine lacks it."""
    storage = RunStorage.of(pipeline, stage)
    if storage is None:
        return False
    try:
        return fetch_artifact(pipeline, stage, storage)
    except StorageError as error:
        logger.warning("storage.url: has no help: %s", error)
        return False
