"""A stage that is run again and again, and what a run leaves behind."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_artifact
from tests.chain.running import TINY, metrics, only_run
from tests.faults.ranks import Outcome, Ranks


@dataclass(frozen=True)
class Left:
    """What a finished run left behind: two that are equal computed the same, bit for bit."""

    digest: str
    """Of the artifact: weights and buffers."""
    points: dict[str, dict[str, str]]
    """sha256 of every file of the resume points that hold tensors: weights, moments, steps, buffers."""
    lines: list[dict[str, Any]]
    """Loss, gradient norm and the checksum of the samples, of each step."""


@dataclass(frozen=True)
class Stage:
    """A stage of a copied workspace."""

    name: str
    workspace: Path
    ranks: Ranks
    overrides: tuple[str, ...] = ()

    def run(
        self, ranks: int = 2, *overrides: str, fault: dict[str, Any] | None = None, port: int | None = None
    ) -> Outcome:
        """One launch."""
        arguments = ["--stage", self.name, "--config", str(TINY), f"workspace={self.workspace}", "tracking.uri=null"]
        return self.ranks.run(ranks, [*arguments, *self.overrides, *overrides], fault, port)

    def finish(self, ranks: int = 2, *overrides: str) -> Left:
        """Runs to the end, which must come."""
        outcome = self.run(ranks, *overrides)
        assert outcome.codes == [0] * ranks, outcome.log[-6000:]
        return left(self.run_dir)

    @property
    def run_dir(self) -> Path:
        """The one run directory."""
        return only_run(self.workspace, self.name)

    def forget(self) -> None:
        """Removes what the runs left."""
        shutil.rmtree(self.workspace / "tiny" / self.name, ignore_errors=True)


def left(run_dir: Path) -> Left:
    """What is compared."""
    points = {}
    for point in sorted((run_dir / "resume").glob("step-*")):
        files = json.loads((point / "manifest.json").read_text())["files"]
        points[point.name] = {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}
    kept = ("step", "loss", "gradient_norm", "sample_checksum")
    lines = [{key: line.get(key) for key in kept} for line in metrics(run_dir)]
    return Left(read_artifact(run_dir / "artifact").digest, points, lines)
