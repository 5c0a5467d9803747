"""What of a run goes to the storage and comes back: the artifact, and resume points with what belongs to them.

```
<storage.url>/<pipeline>/<stage>/<fingerprint>/
    identity.json               what the fingerprint was made of
    artifact/                   as it lies in the run directory, whole
    resume/step-00000120/       a resume point, and in `run/` what a machine without this run also needs:
                                metrics so far, the MLflow run
```
Each folder is one of `pipeline/storage.py`. Only rank 0 talks to the storage.
"""

import logging
import re
import shutil
import threading
from pathlib import Path

from pipeline.artifacts import MANIFEST as ARTIFACT_MANIFEST
from pipeline.artifacts import FileRecord, payload_digest, read_artifact, without_passwords
from pipeline.config import PipelineConfig
from pipeline.errors import CheckpointError, StorageError
from pipeline.files import link_or_copy, publish_folder, read_json, write_json
from pipeline.graph import StagePlan, resume_points, step_of
from pipeline.storage import DamagedError, Store
from pipeline.tracking.tracker import tracking_uri

logger = logging.getLogger(__name__)

_KEPT = 2
_SECONDS_WHEN_STOPPED = 15.0
_SECONDS_WHEN_DONE = 60.0
_BYTES_PER_SECOND = 5e6
_RUN_FILES = ("metrics.jsonl", "mlflow.json")


class RunStorage:
    """The copy of one run directory in the storage."""

    def __init__(self, pipeline: PipelineConfig, stage: StagePlan) -> None:
        assert stage.run_dir is not None and pipeline.storage.url is not None
        self._pipeline, self._stage, self._run_dir = pipeline, stage, stage.run_dir
        self._store = Store(f"{pipeline.storage.url}/{pipeline.name}/{stage.name}")
        self._place = stage.run_dir.name
        self.url = f"{self._store.url}/{self._place}"
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._thread: threading.Thread | None = None
        self._asked_step = self._sent_step = -1

    @classmethod
    def of(cls, pipeline: PipelineConfig, stage: StagePlan) -> "RunStorage | None":
        """Of a stage; None where no storage is configured or the stage's fingerprint is not known yet."""
        return cls(pipeline, stage) if pipeline.storage.url is not None and stage.run_dir is not None else None

    def begin(self) -> None:
        """Writes a small file: a storage that refuses is found before hours of work. Raises StorageError."""
        shutil.rmtree(self._run_dir / ".sent", ignore_errors=True)  # of a killed process
        self._store.write_text(f"{self._place}/identity.json", (self._run_dir / "identity.json").read_text())

    def set_aside(self) -> None:
        """Renames what the storage has of this run, so that the stage starts over and nothing is lost."""
        names = self._store.folders("")
        if self._place in names:
            count = sum(name.startswith(f"{self._place}.old-") for name in names)
            self._store.move(self._place, f"{self._place}.old-{count + 1}")
            logger.info("%s: the old run in the storage was moved to %s.old-%d", self._stage.name, self.url, count + 1)

    # Artifacts

    def artifact_digest(self) -> str | None:
        """Of the artifact that the storage has; None where it has none."""
        manifest = self._store.manifest(f"{self._place}/artifact")
        if manifest is None:
            return None
        return payload_digest({name: record for name, record in manifest.files.items() if name != ARTIFACT_MANIFEST})

    def fetch_artifact(self) -> bool:
        """Puts the stage's artifact into the run directory; False where the storage has none. Raises StorageError."""
        fetched = self._run_dir / ".fetched"
        if not self._store.download(f"{self._place}/artifact", fetched):
            return False
        manifest = read_artifact(fetched).manifest
        if manifest.fingerprint != self._stage.fingerprint:
            raise DamagedError(f"{self.url}/artifact: has the fingerprint {manifest.fingerprint[:12]} of another run")
        publish_folder(fetched, self._run_dir / "artifact")
        self._record_upload()
        # MLflow has heard of it where it was made: nothing is left to send from here.
        uri = tracking_uri(self._pipeline)
        uri = without_passwords(uri) if uri is not None else None
        state = {"run_id": manifest.mlflow_run, "uri": uri, "sent": {}, "complete": True}
        write_json(self._run_dir / "mlflow.json", state)
        logger.info("%s: its artifact was fetched from %s", self._stage.name, self.url)
        return True

    def has_artifact(self) -> bool:
        """True if the local artifact was uploaded to this storage. Asks nobody."""
        path = self._run_dir / "storage.json"
        done = read_json(path) if path.is_file() else {}
        return done == {"url": self.url, "digest": read_artifact(self._run_dir / "artifact").digest}

    def upload_artifact(self) -> None:
        """Copies the finished artifact, within a bound of time; failing that, the same command does it later."""
        self._drop_waiting()  # a resume point is of little use now
        if self.has_artifact():
            return
        size = sum(path.stat().st_size for path in (self._run_dir / "artifact").rglob("*") if path.is_file())
        logger.info("%s: the artifact (%.3f GB) goes to %s", self._stage.name, size / 1e9, self.url)
        thread = threading.Thread(target=self._try_to_upload_artifact, name="storage-artifact", daemon=True)
        thread.start()
        thread.join(_SECONDS_WHEN_DONE + size / _BYTES_PER_SECOND)
        if not self.has_artifact():
            logger.warning("%s: the storage did not take the artifact; the same command sends it later", self.url)

    def _try_to_upload_artifact(self) -> None:
        try:
            artifact = read_artifact(self._run_dir / "artifact")
            there = self.artifact_digest()
            if there not in (None, artifact.digest):
                raise StorageError(
                    f"{self.url}: holds another artifact of this fingerprint (digest {there[:12]}, here "
                    f"{artifact.digest[:12]}); it is left as it is. Remove one, or run the stage with --fresh"
                )
            self._store.upload(artifact.path, f"{self._place}/artifact", artifact.manifest.files)
            self._record_upload()
        except Exception as error:  # the stage is done, whatever happens here
            logger.error("storage: %s", error)

    def _record_upload(self) -> None:
        digest = read_artifact(self._run_dir / "artifact").digest
        write_json(self._run_dir / "storage.json", {"url": self.url, "digest": digest})

    # Resume points

    def restore(self, newer_than: int, until: int | None = None, *, with_run: bool = False) -> Path | None:
        """Fetches the newest point that verifies, of a step above `newer_than` and at most `until`; None for none.

        with_run: also what else a machine without this run needs. Damaged ones are named loudly. Raises StorageError
        where the storage can't be reached.
        """
        steps = [step for step in self._steps() if step > newer_than and (until is None or step <= until)]
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                point = self._fetch_point(step, with_run)
            except DamagedError as error:
                damaged.append(str(error))
                logger.error("storage: the resume point of step %d is damaged: %s", step, error)
                continue
            said = logger.error if damaged else logger.info
            back = "FALLING BACK to" if damaged else "fetched"
            said("%s: %s the resume point of step %d from %s", self._stage.name, back, step, self.url)
            return point
        if damaged and not resume_points(self._run_dir):
            raise CheckpointError(
                f"{self.url}/resume: no resume point can be read ({'; '.join(damaged)}); restore one, or start over on "
                f"purpose with --fresh"
            )
        return None

    def restore_newer(self) -> Path | None:
        """Fetches a point that is newer than all of this machine, with what belongs to it; None where there is none."""
        here = resume_points(self._run_dir)
        return self.restore(step_of(here[-1]) if here else -1, with_run=True)

    def send(self, point: Path) -> None:
        """Copies a published resume point in the background, without delay for the caller.

        While an upload runs, the newest point waits for it; one that waits and is overtaken is not sent.
        """
        self._asked_step = step_of(point)
        try:
            snapshot = self._snapshot(point)
        except OSError as error:  # a full disk, after the point itself was saved
            logger.warning("storage: the resume point of step %d is not copied: %s", step_of(point), error)
            return
        self._drop_waiting()
        with self._lock:
            self._next = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="storage-resume", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Waits for a running upload, within a bound, and says what the storage lacks."""
        thread = self._thread
        if thread is not None:
            logger.info("waiting up to %.0f s for the storage", _SECONDS_WHEN_STOPPED)
            thread.join(_SECONDS_WHEN_STOPPED)
        if self._sent_step < self._asked_step:
            logger.warning(
                "%s: has no copy of the resume point of step %d, which is on this machine only",
                self.url,
                self._asked_step,
            )

    def _drop_waiting(self) -> None:
        with self._lock:
            if self._next is not None:
                shutil.rmtree(self._next)
            self._next = None

    def _steps(self) -> list[int]:
        """Of the whole points in the storage, ascending."""
        found = self._store.folders(f"{self._place}/resume")
        steps = {name: int(name.removeprefix("step-")) for name in found if re.fullmatch(r"step-\d{8,}", name)}
        for name in steps:
            if not found[name]:
                logger.warning("%s/resume/%s: an upload that was cut off; left out", self.url, name)
        return sorted(step for name, step in steps.items() if found[name])

    def _fetch_point(self, step: int, with_run: bool) -> Path:
        final = self._run_dir / "resume" / f"step-{step:08d}"
        fetched = self._run_dir / ".fetched"
        if not self._store.download(f"{self._place}/resume/{final.name}", fetched):
            raise DamagedError(f"{self.url}/resume/{final.name}: went away")
        if with_run:
            for name in _RUN_FILES:
                if (fetched / "run" / name).is_file():
                    (fetched / "run" / name).replace(self._run_dir / name)
        shutil.rmtree(fetched / "run", ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        publish_folder(fetched, final)
        return final

    def _snapshot(self, point: Path) -> Path:
        """A folder of what is uploaded with a point, which does not change while training goes on."""
        snapshot = self._run_dir / ".sent" / point.name
        shutil.rmtree(snapshot, ignore_errors=True)
        shutil.copytree(point, snapshot, copy_function=link_or_copy)
        (snapshot / "run").mkdir()
        for name in _RUN_FILES:  # these are appended to or replaced: small enough to copy
            if (self._run_dir / name).is_file():
                shutil.copy2(self._run_dir / name, snapshot / "run" / name)
        return snapshot

    def _send_all(self) -> None:
        while True:
            with self._lock:
                snapshot, self._next = self._next, None
                if snapshot is None:
                    self._thread = None
                    return
            step = step_of(snapshot)
            try:
                self._upload_point(snapshot)
                self._sent_step = step
                logger.info("the resume point of step %d was copied to %s", step, self.url)
            except Exception as error:  # whatever the backend raises, training goes on
                logger.warning(
                    "storage: the resume point of step %d was not copied (%s); training goes on, the next save tries again",
                    step,
                    error,
                )
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

    def _upload_point(self, snapshot: Path) -> None:
        place = f"{self._place}/resume"
        files = read_json(snapshot / "manifest.json")["files"]
        known = {name: FileRecord.model_validate(record) for name, record in files.items()}
        if self._store.folders(place).get(snapshot.name):
            self._store.remove(f"{place}/{snapshot.name}")  # damaged, or this run would have gone on from it
        self._store.upload(snapshot, f"{place}/{snapshot.name}", known)
        found = self._store.folders(place)
        whole = sorted(name for name, is_whole in found.items() if is_whole and name <= snapshot.name)
        for name in found.keys() - set(whole[-_KEPT:]):  # later ones were damaged, too
            self._store.remove(f"{place}/{name}")
