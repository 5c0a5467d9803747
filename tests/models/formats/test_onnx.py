"""ONNX: onnxruntime computes what torch does, for any batch."""

import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from pipeline.errors import ConfigError, VitruvianError
from pipeline.models.formats import onnx as format
from tests.models.formats.models import heatmap_error, images, outgoing_of, spec_of


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


def test_without_the_extra_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs the extra `export`: pip install 'vitruvian\[export\]'"):
        format.write(outgoing_of(spec_of({}))[0], tmp_path)
