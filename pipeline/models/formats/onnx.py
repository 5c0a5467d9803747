"""ONNX, out: the network from normalised images to heatmaps, for any batch size."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, VitruvianError
from pipeline.files import write_json
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.loading import SPEC
from pipeline.models.pose import PoseModel

FILE = "model.onnx"
TOLERANCE = 1e-4
"""Of the largest difference between onnxruntime's heatmaps and torch's, in parts of the largest value."""
_BATCHES = (1, 8)
_LARGEST_FILE = 1_500_000_000
"""Bytes of weights above which they get a file of their own; a protobuf ends at 2 GiB."""


class _Heatmaps(nn.Module):
    """The model with its heatmaps as a tuple."""

    def __init__(self, model: PoseModel, datasets: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.datasets = model, datasets

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W) to heatmaps (B, K, h, w) of each dataset."""
        found = self.model(images, self.datasets)
        return tuple(found[name] for name in self.datasets)


def write(outgoing: Outgoing, folder: Path) -> list[str]:
    """Writes `model.onnx` (input `images`, an output a dataset) and the artifact's `model.json`.

    Where onnxruntime is installed, its heatmaps of 1 and of 8 images are compared with torch's. Returns lines for people.
    Raises ConfigError without the extra `export`, and VitruvianError where they differ by more than `TOLERANCE`.
    """
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise ConfigError("export to onnx needs the extra `export`: pip install '.[export]' in the checkout") from None
    spec = outgoing.spec
    outgoing.require_no_experts("onnx")
    datasets = (outgoing.one_dataset("onnx")[0],) if outgoing.dataset else tuple(spec.datasets)
    model = PoseModel(spec.config, spec.keypoints)
    model.load_state_dict(dict(outgoing.tensors))
    wrapped = _Heatmaps(model, datasets).eval()
    _export(wrapped, folder / FILE)
    write_json(folder / SPEC, spec.model_dump(mode="json"))
    lines = [
        f"{FILE}: input images (batch, 3, {_size(spec.config.backbone.image_size)}), outputs {', '.join(datasets)}"
    ]
    difference = check(wrapped, folder / FILE)
    if difference is None:
        return [*lines, "not compared with torch: onnxruntime is not installed"]
    if difference > TOLERANCE:
        raise VitruvianError(f"{FILE}: onnxruntime's heatmaps differ from torch's by {difference:.1e}; not exported")
    return [*lines, f"onnxruntime and torch differ by {difference:.1e} of the largest value, at batches of 1 and 8"]


def _size(image_size: tuple[int, int]) -> str:
    return f"{image_size[0]}, {image_size[1]}"


def _images(model: _Heatmaps, count: int) -> Tensor:
    size = model.model.config.backbone.image_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


def _export(model: _Heatmaps, path: Path) -> None:
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (_images(model, 2),),
            path,
            input_names=["images"],
            output_names=list(model.datasets),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=weights > _LARGEST_FILE,
            verbose=False,
        )


def check(model: _Heatmaps, path: Path) -> float | None:
    """The largest difference to onnxruntime's heatmaps over batches of 1 and 8, relative; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in _BATCHES:
        images = _images(model, count)
        with torch.no_grad():
            ours = model(images)
        theirs = session.run(list(model.datasets), {"images": images.numpy()})
        for expected, found in zip(ours, map(torch.from_numpy, theirs), strict=True):
            assert expected.shape == found.shape
            largest = max(largest, float((expected - found).abs().max() / expected.abs().max()))
    return largest
