"""`vitruvian`: choosing stages, one-line mistakes, and the processes that it starts."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers import chain, cli, console
from pipeline import graph
from pipeline.artifacts import publish
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.status import Status, held
from stages import KINDS


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def demo(tmp_path: Path) -> PipelineConfig:
    return load_pipeline("demo", [f"workspace={tmp_path / 'w'}"], KINDS)


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines on stderr without their times."""
    monkeypatch.setattr(sys, "argv", ["vitruvian", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    lines = [line.partition(" ")[2] for line in captured.err.splitlines()]
    return int(caught.value.code or 0), captured.out, lines


@pytest.mark.parametrize("command", ["run", "status"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "sed=1"], "demo: sed: unknown key; did you mean 'seed'?"),
        (["demo", "stages.mae.model.backbone.dept=1"], "unknown key; did you mean 'depth'?"),
        (
            ["demo", "stages.mae.steps=-1"],
            "demo: stages.mae.steps: input should be greater than or equal to 1, found -1",
        ),
        (["demoo"], "no pipeline 'demoo': neither a file nor a shipped preset; did you mean 'demo'?"),
        (["demo", "seed"], "override 'seed': expected key=value"),
        (["evil.yaml"], "evil.yaml: not YAML"),
        (["words.yaml"], "words.yaml: expected a mapping"),
        (["top.yaml"], "has a base itself"),
        (["demo", "stages.mae.inputs.init=finetune"], "in a circle: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.system ['touch canary']")
    (tmp_path / "words.yaml").write_text("words")
    (tmp_path / "middle.yaml").write_text("base: demo")
    (tmp_path / "top.yaml").write_text("base: middle.yaml")
    code, out, [line] = call(capsys, monkeypatch, command, *arguments)
    assert code == 2 and line.startswith("error: ") and said in line and out == ""
    assert not (tmp_path / "canary").exists() and not (tmp_path / "workspace").exists()


@pytest.mark.parametrize("option", ["--from", "--until", "--only"])
def test_an_unknown_stage_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    code, _, [line] = call(capsys, monkeypatch, "run", "demo", option, "fintune")
    assert code == 2 and line == f"error: {option}: no stage 'fintune'; did you mean 'finetune'?"


def test_an_unknown_command_or_option_is_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, monkeypatch, "runn", "demo")[0] == 2
    assert call(capsys, monkeypatch, "run", "demo", "--dry-runn")[0] == 2


def test_stages_are_chosen_from_until_and_only(demo: PipelineConfig) -> None:
    everything = ["data", "shards", "mae", "finetune", "token", "student_alone", "distill", "evaluate"]
    assert chain.choose(demo, None, None, None) == everything
    assert chain.choose(demo, None, "finetune", None) == everything[:4]
    assert chain.choose(demo, None, "student_alone", None) == ["data", "shards", "student_alone"]
    assert chain.choose(demo, "token", None, None) == ["token", "distill", "evaluate"]
    assert chain.choose(demo, "mae", "token", None) == ["mae", "finetune", "token"]
    assert chain.choose(demo, None, None, "mae") == ["mae"]
    with pytest.raises(ConfigError):
        chain.choose(demo, None, None, "none")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--from", "token", "--until", "mae"],
            "--from token --until mae: mae does not need token, so nothing would run; end at one of token, distill, "
            "evaluate, or leave out --from",
        ),
        (
            ["--from", "token", "--until", "student_alone"],
            "--from token --until student_alone: student_alone does not need token",
        ),
        (["--only", "mae", "--from", "mae"], "--only mae is one stage: leave out --from and --until, or --only"),
        (["--only", "mae", "--until", "token"], "--only mae is one stage: leave out --from and --until, or --only"),
    ],
)
def test_options_that_contradict_each_other_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
    dry: tuple[str, ...],
) -> None:
    code, out, [line] = call(capsys, monkeypatch, "run", "demo", *options, *dry)
    assert code == 2 and out == "" and line.startswith(f"error: {said}")


def test_a_stage_runs_in_a_process_of_its_own(demo: PipelineConfig) -> None:
    alone = demo.model_copy(update={"runtime": demo.runtime.model_copy(update={"processes": 1})})
    expected = [sys.executable, "-m", "launchers.run_stage", "--stage", "mae", "--config", "demo", "seed=1"]
    assert chain.command_of(alone, "mae", ["demo", "seed=1"], fresh=False) == expected
    assert "--fresh" in chain.command_of(alone, "mae", ["demo"], fresh=True)


def test_training_on_several_processes_goes_through_the_deepspeed_launcher(demo: PipelineConfig) -> None:
    several = demo.model_copy(update={"runtime": demo.runtime.model_copy(update={"processes": 3})})
    command = chain.command_of(several, "mae", ["demo", "seed=1"], fresh=False)
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "3"]
    assert command[-7:] == ["--module", "launchers.run_stage", "--stage", "mae", "--config", "demo", "seed=1"]
    assert "deepspeed.launcher.runner" not in chain.command_of(several, "data", ["demo"], fresh=False)


def test_a_cpu_runs_one_process_unless_told_otherwise(demo: PipelineConfig) -> None:
    cpu = demo.model_copy(update={"runtime": demo.runtime.model_copy(update={"device": "cpu"})})
    assert chain.processes(cpu) == 1
    assert chain.processes(cpu.model_copy(update={"runtime": cpu.runtime.model_copy(update={"processes": 2})})) == 2


def test_status_says_what_each_stage_would_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, demo: PipelineConfig
) -> None:
    data = graph.plan(demo)["data"]
    (data.run_dir / "work").mkdir(parents=True)
    Status(data.run_dir, writes=True).running(3, 10)
    code, out, lines = call(capsys, monkeypatch, "status", "demo", f"workspace={demo.workspace}", "--json")
    rows = {row["stage"]: row for row in json.loads(out)}
    assert code == 0 and lines == [] and list(rows) == list(graph.order(demo))
    assert rows["data"] == {
        "stage": "data",
        "kind": "synthetic",
        "state": "resume (running)",
        "step": "3/10",
        "run directory": str(data.run_dir),
    }
    assert rows["mae"]["state"] == "waiting" and rows["mae"]["run directory"] == "for shards"
    record = {"scripts": "x", "jobs": [{"id": "7", "name": "demo.data", "tasks": {"submitted": 1}}]}
    (demo.workspace / "demo" / "slurm").mkdir()
    write_json(demo.workspace / "demo" / "slurm" / "jobs.json", {"data": record})
    monkeypatch.setenv("PATH", "/without/slurm")
    code, out, _ = call(capsys, monkeypatch, "status", "demo", f"workspace={demo.workspace}", "--json")
    assert [row["job"] for row in json.loads(out)][:2] == ["7 submitted", "-"]
    code, out, _ = call(capsys, monkeypatch, "status", "demo", f"workspace={demo.workspace}")
    assert code == 0 and "resume (running)" in out and "7 submitted" in out and "student_alone" in out


def finish(run_dir: Path, table: dict[str, Any] | None = None) -> None:
    staged = run_dir / ".artifact"
    staged.mkdir(parents=True)
    (staged / "payload").write_bytes(b"x")
    if table:
        write_json(staged / "table.json", table)
    fields: dict[str, Any] = {"config": {}, "parents": {}, "metrics": {}, "licences": []}
    publish(staged, run_dir / "artifact", pipeline="p", stage="s", kind="k", fingerprint="f", **fields)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Arguments for a pipeline of two stages that read nothing."""
    content = {"name": "pair", "stages": {"one": {"kind": "synthetic"}, "two": {"kind": "synthetic"}}}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(content))
    return ["run", "pair.yaml", f"workspace={tmp_path / 'w'}"]


def started(monkeypatch: pytest.MonkeyPatch, pair: list[str], code: int = 0) -> list[str]:
    """The stages whose processes are started from now on; each ends at once with `code`, finished if that is 0."""
    names: list[str] = []

    def fake(command: list[str], *_: Any) -> int:
        name = command[command.index("--stage") + 1]
        names.append(name)
        run_dir = graph.plan(load_pipeline(pair[1], pair[2:3], KINDS))[name].run_dir
        if not code and not (run_dir / "artifact").exists():
            finish(run_dir, {"columns": ["model", "AP"], "rows": [["teacher", "71.0"]], "notes": ["a note"]})
        return code

    monkeypatch.setattr(chain, "_wait_for", fake)
    return names


def test_finished_stages_are_skipped_and_results_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pair: list[str]
) -> None:
    names = started(monkeypatch, pair)
    code, out, lines = call(capsys, monkeypatch, *pair, "tracking.uri=null")
    assert code == 0 and names == ["one", "two"] and lines == []
    assert "71.0" in out and "a note" in out
    code, out, lines = call(capsys, monkeypatch, *pair, "tracking.uri=null", "--json")
    assert code == 0 and names == ["one", "two"]
    assert [line.split(",")[0] for line in lines] == ["one: skipped", "two: skipped"]
    assert json.loads(out)["two"]["rows"] == [["teacher", "71.0"]]
    assert call(capsys, monkeypatch, *pair, "tracking.uri=null", "--fresh", "--only", "two")[0] == 0
    assert names == ["one", "two", "two"]


def test_a_finished_stage_that_tracking_missed_gets_its_process_once_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pair: list[str]
) -> None:
    names = started(monkeypatch, pair)
    for _ in range(2):
        assert call(capsys, monkeypatch, *pair)[0] == 0
    assert names == ["one", "two"] * 2
    for run_dir in (graph.plan(load_pipeline(pair[1], pair[2:], KINDS))[name].run_dir for name in ("one", "two")):
        write_json(run_dir / "mlflow.json", {"complete": True})
    assert call(capsys, monkeypatch, *pair)[0] == 0
    assert names == ["one", "two"] * 2


@pytest.mark.parametrize(("ended", "code"), [(75, 75), (2, 2), (1, 1), (-9, 1)])
def test_the_exit_code_of_a_stage_is_passed_on_and_nothing_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pair: list[str], ended: int, code: int
) -> None:
    names = started(monkeypatch, pair, ended)
    found, _, lines = call(capsys, monkeypatch, *pair)
    assert found == code and names == ["one"]
    assert lines == (["stopped on request; the same command goes on"] if ended == 75 else [])


_STAGE = """
import sys, time
from pathlib import Path
from pipeline.status import held
run_dir, code = Path(sys.argv[1]), int(sys.argv[2])
with held(run_dir):
    for _ in range(2):
        while not (run_dir / "STOP").exists():
            time.sleep(0.05)
        (run_dir / "STOP").unlink()
sys.exit(code)
"""


@pytest.mark.fault(4)
@pytest.mark.parametrize(("number", "ended"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 0)])
def test_a_signal_asks_the_running_stage_to_stop_until_it_has_and_nothing_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pair: list[str], number: int, ended: int
) -> None:
    """The stage is one that takes the first request away, as one that starts does; or it was done before it saw any."""
    run_dirs = {name: plan.run_dir for name, plan in graph.plan(load_pipeline(pair[1], pair[2:], KINDS)).items()}

    def command_of(config: PipelineConfig, name: str, *_: Any) -> list[str]:
        threading.Thread(target=tell, daemon=True).start()
        return [sys.executable, "-c", _STAGE, str(run_dirs[name]), str(ended)]

    def tell() -> None:
        while not (run_dirs["one"] / "lock").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(chain, "command_of", command_of)
    monkeypatch.setattr(chain, "_LOOK_SECONDS", 0.2)
    code, _, lines = call(capsys, monkeypatch, *pair)
    assert code == 75 and lines == ["stopped on request; the same command goes on"]
    assert not run_dirs["two"].exists() and signal.getsignal(number) == before


def test_a_run_that_another_process_holds_is_not_asked_to_stop(pair: list[str]) -> None:
    config = load_pipeline(pair[1], pair[2:], KINDS)
    run_dir = graph.plan(config)["one"].run_dir
    with held(run_dir), subprocess.Popen(["sleep", "60"]) as other:
        chain._ask_to_stop(config, "one", other.pid)
        assert not (run_dir / "STOP").exists()
        chain._ask_to_stop(config, "one", os.getpid())
        assert (run_dir / "STOP").exists()
        other.kill()


def test_only_rank_0_tells_its_progress_and_all_of_it_is_on_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for rank in (0, 1):
        console.setup_logging(rank, tmp_path / "run")
        logging.getLogger("x").info("progress of %d", rank)
        logging.getLogger("x").warning("warning of %d", rank)
    err = capsys.readouterr().err
    assert "progress of 0" in err and "progress of 1" not in err
    assert "[rank 1]" in err and "warning of 1" in err
    assert "progress of 1" in (tmp_path / "run" / "log-1.txt").read_text()
    assert "rank" not in (tmp_path / "run" / "log-0.txt").read_text()


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(capsys, monkeypatch, "--help")
    assert code == 0 and all(word in out for word in ("run", "status", "submit", "cancel", "predict", "data"))
    code, out, _ = call(capsys, monkeypatch, "run", "--help")
    assert code == 0 and all(
        word in out for word in ("--from", "--until", "--only", "--fresh", "--dry-run", "key=value")
    )
