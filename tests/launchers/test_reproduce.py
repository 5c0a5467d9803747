"""`vitruvian reproduce`: the rows of the paper, the check by published weights, the result file."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from launchers import chain, cli, dry_run, run_stage
from launchers import reproduce as reproducing
from launchers.rows import page
from pipeline.config import PipelineConfig
from pipeline.config_file import shipped_presets
from pipeline.data.definitions import load_definition
from pipeline.data.synthetic import SyntheticConfig, generate
from pipeline.errors import ConfigError, DataError
from pipeline.files import sha256
from pipeline.models.config import PoseConfig
from pipeline.models.pose import PoseModel
from pipeline.rows import OfficialWeights, Rows, load_rows
from tests.remembering import remember

ROWS = load_rows()
PAGE = Path(__file__).resolve().parents[2] / "docs" / "rows.md"


pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model's parameters, whatever the number of rows."""
    remember(monkeypatch, dry_run)


@pytest.mark.parametrize("name", ROWS.names())
def test_the_dry_run_of_every_row_shows_its_check_and_what_it_trains(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["reproduce", name, "--dry-run"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    table, row = ROWS.find(name)
    assert f"{row.preset}: what would run" in result.output and row.stage in result.output
    assert ("official_weights: what would run" in result.output) == bool(row.check or table.check)
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("name", ROWS.names())
def test_a_row_is_measured_by_the_evaluation_of_its_preset(name: str) -> None:
    table, row = ROWS.find(name)
    reproduction = reproducing.resolve(name, [])
    evaluation = reproduction.job.pipeline.stages["evaluate"]
    assert reproduction.dataset in evaluation.datasets and table.boxes in evaluation.boxes
    assert reproduction.model in [*evaluation.inputs.models, *getattr(evaluation, "ensembles", {})]
    metric = load_definition(reproduction.dataset.name).metric
    assert set(row.paper) <= ({"PCKh"} if metric == "pckh" else {"AP", "AR"})
    if row.paper and not row.note and reproduction.dataset.name == "coco":
        assert str(row.paper["AP"]) in reproduction.job.pipeline.description


def test_the_page_of_rows_is_as_the_rows_are() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(ROWS), "python -m launchers.rows > docs/rows.md"


def test_every_preset_of_a_table_is_in_the_page_of_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in shipped_presets() if name.startswith("table"))


def test_only_tables_of_disputed_figures_have_no_check() -> None:
    assert {name for name, table in ROWS.tables.items() if table.ungated} == {"table11", "table12", "table13"}
    assert reproducing.resolve("table11/b_val", []).check is None
    assert ROWS.weights["vitpose_b"].paper["AP"] == 75.8 and ROWS.weights["vitpose_b_multi"].paper["AP"] == 77.1


def test_a_row_trains_its_own_model_and_what_that_needs() -> None:
    chosen = reproducing.resolve("table8/token", []).job.chosen
    assert set(chosen) == {"shards", "imagenet_l", "imagenet_b", "finetune", "token", "student_token", "evaluate"}
    chosen = reproducing.resolve("table10/ensemble", []).job.chosen
    assert {"finetune", "finetune_convolution", "finetune_h"} <= set(chosen)


def test_the_check_has_the_data_and_the_machine_of_the_row_and_the_shape_of_its_weights(tmp_path: Path) -> None:
    words = ['stages.evaluate.inputs.data="/raw: data"', "stages.finetune.steps=3", "seed=7", "runtime.device=cpu"]
    check = reproducing.resolve("table2/vitpose_l_simple", words, tmp_path / "x.pth").check
    assert check is not None
    pipeline = check.pipeline
    assert (pipeline.seed, pipeline.runtime.device) == (7, "cpu")
    assert pipeline.stages["evaluate"].inputs.data == "/raw: data"
    official = pipeline.stages["official"]
    assert official.source == str(tmp_path / "x.pth")
    assert (official.model.backbone.width, official.model.decoder.kind) == (1024, "simple")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row 'table5/window_shfit'; did you mean 'table5/window_shift"):
        reproducing.resolve("table5/window_shfit", [])
    reproduction = reproducing.resolve("table9/b", [])
    started: list[str] = []

    def run(config: PipelineConfig, chosen: list[str], words: list[str]) -> None:
        started.append(config.name)

    with pytest.raises(ConfigError, match=r"--weights FILE \(ViTPose-B of .* 75.8 AP on COCO val\), or --skip-check"):
        reproducing.reproduce(reproduction, run, weights=None, skip_check=False)
    with pytest.raises(ConfigError, match="none.pth: no such file"):
        reproducing.reproduce(reproduction, run, weights=tmp_path / "none.pth", skip_check=False)
    (tmp_path / "b.pth").touch()
    with pytest.raises(DataError, match=r"stages\.shards\.inputs\.data: no folder"):
        reproducing.reproduce(reproduction, run, weights=tmp_path / "b.pth", skip_check=False)
    assert started == []
    assert isinstance(CliRunner().invoke(cli.app, ["reproduce"]).exception, ConfigError)


@pytest.mark.parametrize(
    ("found", "passes"), [(75.7, True), (75.9, True), (75.69, False), (75.91, False), (None, False)]
)
def test_published_weights_must_come_within_a_tenth(
    found: float | None, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproducing, "what_differs", lambda *_: [])
    metrics = {} if found is None else {f"official/coco/detector/{name}": found for name in ("AP", "AR")}
    check: Any = SimpleNamespace(evaluation=lambda: SimpleNamespace(manifest=SimpleNamespace(metrics=metrics)))
    official = OfficialWeights(size="B", paper={"AP": 75.8, "AR": 81.1}, published="here")
    if passes:
        assert reproducing.require_published("b", official, check) == {"AP": found, "AR": found}
    else:
        with pytest.raises(DataError, match=r"where 75\.8 is published: nothing was trained"):
            reproducing.require_published("b", official, check)


def test_the_list_has_every_row() -> None:
    result = CliRunner().invoke(cli.app, ["reproduce", "--list", "--json"])
    assert [row["row"] for row in json.loads(result.stdout)] == ROWS.names()
    assert "table5/window_shift" in CliRunner().invoke(cli.app, ["reproduce", "--list"]).stdout


def in_process(config: PipelineConfig, chosen: list[str], words: list[str]) -> None:
    for name in chosen:
        assert run_stage.main(["--stage", name, "--config", *words]) == 0


def rows_of(preset: Path, ap: float) -> Rows:
    """One row, whose published weights are an S that is said to reach `ap`."""
    row = {"name": "tiny", "preset": str(preset), "paper": {"AP": 50.0}}
    official = {"size": "S", "paper": {"AP": ap, "AR": ap}, "published": "nowhere"}
    return Rows.model_validate(
        {
            "coco_val": {"images": 5000, "people": 6352, "boxes": 104125},
            "weights": {"small": official},
            "tables": {"tiny": {"title": "Tiny", "check": "small", "rows": {"row": row}}},
        }
    )


def save_published(path: Path) -> None:
    """An S with random weights, as ViTPose's repository stores its models."""
    torch.manual_seed(0)
    model = PoseModel(PoseConfig.model_validate({"backbone": {"size": "S"}}), {"coco": 17})
    model.init_weights()
    state = model.state_dict()
    positions = state["backbone.pos_embed"]
    state["backbone.pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    torch.save({"state_dict": {key.replace("decoders.coco", "keypoint_head"): state[key] for key in state}}, path)


def pipeline_of(folder: Path, finetune: dict[str, Any], **stages: Any) -> Path:
    """A row's pipeline on the synthetic people in `folder`."""
    evaluate = {
        "kind": "evaluate",
        "inputs": {"data": str(folder / "data"), "models": {"vitpose": "finetune"}},
        "datasets": [{"name": "coco", "split": "val"}],
        "boxes": ["detector"],
        "bootstrap": 20,
        "pictures": 0,
    }
    content = {"name": "tiny_row", "stages": {**stages, "finetune": finetune, "evaluate": evaluate}}
    path = folder / "tiny_row.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def people(folder: Path, **counts: int) -> None:
    none = dict.fromkeys(("coco_train", "coco_val", "aic_train", "aic_val", "mpii_train", "mpii_val"), 0)
    generate(folder / "data", SyntheticConfig(**none | counts), seed=0, workers=1)


def test_weights_that_fall_short_stop_the_row_and_those_that_do_not_let_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    people(tmp_path, coco_val=3)
    weights = tmp_path / "s.pth"
    save_published(weights)
    model = {"backbone": {"size": "S"}, "decoder": {}}
    source = {"kind": "import", "format": "vitpose", "source": str(weights), "datasets": ["coco"], "licence": "none"}
    preset = pipeline_of(tmp_path, source | {"model": model})
    words = [f"workspace={tmp_path / 'w'}", "runtime.device=cpu", "tracking.uri=null"]

    def attempt(ap: float) -> Path:
        monkeypatch.setattr(reproducing, "load_rows", lambda: rows_of(preset, ap))
        reproduction = reproducing.resolve("tiny/row", words, weights)
        return reproducing.reproduce(reproduction, in_process, weights=weights, skip_check=False)

    with pytest.raises(DataError, match=r"small: \d+\.\d\d AP where 73\.8 is published: nothing was trained"):
        attempt(73.8)
    lines = {cells[0]: cells[1:] for cells in table_rows(capsys.readouterr().out)}
    assert lines["detector boxes"][0] == "104125" and lines["detector boxes"][2] == "differs"
    assert lines["images"][0] == "5000" and lines["AP"][0] == "73.8"
    assert lines["heatmap"] == ["64x48", "64x48", ""] and lines["codec"][2] == "" and lines["flip test"][2] == ""
    assert not (tmp_path / "w" / "tiny_row").exists()

    found = json.loads(attempt(float(lines["AP"][1])).read_text())
    assert found["row"] == "tiny/row" and found["paper"] == {"AP": 50.0}
    assert found["measured"]["AP"] == found["check"]["measured"]["AP"]  # the row is the same model
    assert found["check"]["sha256"] == sha256(weights)
    low, high = found["interval"]
    assert low <= found["measured"]["AP"] <= high
    assert found["dataset"] == {"name": "coco", "split": "val", "boxes": "detector"}
    assert found["overrides"] == words and set(found["fingerprints"]) == {"finetune", "evaluate"}
    assert "torch" in found["environment"] and found["hardware"]["cpus"] == os.cpu_count()
    assert len(found["config"]) == len(found["artifact"]) == 64 and found["date"].startswith("20")


def table_rows(text: str) -> Iterator[Sequence[str]]:
    for line in text.splitlines():
        if line.startswith("│"):
            yield [cell.strip() for cell in line.split("│")[1:-1]]


@pytest.mark.slow
def test_a_row_is_trained_by_the_same_code_as_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people(tmp_path, coco_train=16, coco_val=6)
    data = str(tmp_path / "data")
    shards = {"kind": "shards", "inputs": {"data": data}, "datasets": ["coco"], "crop": {"input_size": [64, 48]}}
    finetune = {
        "kind": "finetune",
        "inputs": {"shards": "shards"},
        "model": {"backbone": {"size": "micro", "image_size": [64, 48], "patch_size": 8}, "decoder": {"filters": 16}},
        "steps": 2,
        "global_batch_size": 4,
        "optimizer": {"lr": 0.001},
    }
    preset = pipeline_of(tmp_path, finetune, shards=shards)
    monkeypatch.setattr(reproducing, "load_rows", lambda: rows_of(preset, 73.8))
    words = [f"workspace={tmp_path / 'w'}", "runtime.device=cpu", "tracking.uri=null"]
    reproduction = reproducing.resolve("tiny/row", words)
    path = reproducing.reproduce(reproduction, chain.run_stages, weights=None, skip_check=True)
    found = json.loads(path.read_text())
    assert found["check"] == "skipped" and "AP" in found["measured"]
    assert set(found["fingerprints"]) == {"shards", "finetune", "evaluate"}
