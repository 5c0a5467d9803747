"""ONNX: onnxruntime computes what torch does, for any batch."""

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.errors import ConfigError, VitruvianError
from pipeline.models.config import PoseConfig
from pipeline.models.formats import onnx as format
from pipeline.models.loading import PoseSpec
from tests.models.formats.models import BACKBONE, SIMPLE, heatmap_error, images, outgoing_of, spec_of


def test_a_student_with_a_token_computes_the_same_at_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding 0 and few filters, too: what no other format takes. A difference is an error, and without onnxruntime one
    is told that nothing was compared."""
    spec = spec_of({"filters": 8}, ("coco", "mpii"), tokens=2, patch_padding=0)
    outgoing, model = outgoing_of(spec)
    lines = format.write(outgoing, tmp_path)
    assert "onnxruntime and torch differ by" in lines[1]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["coco", "mpii"]
    for count in (1, 3, 8):
        pictures = images(count)
        found = session.run(["coco", "mpii"], {"images": pictures.numpy()})
        for name, heatmaps in zip(("coco", "mpii"), found, strict=True):
            assert heatmap_error(torch.from_numpy(heatmaps), model(pictures)[name]) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))

    wrapped = format._Heatmaps(model, ("coco", "mpii"))
    assert (difference := format.check(wrapped, tmp_path / "model.onnx")) is not None and difference < format.TOLERANCE
    with torch.no_grad():
        model.decoders["coco"].final_layer.bias += 1.0
    assert (difference := format.check(wrapped, tmp_path / "model.onnx")) is not None and difference > format.TOLERANCE
    monkeypatch.setattr(format, "_export", lambda model, path: None)
    with pytest.raises(VitruvianError, match="onnxruntime's heatmaps differ from torch's by"):
        format.write(outgoing, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "not compared with torch" in format.write(outgoing, tmp_path)[1]


WINDOWS = {"window": [3, 2], "shift": True, "pool": True, "relative_positions": True}
RESNET = {"kind": "resnet", "layers": 50, "image_size": [64, 64]}


def spec_with(backbone: dict[str, Any], decoder: dict[str, Any], tokens: int) -> PoseSpec:
    values = {"backbone": backbone, "decoder": decoder, "knowledge_tokens": tokens}
    config = PoseConfig.model_validate(values)
    codec = CodecConfig(input_size=config.backbone.image_size, heatmap_size=config.heatmap_size)
    return PoseSpec(config=config, datasets={"coco": load_definition("coco")}, codec=codec)


@pytest.mark.parametrize(
    ("backbone", "decoder", "tokens"),
    [
        pytest.param({**BACKBONE, "attention": WINDOWS}, {"filters": 8}, 1, id="windows-that-do-not-divide-the-grid"),
        pytest.param({**BACKBONE, "parallel_convolution": True}, {"filters": 8}, 1, id="parallel-convolution"),
        pytest.param(RESNET, SIMPLE, 0, id="resnet-simple"),
        pytest.param(RESNET, {"filters": 8}, 0, id="resnet-classic"),
    ],
)
def test_other_backbones_compute_the_same_at_batches_of_1_and_8(
    tmp_path: Path, backbone: dict[str, Any], decoder: dict[str, Any], tokens: int
) -> None:
    """The grid of patches is 4 x 3: the padded, shifted and masked windows of 3 x 2 go through the export, too."""
    outgoing, model = outgoing_of(spec_with(backbone, decoder, tokens))
    assert "onnxruntime and torch differ by" in format.write(outgoing, tmp_path)[1]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 8):
        pictures = images(count, outgoing.spec.config.backbone.image_size)
        found = torch.from_numpy(session.run(["coco"], {"images": pictures.numpy()})[0])
        assert heatmap_error(found, model(pictures)["coco"]) < 1e-5


def test_without_the_extra_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs the extra `export`: pip install '\.\[export\]'"):
        format.write(outgoing_of(spec_of({}))[0], tmp_path)
