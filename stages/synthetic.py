"""Stage kind `synthetic`: raw datasets of generated people, in the real formats.

Reads nothing. Writes `raw/coco`, `raw/aic` and `raw/mpii` as they lie on people's disks: annotations, images, detector
boxes, MPII's ground-truth file.
"""

import shutil
from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config import StageConfig
from pipeline.context import Context
from pipeline.data.synthetic import SyntheticConfig, generate
from pipeline.progress import progress
from pipeline.strict import Strict


class Inputs(Strict):
    """Nothing."""


class Config(StageConfig):
    """Synthetic people."""

    prepares: ClassVar[bool] = True

    kind: Literal["synthetic"]
    inputs: Inputs = Inputs()
    """Nothing is read."""
    people: SyntheticConfig = Field(default_factory=SyntheticConfig)
    """How many, how large."""


def run(context: Context, config: Config) -> None:
    """Draws all images, on all cores that this process may use."""
    from pipeline.distributed import cores

    work = context.run_dir / "work"
    shutil.rmtree(work, ignore_errors=True)
    with progress("drawing people") as report:
        counts = generate(work, config.people, seed=context.seed, workers=cores(), progress=report)
    metrics = {name: float(value) for name, value in counts.items()}
    context.publish(
        lambda staged: work.rename(staged / "raw"),
        metrics=metrics,
        licences=["synthetic people: CC0-1.0"],
        about={"datasets": "coco, aic and mpii, synthetic"},
    )
