"""What `--dry-run` says of a model: multiply-adds, and memory under each ZeRO stage."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launchers import reproduce, run_stage
from launchers.cli import app
from launchers.dry_run import GPUS
from pipeline import graph
from pipeline.config_file import load_pipeline
from pipeline.errors import ConfigError
from stages import KINDS
from tests.faults.fixtures import publish_at

pytestmark = pytest.mark.usefixtures("own_process")


def tables(*overrides: str, preset: str = "vitpose_b") -> dict[str, dict[str, list[str]]]:
    """The cells of each row, by table and stage."""
    result = CliRunner().invoke(app, ["run", preset, "--dry-run", *overrides])
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, list[str]]] = {}
    title = ""
    for line in result.output.splitlines():
        if "│" not in line:
            title = line.strip() if line[:1].isalpha() else title
            continue
        cells = [cell.strip() for cell in re.split("[│|]", line)[1:-1]]
        found.setdefault(title, {})[cells[0]] = cells[1:]
    return found


def gibibytes(cells: list[str]) -> list[float]:
    return [float(cell.removesuffix(" GiB")) for cell in cells]


def test_a_model_shows_the_papers_gflops_and_its_memory_under_zero_1_2_and_3() -> None:
    found = tables("runtime.processes=4", "engine.zero_stage=2")
    models = next(rows for title, rows in found.items() if title.startswith("models"))
    assert models["finetune"][2] == "17.1 + 1.42"
    memory = found["memory per process with 4 processes (float32)"]["finetune"]
    first, second, third = gibibytes(memory)
    assert first > second > third
    assert models["finetune"][4] == memory[1]


def test_alone_a_process_is_shown_what_eight_would_share() -> None:
    memory = next(rows for title, rows in tables("runtime.device=cpu").items() if f"with {GPUS} processes" in title)
    first, second, third = gibibytes(memory["finetune"])
    assert first > second > third


def test_frozen_parts_need_less() -> None:
    costs = {
        part: gibibytes(
            next(
                rows
                for title, rows in tables("runtime.processes=8", f"stages.finetune.freeze={part}").items()
                if title.startswith("memory")
            )["finetune"]
        )[0]
        for part in ("null", "attention", "ffn")
    }
    assert costs["null"] > costs["attention"] > costs["ffn"]


def test_a_larger_teacher_needs_more_of_every_process() -> None:
    def memory(size: str) -> float:
        sizes = [f"stages.{stage}.model.backbone.size={size}" for stage in ("imagenet_l", "finetune")]
        found = tables(*sizes, preset="vitpose_l_to_b")
        return gibibytes(next(rows for title, rows in found.items() if title.startswith("memory"))["distill"])[2]

    assert memory("H") - memory("L") == pytest.approx(1.12 * 4 * (637.2e6 - 308.5e6) / 2**30, abs=0.02)


def test_processes_are_one_a_gpu_as_they_are_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    assert any(title.startswith("models (processes: 4,") for title in tables())
    assert any(title.startswith("models (processes: 1,") for title in tables("runtime.device=cpu"))
    assert reproduce._hardware(load_pipeline("demo", ["runtime.device=auto"], KINDS))["processes"] == 4
    assert reproduce._hardware(load_pipeline("demo", ["runtime.device=cpu"], KINDS))["processes"] == 1


def test_the_title_names_the_stages_that_are_needed_and_would_not_run() -> None:
    assert "vitpose_b: what would run" in tables()
    [title] = [title for title in tables("--only", "finetune") if "what would run" in title]
    assert title == "vitpose_b: what would run (needed, but not chosen: shards, mae)"


@pytest.fixture
def done(tmp_path: Path) -> list[str]:
    """The words of a pipeline with one stage, which is done."""
    (tmp_path / "one.yaml").write_text("name: one\nstages: {data: {kind: synthetic}}")
    words = [str(tmp_path / "one.yaml"), f"workspace={tmp_path}"]
    run_dir = graph.plan(load_pipeline(words[0], words[1:], KINDS))["data"].run_dir
    publish_at(run_dir / "artifact", lambda staged: (staged / "payload").touch())
    return words


def test_with_fresh_a_finished_stage_would_start(done: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tables(*done[1:], preset=done[0])["one: what would run"]["data"][1] == "done"
    fresh = tables(*done[1:], "--fresh", preset=done[0])["one: what would run"]["data"]
    assert fresh[1:3] == ["start", "asked for with --fresh"]
    assert run_stage.main(["--stage", "data", "--config", *done, "--dry-run", "--fresh"]) == 0
    assert "asked for with --fresh" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["run", "vitpose_b"], ["reproduce", "table9/b"]])
def test_json_of_a_dry_run_is_refused(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert isinstance(result.exception, ConfigError) and result.output == ""
    assert "--json: --dry-run prints tables alone" in str(result.exception)
