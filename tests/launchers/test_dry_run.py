"""What `--dry-run` says of a model: multiply-adds, and memory under each ZeRO stage."""

import re

import pytest
from typer.testing import CliRunner

from launchers.cli import app
from launchers.dry_run import GPUS


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
    memory = next(rows for title, rows in tables().items() if f"with {GPUS} processes" in title)
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
        found = tables(f"stages.finetune.model.backbone.size={size}", preset="vitpose_l_to_b")
        return gibibytes(next(rows for title, rows in found.items() if title.startswith("memory"))["distill"])[2]

    assert memory("H") - memory("L") == pytest.approx(1.12 * 4 * (637.2e6 - 308.5e6) / 2**30, abs=0.02)
