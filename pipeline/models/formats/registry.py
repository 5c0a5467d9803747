"""All formats by name, and a checkpoint from wherever it lies."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.data.images import read_bytes
from pipeline.data.readers.files import is_file, join
from pipeline.errors import ArtifactError, DataError
from pipeline.files import sha256
from pipeline.models.formats import huggingface, mae, mmpose, onnx, timm, torchvision, vitpose
from pipeline.models.formats.files import CONFIG, WEIGHTS
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Imported, Wanted

MAX_BYTES = 1 << 36
"""Of a checkpoint file."""

READERS: Mapping[str, Callable[[Path, Wanted], Imported]] = {
    "mae": mae.read,
    "vitpose": vitpose.read,
    "mmpose": mmpose.read,
    "huggingface": huggingface.read,
    "timm": timm.read,
    "torchvision": torchvision.read,
}
"""What reads a file, or Hugging Face's folder, by the name of its format."""

WRITERS: Mapping[str, Callable[[Outgoing, Path], list[str]]] = {
    "huggingface": huggingface.write,
    "mmpose": mmpose.write,
    "onnx": onnx.write,
}
"""What writes a pose model into a folder, by the name of the format; returns lines for people."""


def read_source(source: str, format: str, wanted: Wanted, digest: str | None) -> tuple[Imported, str]:
    """The model in a checkpoint, and the sha256 of its file; for a Hugging Face folder, of the weights in it.

    source: path or fsspec URL. What was digested is what is read. Raises DataError for a file that can't be read or has
    another digest, ArtifactError and ConfigError for what the format's reader refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / (Path(source).name or "weights")
        weights = _fetch_folder(source, local) if format == "huggingface" else _fetch(source, local)
        found = sha256(weights)
        if digest not in (None, found):
            raise DataError(f"{source}: sha256 is {found}, expected {digest}")
        return READERS[format](local, wanted), found


def _fetch(source: str, target: Path) -> Path:
    if "://" not in source and not is_file(source):
        raise DataError(f"{source}: no such file; check the path of the checkpoint")
    target.write_bytes(read_bytes(source, limit=MAX_BYTES))
    return target


def _fetch_folder(source: str, target: Path) -> Path:
    weights = next((name for name in WEIGHTS if is_file(join(source, name))), None)
    if weights is None:
        raise ArtifactError(
            f"{source}: a Hugging Face folder has {CONFIG} and {' or '.join(WEIGHTS)}; this has no weights"
        )
    target.mkdir()
    _fetch(join(source, CONFIG), target / CONFIG)
    return _fetch(join(source, weights), target / weights)
