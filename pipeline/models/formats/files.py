"""Others' checkpoint files, read without executing anything they contain."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.files import read_json

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files of a Hugging Face folder; the first of the weights that is there is taken."""

_WRAPPERS = ("model", "state_dict", "module")


class _Ignored:
    """Stands for an object beside the weights: made without running its class, and without keeping what it holds."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# What real files carry beside tensors. Two classes: MAE saves its command line as argparse's Namespace, mmengine its
# log as HistoryBuffers. These, and mmpose's `meta.dataset_meta`, hold numpy arrays, whose pickles name the others. None of
# the real ones is ever imported or called for a file: each name gets the stand-in, which does nothing.
_HARMLESS = (
    "argparse.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, in float32.

    It is unwrapped from `model`, `state_dict` or `module`, and freed of `module.` before every name. A torch file is read
    with `weights_only=True`; the harmless classes that real files name become stand-ins. Raises ArtifactError for anything
    else.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([(_Ignored, name) for name in _HARMLESS]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArtifactError(f"{path.name}: refused: {reason}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content.items())):
        raise ArtifactError(f"{path.name}: holds no state dict")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in content.items()}


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder. Raises ArtifactError."""
    path = folder / CONFIG
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder.name}/{CONFIG}: refused: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{folder.name}/{CONFIG}: refused: no mapping")
    return content


def weights_of(folder: Path) -> Path:
    """The weights in a Hugging Face folder. Raises ArtifactError where there are none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ArtifactError(f"{folder.name}: has neither {' nor '.join(WEIGHTS)}")
