"""Stage kind `import`: others' weights as an artifact, where a stage wants one.

Reads a file, by path or URL with its sha256. Writes what `mae` writes, the encoder alone. The papers' main rows start
from the ImageNet MAE weights that facebookresearch/mae publishes.
"""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import StageConfig
from pipeline.context import Context
from pipeline.models.config import MAEConfig
from pipeline.strict import Strict

MAX_BYTES = 1 << 36
"""Of a checkpoint file."""


class Inputs(Strict):
    """Nothing of this pipeline."""


class Config(StageConfig):
    """Imported weights."""

    kind: Literal["import"]
    inputs: Inputs = Inputs()
    """No artifact is read."""
    source: str
    """Path or fsspec URL of the file."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of the file; anything else is refused. Needed for a URL; for a local file the digest found is recorded."""
    format: Literal["mae"] = "mae"
    """mae: a .pth or .safetensors of facebookresearch/mae, pretrained or finetune-ready."""
    model: MAEConfig
    """What the weights are of; a patch of 14 is padded to 16 with zeros, as in ViTPose."""
    licence: str
    """Of the weights."""

    @model_validator(mode="after")
    def _urls_are_pinned(self) -> "Config":
        if "://" in self.source and self.sha256 is None:
            raise ValueError("a URL needs the sha256 of what lies there")
        return self

    def files(self) -> list[str]:
        """The weights, where they lie on this machine."""
        return [] if "://" in self.source else [self.source]


def run(context: Context, config: Config) -> None:
    """Fetches, verifies, converts and publishes."""
    from pipeline.data.images import read_bytes
    from pipeline.errors import DataError
    from pipeline.files import sha256
    from pipeline.models.loading import MAESpec, save_model
    from pipeline.models.official import read_mae

    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / ("weights" + Path(config.source).suffix)
        local.write_bytes(read_bytes(config.source, limit=MAX_BYTES))
        found = sha256(local)
        if config.sha256 not in (None, found):
            raise DataError(f"{config.source}: sha256 is {found}, expected {config.sha256}")
        tensors, dropped = read_mae(local, config.model)

    def fill(staged: Path) -> None:
        save_model(staged, MAESpec(config=config.model, encoder_only=True), tensors)

    about = {"source": config.source, "sha256": found, "left out": ", ".join(dropped) or "nothing"}
    context.publish(fill, licences=[config.licence], about=about)
