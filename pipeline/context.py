"""What a running stage holds: its plan, its peers, its tracker; and how it publishes."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Artifact, Parent, publish
from pipeline.config import PipelineConfig
from pipeline.data.cache import SampleCache
from pipeline.data.readers.files import IMAGE_ENDINGS
from pipeline.errors import ArtifactError, Stopped
from pipeline.files import write_json, write_text
from pipeline.graph import Input, StagePlan
from pipeline.run_storage import RunStorage
from pipeline.status import Status
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.distributed import World
    from pipeline.heartbeat import Heartbeat
    from pipeline.stopping import StopRequest


@dataclass(frozen=True)
class Context:
    """Handed to a stage's `run`."""

    pipeline: PipelineConfig
    plan: StagePlan
    world: "World"
    tracker: Tracker
    status: Status
    stop: "StopRequest | None"
    """None where signals end the stage at once."""
    heartbeat: "Heartbeat"
    part: tuple[int, int] | None = None
    """(I, N): only part I of N of a divisible stage's work is wanted, and nothing is published."""
    storage: RunStorage | None = None
    """Where rank 0 copies resume points to; None on the others, and where none is configured."""

    def tick(self) -> None:
        """Collective. For evaluation loops, once a batch: a sign of life. Raises Stopped if a rank was asked to stop."""
        self.heartbeat.beat("a batch of an evaluation")
        if self.stop is not None and self.stop.agreed(self.world):
            raise Stopped("stopped on request during an evaluation")

    @property
    def run_dir(self) -> Path:
        """Of this stage."""
        assert self.plan.run_dir is not None
        return self.plan.run_dir

    @property
    def seed(self) -> int:
        """Of the pipeline: stages share it, so that two students share initialisation, order and augmentation."""
        return self.pipeline.seed

    @property
    def sample_cache(self) -> SampleCache | None:
        """This machine's cache of remote samples, where one is configured."""
        storage = self.pipeline.storage
        if storage.cache_gb is None:
            return None
        folder = storage.cache or self.pipeline.workspace / ".cache"
        return SampleCache(folder.expanduser().absolute(), int(storage.cache_gb * 1e9))

    def artifact(self, label: str) -> Artifact:
        """An input artifact. Raises ArtifactError where the input is raw data."""
        source = self._input(label)
        if source.artifact is None:
            raise ArtifactError(f"stages.{self.plan.name}.inputs.{label}: {source.reference!r} is not an artifact")
        return source.artifact

    def has(self, label: str) -> bool:
        """True if an optional input was given."""
        return label in self.plan.inputs

    def data_root(self, label: str = "data") -> str:
        """The folder of raw datasets behind an input: what a stage made, or a folder or URL of the user's.

        Of what a stage made, the digests of all files but the images are checked. Raises ArtifactError.
        """
        source = self._input(label)
        if source.artifact is not None:
            for name in source.artifact.manifest.files:
                if name.startswith("raw/") and not name.lower().endswith(IMAGE_ENDINGS):
                    source.artifact.file(name)
            return str(source.artifact.path / "raw")
        return source.reference if "://" in source.reference else str(source.path)

    def _input(self, label: str) -> Input:
        return self.plan.inputs[label]

    def publish(
        self,
        fill: Callable[[Path], None],
        *,
        metrics: Mapping[str, float] | None = None,
        licences: Sequence[str] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Collective. Rank 0 lets `fill` write the files into a temporary folder and publishes it as the artifact.

        licences: of the data that went in here; those of the inputs are added. about: lines of the card.
        """
        from pipeline.distributed import barrier  # torch: planning imports this file, too

        if self.world.is_main:
            staged = self.run_dir / ".artifact"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            fill(staged)
            metrics = dict(metrics or {})
            inherited = [
                licence
                for source in self.plan.inputs.values()
                if source.artifact is not None
                for licence in source.artifact.manifest.licences
            ]
            licences = sorted({*licences, *inherited})
            write_json(staged / "metrics.json", metrics)
            write_text(staged / "card.md", self._card(metrics, licences, about or {}))
            publish(
                staged,
                self.run_dir / "artifact",
                pipeline=self.pipeline.name,
                stage=self.plan.name,
                kind=self.plan.config.kind,
                fingerprint=self.plan.fingerprint,
                config=self.plan.config.model_dump(mode="json"),
                parents={label: _parent(source) for label, source in self.plan.inputs.items()},
                metrics=metrics,
                licences=licences,
                mlflow_run=self.tracker.await_run_id(),
            )
        barrier()

    def _card(self, metrics: Mapping[str, float], licences: Sequence[str], about: Mapping[str, Any]) -> str:
        config = self.plan.config
        lines = [
            f"# {self.pipeline.name} / {self.plan.name}",
            "",
            config.description or f"Stage kind `{config.kind}`.",
            "",
        ]
        lines += [f"- {key}: {value}" for key, value in about.items()]
        if metrics:
            lines += ["", "| metric | value |", "| --- | --- |"]
            lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        lines += ["", "## Made from", ""]
        lines += [
            f"- {label}: {source.reference} `{(source.digest or '')[:12]}`"
            for label, source in self.plan.inputs.items()
        ]
        lines += ["", "## Licences of the data", "", *(f"- {licence}" for licence in licences)]
        return "\n".join(lines) + "\n"


def _parent(source: Input) -> Parent:
    assert source.digest is not None
    if source.artifact is None:
        return Parent(stage=source.reference, digest=source.digest)
    manifest = source.artifact.manifest
    return Parent(
        stage=manifest.stage, digest=source.digest, fingerprint=manifest.fingerprint, mlflow_run=manifest.mlflow_run
    )
