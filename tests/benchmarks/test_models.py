import json
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.zoo import MODELS, Entry
from pipeline.models.config import PoseConfig

BY_NAME = {entry.name: entry.model for entry in MODELS}
MICRO = PoseConfig.model_validate({"backbone": {"size": "micro", "image_size": (64, 48)}, "decoder": {"filters": 4}})


@pytest.mark.parametrize(("name", "backbone", "width"), [("vitpose-b", 17.1, 768), ("resnet-50", None, 2048)])
def test_the_cost_of_a_model_is_the_published_backbones_and_the_decoders_by_hand(
    name: str, backbone: float | None, width: int
) -> None:
    """17.1: ViTPose, table 6. 4.09: torchvision's ResNet-50 at 224x224."""
    backbone = backbone or 4.09 * (256 * 192) / 224**2
    config = BY_NAME[name]
    area, channels, decoder = config.backbone.grid[0] * config.backbone.grid[1], width, 0.0
    for _ in range(config.decoder.deconv_layers):  # every input pixel meets the whole 4 x 4 kernel once
        decoder += area * channels * 256 * 16
        area, channels = 4 * area, 256
    decoder += area * 256 * 17
    assert models.size_and_cost(config)["gmacs"] == pytest.approx(backbone + decoder / 1e9, rel=0.003)


def test_every_model_gives_heatmaps_of_a_quarter_of_the_input() -> None:
    assert len(BY_NAME) == len(MODELS) == 17
    assert {entry.model.heatmap_size for entry in MODELS} == {(64, 48)}
    assert all(entry.source.startswith("none") == (entry.ap is None) for entry in MODELS)


def test_the_command_measures_what_it_is_asked_for_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = (Entry("one", MICRO, 75.8, "a paper", 944), Entry("two", MICRO, None, "none"))
    monkeypatch.setattr(models, "MODELS", entries)
    out = tmp_path / "table.json"
    options = [
        "--device",
        "cpu",
        "--batch",
        "2",
        "--seconds",
        "0.05",
        "--only",
        "one",
        "--note",
        "Shared.",
        "--clock",
        "cpu",
    ]
    assert models.main([*options, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    one, two = result["rows"]
    assert one["throughput"]["least"] <= one["throughput"]["median"] <= one["throughput"]["most"]
    assert two["throughput"] is None and two["parameters"] == one["parameters"] > 0
    page = out.with_suffix(".md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert (
        "| `two` |" in page
        and "| not run | - | - | none | - |" in page
        and "Shared." in page
        and "batch 2" in page
        and "CPU seconds" in page
    )
    for wrong in (["--only", "three"], ["--batch", "0"], ["--device", "cuda", "--clock", "cpu"]):
        with pytest.raises(SystemExit):
            models.main(wrong)


def test_a_median_of_repeats_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    took = iter([3.0, 1.0, 8.0, 4.0, 2.0, 5.0, 16.0])
    monkeypatch.setattr(models, "_seconds", lambda model, images, batches, clock: asked.append(batches) or next(took))
    found = models.throughput(MICRO, torch.device("cpu"), batch=2, seconds=20.0)
    assert asked == [1, 1, 4, 4, 4, 4, 4]  # 20 s over 5 repeats of batches that take a second
    assert found == {"median": 8 / 5, "least": 8 / 16, "most": 8 / 2, "batches": 20}


def test_the_page_is_that_of_the_committed_results() -> None:
    page = Path("docs/models.md")
    result = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == models.markdown(result)
    assert [row["name"] for row in result["rows"]] == [entry.name for entry in MODELS]
