"""`run_stage.py`: a mistake of the user is one line on stderr, exit code 2, and nothing is started."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launchers import execution, inputs, run_stage
from pipeline import graph, process_group, status
from pipeline.artifacts import publish
from pipeline.config_file import load_pipeline
from pipeline.errors import ConfigError, VitruvianError
from pipeline.graph import StagePlan
from pipeline.status import held, held_part
from stages import KINDS
from tests.faults.fixtures import raw_coco

SCRIPT = Path(run_stage.__file__).resolve()
MAE: dict[str, Any] = {
    "kind": "mae",
    "inputs": {"shards": "./shards"},
    "model": {"backbone": {"size": "micro", "image_size": [32, 32], "patch_size": 8}, "decoder_width": 32},
    "steps": 10,
    "global_batch_size": 8,
    "optimizer": {"lr": 0.001},
}


pytestmark = pytest.mark.usefixtures("own_process")


def publish_at(final: Path) -> None:
    staged = final.with_name("." + final.name)
    staged.mkdir(parents=True)
    (staged / "payload").write_bytes(b"x")
    fields: dict[str, Any] = {"config": {}, "parents": {}, "metrics": {}, "licences": []}
    publish(staged, final, pipeline="p", stage="s", kind="shards", fingerprint="f", **fields)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A pipeline whose shards are there and whose two training stages never ran."""
    publish_at(tmp_path / "shards")
    last = {**MAE, "inputs": {"shards": "./shards", "init": "mae"}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "trial", "stages": {"mae": MAE, "last": last}}))
    return "p.yaml"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr, without its time."""
    code = run_stage.main(list(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return code, line.partition(" ")[2]


def plan(file: str, name: str, **changes: Any) -> StagePlan:
    return graph.plan(load_pipeline(file, [], KINDS), [name], **changes)[name]


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "mae", "sed=1"], "demo: sed: unknown key; did you mean 'seed'?"),
        (
            ["--stage", "mae", "stages.mae.optimizer.lrr=1"],
            "demo: stages.mae.optimizer.lrr: unknown key; did you mean 'lr'?",
        ),
        (["--stage", "mae", "stages.mae.steps=many"], "demo: stages.mae.steps: input should be a valid integer"),
        (["--stage", "mae", "engine.precision=fp16"], "demo: engine.precision: input should be 'float32' or 'bf16'"),
        (["--stage", "mea"], "--stage: pipeline 'demo' has no stage 'mea'; did you mean 'mae'?"),
        (["--stage", "mae", "--config", "demoo"], "no pipeline 'demoo': neither a file nor a shipped preset"),
        (["--stage", "mae", "--config", "none.yaml"], "no pipeline 'none.yaml'"),
        (["--stage", "mae", "seed"], "override 'seed': expected key=value"),
        (["--stage", "mae", "stages.mae=null"], "no stage and no path 'mae'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, line = call(capsys, *arguments)
    assert code == 2 and line.startswith("error: ") and said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: !!python/object/apply:os.system ['touch canary']", "not YAML"),
        ("name: [", "not YAML"),
        ("\x00\x01", "not YAML"),
        ("just words", "expected a mapping at the top, found str"),
        ("base: middle.yaml", "has a base itself; one level is the limit"),
        ("name: x\nstages: {a: {kind: mea}}", "stages.a.kind: unknown stage kind 'mea'; did you mean 'mae'?"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "middle.yaml").write_text("base: demo")
    (tmp_path / "mine.yaml").write_text(text)
    code, line = call(capsys, "--stage", "mae", "--config", "mine.yaml")
    assert code == 2 and line.startswith("error: ") and "mine.yaml" in line and said in line
    assert not (tmp_path / "canary").exists()


def test_a_circle_of_stages_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], file: str) -> None:
    code, line = call(capsys, "--stage", "mae", "--config", file, "stages.mae.inputs.init=last")
    assert code == 2 and "in a circle" in line and "mae -> last" in line


def test_a_missing_trained_input_names_the_command_that_makes_it(capsys: pytest.CaptureFixture[str], file: str) -> None:
    code, line = call(capsys, "--stage", "last", "--config", file, "seed=3", "description=two words")
    assert code == 2 and "stage 'last' needs the artifact of 'mae', which has not finished (never ran)" in line
    assert line.endswith("make it with: vitruvian run p.yaml --until mae seed=3 'description=two words'")


def test_an_input_that_is_no_artifact_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str
) -> None:
    (tmp_path / "empty").mkdir()
    code, line = call(capsys, "--stage", "mae", "--config", file, "stages.mae.inputs.shards=./empty")
    assert code == 2 and "'./empty' is neither an artifact" in line


def test_an_unknown_option_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--stage", "mae", "--fresch"], []):
        with pytest.raises(SystemExit) as caught:
            run_stage.main(arguments)
        assert caught.value.code == 2
    assert "--stage" in capsys.readouterr().err


def test_options_and_overrides_mix_and_the_launchers_local_rank_comes_first() -> None:
    found = run_stage.parser().parse_intermixed_args(
        ["--local_rank=3", "seed=1", "--stage", "mae", "a.b=2", "--config", "x", "--dry-run", "c=3"]
    )
    assert (found.local_rank, found.stage, found.config, found.dry_run) == (3, "mae", "x", True)
    assert found.overrides == ["seed=1", "a.b=2", "c=3"] and not found.fresh
    assert run_stage.parser().parse_intermixed_args(["--local-rank", "1", "--stage", "mae"]).config == "demo"


def test_the_local_rank_of_an_old_launcher_reaches_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "--local_rank=2", "--stage", "nothing")
    assert os.environ["LOCAL_RANK"] == "2"


def test_a_finished_stage_is_skipped_and_says_why(capsys: pytest.CaptureFixture[str], file: str) -> None:
    done = plan(file, "mae")
    graph.record_identity(done)
    publish_at(done.run_dir / "artifact")
    code, line = call(capsys, "--stage", "mae", "--config", file, "tracking.uri=null")
    assert code == 0 and line == f"mae: skipped, finished with the same fingerprint ({done.run_dir})"


def test_a_skipped_stage_sends_what_tracking_missed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = plan(file, "mae")
    publish_at(done.run_dir / "artifact")
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run_stage, "sync", lambda *given: sent.append(given[1:]))
    assert run_stage.main(["--stage", "mae", "--config", file]) == 0
    tags = {"fingerprint": done.fingerprint, "stage": "mae", "kind": "mae", "pipeline": "trial"}
    tags["parent.shards"] = done.inputs["shards"].digest
    assert sent == [(done.run_dir, "mae", tags, done.parameters, done.datasets)]
    monkeypatch.setenv("RANK", "1")
    assert run_stage.main(["--stage", "mae", "--config", file]) == 0 and len(sent) == 1


def test_a_damaged_artifact_is_named_and_fresh_gets_past_it(
    capsys: pytest.CaptureFixture[str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = plan(file, "mae")
    publish_at(done.run_dir / "artifact")
    (done.run_dir / "artifact" / "payload").write_bytes(b"longer")
    code, line = call(capsys, "--stage", "mae", "--config", file)
    assert code == 2 and "payload: missing or of another size" in line and "--fresh" in line

    monkeypatch.setattr(execution, "module_of", lambda kind: SimpleNamespace(run=lambda context, config: None))
    monkeypatch.setattr(process_group, "start_process_group", lambda *_: None)
    code = run_stage.main(
        ["--stage", "mae", "--config", file, "--fresh", "tracking.uri=null", "runtime.hang_minutes=null"]
    )
    said = capsys.readouterr().err
    assert code == 0 and f"the old run was moved to {done.run_dir}.old-1" in said, said
    assert "mae: starts, asked for with --fresh" in said and not (done.run_dir / "artifact").exists()
    assert (done.run_dir.with_name(f"{done.run_dir.name}.old-1") / "artifact" / "payload").is_file()


@pytest.mark.fault(10)
def test_fresh_leaves_a_run_that_another_process_holds_alone(capsys: pytest.CaptureFixture[str], file: str) -> None:
    """Of a stage that doesn't train, which joins no others."""
    Path("people.yaml").write_text("name: people\nstages: {data: {kind: synthetic}}")
    run_dir = plan("people.yaml", "data").run_dir
    with held(run_dir):
        code, line = call(capsys, "--stage", "data", "--config", "people.yaml", "--fresh")
        assert code == 2 and f"{run_dir}: is being run by process {os.getpid()} on " in line
        assert [path.name for path in run_dir.iterdir()] == ["lock"]
    assert [path.name for path in run_dir.parent.iterdir()] == [run_dir.name]


@pytest.mark.fault(4)
@pytest.mark.parametrize("part", [(), ("--part", "0/2")])
def test_a_stop_file_ends_a_stage_that_does_not_train_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[str, ...]
) -> None:
    """The stage is busy with images, where errors are caught. A file of an earlier request is no request."""
    stage = {"kind": "shards", "inputs": {"data": str(raw_coco(tmp_path / "raw"))}, "datasets": ["coco"]}
    Path("s.yaml").write_text(yaml.safe_dump({"name": "trial", "tracking": {"uri": None}, "stages": {"shards": stage}}))
    arguments = ["--stage", "shards", "--config", "s.yaml", "runtime.workers=1", *part]
    run_dir = plan("s.yaml", "shards").run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "STOP").touch()

    def busy(context: Any, config: Any) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                time.sleep(1.5)
                (run_dir / "STOP").touch()
            except Exception:
                continue

    with monkeypatch.context() as changed:
        changed.setattr(execution, "module_of", lambda kind: SimpleNamespace(run=busy))
        assert run_stage.main(arguments) == 75
    assert "stopped on request; the same command goes on with what is missing" in capsys.readouterr().err
    if not part:  # parts record nothing
        assert status.read_status(run_dir)["exit_code"] == 75
        assert run_stage.main(arguments) == 0 and (run_dir / "artifact").exists()


@pytest.mark.fault(10)
def test_a_lock_that_was_moved_away_while_it_was_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def flock(lock: Any, kind: int) -> None:
        if not taken:
            (tmp_path / "run").rename(tmp_path / "run.old-1")
        taken.append(kind)
        fcntl.flock(lock, kind)

    monkeypatch.setattr(status, "fcntl", SimpleNamespace(**vars(fcntl) | {"flock": flock}))
    with held(tmp_path / "run"):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), held(tmp_path / "run"):
            pass
    assert len(taken) == 2


def test_missing_data_is_made_first_in_a_process_of_its_own(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def fake(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 75)

    monkeypatch.setattr(inputs, "subprocess", SimpleNamespace(run=fake))
    for name in ("RANK", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    workspace = f"workspace={tmp_path / 'w'}"
    pipeline = load_pipeline("demo", [workspace], KINDS)
    with pytest.raises(VitruvianError, match="stage 'data' ended with exit code 75") as caught:
        run_stage.run(pipeline, "mae", "demo", [workspace])
    assert caught.value.exit_code == 75
    [(command, env)] = calls
    assert command[1:] == ["-m", "launchers.run_stage", "--stage", "data", "--config", "demo", workspace]
    assert not {"RANK", "MASTER_ADDR", "WORLD_SIZE"} & env.keys()


def test_the_script_itself_prints_one_line_without_a_traceback(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--local_rank=0", "--stage", "mae", "sed=1"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert found.returncode == 2 and found.stdout == ""
    [line] = found.stderr.splitlines()
    assert line.endswith("error: demo: sed: unknown key; did you mean 'seed'?")


def test_help_teaches_by_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for word in ("deepspeed launchers/run_stage.py --stage mae", "75 stopped on request", "key=value"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--stage", "shards", "--part", "4/4"],
            "--part: expected I/N with I from 0 to N - 1, such as 0/4, found '4/4'",
        ),
        (["--stage", "shards", "--part", "1"], "--part: expected I/N"),
        (["--stage", "mae", "--part", "0/4"], "--part: stage 'mae' of kind 'mae' can't be made in parts"),
    ],
)
def test_a_wrong_part_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, line = call(capsys, *arguments)
    assert code == 2 and line.startswith(f"error: {said}")


def test_parts_are_held_beside_each_other_but_not_beside_the_whole(tmp_path: Path) -> None:
    with held_part(tmp_path, (0, 2)), held_part(tmp_path, (1, 2)):
        with pytest.raises(ConfigError, match="is being run by the jobs that make its parts"), held(tmp_path):
            pass
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), held_part(tmp_path, (0, 2)):
            pass
    with held(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"), held_part(tmp_path, (0, 2)):
        pass
