"""The sbatch files: what they say, that nothing breaks out of them, and when their shell goes back to the queue."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from launchers import cli, slurm
from launchers.slurm_script import folder_of, render, take_ranks
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.distributed import cores, cores_of_rank
from pipeline.errors import ConfigError, DataError, VitruvianError
from pipeline.files import write_json
from pipeline.slurm_config import SlurmConfig
from stages import KINDS
from tests.slurm.cluster import wait_until

ROOT = Path(__file__).resolve().parents[2]
RICH: dict[str, Any] = {
    "partition": "gpu",
    "account": "pose",
    "nodes": 4,
    "gpus_per_node": 8,
    "cpus_per_task": 12,
    "memory": "900G",
    "time": "1-12:00:00",
    "signal_seconds": 300,
    "array": 16,
    "options": {"exclusive": True, "constraint": "h200|h100", "comment": "two words", "nice": 10, "overcommit": False},
    "setup": ["module load cuda", "export NCCL_DEBUG=WARN"],
    "wrapper": ["apptainer", "exec", "--nv", "my images/pose.sif"],
    "python": "python3",
    "srun": ["--cpu-bind=cores"],
    "stages": {"shards": {"partition": "cpu", "cpus_per_task": 32}, "evaluate": {"gpus_per_node": 1}},
}


def demo(tmp_path: Path, **slurm_section: Any) -> PipelineConfig:
    pipeline = load_pipeline("demo", [f"workspace={tmp_path / 'w'}"], KINDS)
    return pipeline.model_copy(update={"slurm": SlurmConfig(**slurm_section)})


def header(script: str) -> list[str]:
    """The options of the header, unquoted."""
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines() if line.startswith("#SBATCH")]


def srun_of(script: str) -> list[str]:
    [line] = [line for line in script.splitlines() if line.strip().startswith("srun ")]
    return shlex.split(line.strip().removesuffix(" &"))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_file_of_a_training_stage_asks_for_what_the_config_says(tmp_path: Path) -> None:
    script = render(demo(tmp_path, **RICH), "mae", "demo", ["seed=3", "slurm.nodes=4"])
    options = header(script)
    assert options == [
        "--job-name=demo.mae",
        f"--output={tmp_path}/w/demo/slurm/mae.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--gpus-per-node=8",
        "--mem=900G",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=pose",
        "--exclusive",
        "--constraint=h200|h100",
        "--comment=two words",
        "--nice=10",
    ]
    assert srun_of(script) == [
        *("srun", "--kill-on-bad-exit=1", "--cpus-per-task=12", "--cpu-bind=cores"),
        *("apptainer", "exec", "--nv", "my images/pose.sif", "python3", "-m", "launchers.run_stage"),
        *("--stage", "mae", "--config", "demo", "seed=3"),
    ]
    assert "\nmodule load cuda\nexport NCCL_DEBUG=WARN\n" in script
    assert "MASTER_ADDR=" in script and f"cd {tmp_path} ||" in script


def test_a_stage_that_does_not_train_is_one_task_without_gpus_unless_its_own_section_says_so(tmp_path: Path) -> None:
    pipeline = demo(tmp_path, **RICH)
    shards = header(render(pipeline, "shards", "demo", []))
    assert {"--nodes=1", "--ntasks-per-node=1", "--partition=cpu", "--cpus-per-task=32"} <= set(shards)
    assert not [option for option in shards if "gpu" in option]
    assert "MASTER_ADDR" not in render(pipeline, "shards", "demo", [])
    evaluate = header(render(pipeline, "evaluate", "demo", []))
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--partition=gpu"} <= set(evaluate)


def test_shards_are_made_by_an_array_and_then_published_by_one_job(tmp_path: Path) -> None:
    files = slurm._scripts(demo(tmp_path, array=16), "shards", "demo", [])
    assert list(files) == ["shards.parts.sbatch", "shards.sbatch"]
    parts, whole = files.values()
    assert "--array=0-15" in header(parts) and header(parts)[1].endswith("shards.part-%a.log")
    assert srun_of(parts)[-2:] == ["--part", "$SLURM_ARRAY_TASK_ID/16"]
    assert "--part" not in whole and not [option for option in header(whole) if "array" in option]
    assert list(slurm._scripts(demo(tmp_path, array=16), "mae", "demo", [])) == ["mae.sbatch"]
    assert list(slurm._scripts(demo(tmp_path), "shards", "demo", [])) == ["shards.sbatch"]


def test_without_a_python_of_its_own_a_job_runs_the_interpreter_that_submits(tmp_path: Path) -> None:
    command = srun_of(render(demo(tmp_path), "mae", "demo", []))
    assert command[2:4] == [sys.executable, str(ROOT / "launchers" / "run_stage.py")]


def test_words_of_the_command_line_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's $(touch canary)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    evil = ["description=$(touch canary); `touch canary` & 'x' \"y\"\n#SBATCH --account=other"]
    script = render(demo(tmp_path), "mae", "demo", evil)
    assert "--account=other" not in header(script.split("\ncd ")[0])
    only_words = (
        script[script.index("\ncd ") :].replace("srun --kill", "printf '%s\\0' --kill").replace("exit 1", "true")
    )
    only_words = only_words.replace("scontrol", "true").replace('[ -z "$asked" ]', "true")
    done = subprocess.run(["bash", "-c", only_words], capture_output=True, text=True, timeout=20)
    assert done.stdout.split("\0")[:-1][-1] == evil[0]
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize(
    "section",
    [
        {"partition": "gpu\n#SBATCH --account=other"},
        {"partition": "gpu other"},
        {"account": "$(id)"},
        {"memory": "lots"},
        {"time": "soon"},
        {"time": "1:00\n"},
        {"time": 43200},
        {"setup": ["one\ntwo"]},
        {"wrapper": ["a\nb"]},
        {"srun": ["a\rb"]},
        {"options": {"comment": "a\nb"}},
        {"options": {"comment": "it's"}},
        {"options": {"comment": "back\\slash"}},
        {"options": {"Comment here": "x"}},
        {"options": {"dependency": "afterok:1"}},
        {"options": {"no-requeue": True}},
        {"options": {"time": "1:00"}},
        {"nodes": 0},
        {"stages": {"mae": {"partition": "a\nb"}}},
    ],
)
def test_values_that_would_break_out_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmConfig(**section)


def test_a_workspace_that_sbatch_would_misread_is_refused(tmp_path: Path) -> None:
    for name in ("it's", 'quo"te', "back\\slash", "two\nlines"):
        pipeline = demo(tmp_path).model_copy(update={"workspace": tmp_path / name})
        with pytest.raises(ConfigError, match="choose another workspace"):
            render(pipeline, "mae", "demo", [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slurm.partitoin=x", "slurm.partitoin: unknown key; did you mean 'partition'?"),
        ("slurm.time=12:00:00", "slurm.time: write the days, as in 0-12:00:00, or put it in quotes"),
        ("slurm.stages.maee.time=0-1", "slurm.stages: no stage 'maee' among data, shards"),
        ("slurm.stages.shards.nodes=2", "slurm.stages.shards: this kind of stage runs as one process on one node"),
        ("slurm.options.signal=x", "slurm.options: signal is not for options"),
    ],
)
def test_a_mistake_is_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_pipeline("demo", [override], KINDS)


def test_nothing_of_it_is_in_a_fingerprint(tmp_path: Path) -> None:
    plain, rich = graph.plan(demo(tmp_path))["data"], graph.plan(demo(tmp_path, **RICH))["data"]
    assert plain.fingerprint == rich.fingerprint is not None


def test_a_dry_run_prints_every_file_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    pipeline = demo(tmp_path, array=2)
    slurm.submit(pipeline, graph.order(pipeline), "demo", [], dry_run=True)
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.startswith("### ")]
    assert [Path(title.split(",")[0].removeprefix("### ")).name for title in titles] == [
        *("data.sbatch", "shards.parts.sbatch", "shards.sbatch", "mae.sbatch", "finetune.sbatch", "token.sbatch"),
        *("student_alone.sbatch", "distill.sbatch", "evaluate.sbatch"),
    ]
    assert titles[4].endswith(", after shards, mae, data")
    assert out.count("#!/bin/bash") == 9 and not (tmp_path / "w").exists()


def test_without_slurm_submit_says_so_and_status_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    pipeline = demo(tmp_path)
    assert slurm.refreshed(pipeline) == {}
    with pytest.raises(VitruvianError, match="squeue: not found: this machine has no Slurm"):
        slurm.submit(pipeline, ["data"], "demo", [], dry_run=False)
    recorded = {"data": job("7", "demo.data")}
    write_json(folder_of(pipeline) / "jobs.json", recorded)
    assert slurm.refreshed(pipeline) == recorded
    assert slurm.describe(recorded["data"]) == "7 submitted"


def test_missing_raw_data_is_told_before_anything_is_submitted(tmp_path: Path) -> None:
    pipeline = load_pipeline("vitpose_s", [f"workspace={tmp_path / 'w'}"], KINDS)
    with pytest.raises(DataError, match="no folder .* where the raw data of coco"):
        slurm.submit(pipeline, graph.order(pipeline), "vitpose_s", [], dry_run=True)


def test_states_come_from_squeue_and_what_it_has_forgotten_is_not_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = demo(tmp_path)
    folder_of(pipeline).mkdir(parents=True)
    shards = {"scripts": "x", "jobs": [*job("9", "demo.shards.parts")["jobs"], *job("10", "demo.shards")["jobs"]]}
    known = {
        "shards": shards,
        "data": job("3", "demo.data"),
        "mae": job("4", "demo.mae"),
        "token": job("99", "demo.token"),
    }
    write_json(folder_of(pipeline) / "jobs.json", known)
    parts = [f"9|demo.shards.parts|{state}|None" for state in ("COMPLETED", "RUNNING", "RUNNING")]
    others = ["10|demo.shards|PENDING|Dependency", "3|demo.data|COMPLETED|None", "99|of another|RUNNING|None"]
    lines = [*parts, *others]
    fake_commands(tmp_path, monkeypatch, squeue="printf '%s\\n' " + shlex.join(lines))
    jobs = slurm.refreshed(pipeline)
    told = {name: slurm.describe(record) for name, record in jobs.items()}
    assert told["shards"] == "9 COMPLETED 1, RUNNING 2; 10 PENDING (Dependency)"
    assert (told["data"], told["mae"], told["token"]) == ("3 COMPLETED", "4 ended", "99 ended")
    assert [name for name in jobs if slurm._in_queue(jobs[name])] == ["shards"]
    fake_commands(tmp_path, monkeypatch, squeue="echo 'no controller' >&2; exit 1")
    assert slurm.refreshed(pipeline) == known
    with pytest.raises(VitruvianError, match="squeue failed: no controller"):
        slurm.refreshed(pipeline, strictly=True)


def test_variables_of_a_surrounding_job_do_not_reach_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_commands(tmp_path, monkeypatch, sbatch="env >seen; echo '12;cluster'")
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setenv("SLURM_CONF", "/kept")
    monkeypatch.setenv("OF_THE_USER", "kept")
    assert slurm._sbatch("file", ["1", "2", "1"]) == "12"
    seen = Path("seen").read_text()
    assert "foreign" not in seen and "SLURM_CONF=/kept" in seen and "OF_THE_USER=kept" in seen


def job(number: str, name: str) -> dict[str, Any]:
    """The record of a stage with one job, as `submit` writes it."""
    return {"scripts": "x", "jobs": [{"id": number, "name": name, "tasks": {"submitted": 1}}]}


def fake_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Puts shell scripts of these names first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    if str(folder) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


RUNNING = "JobId=5 JobState=RUNNING Reason=None PreemptTime=None"


@pytest.mark.parametrize(
    ("asked", "srun", "job", "restarts", "requeued", "code"),
    [
        (None, "exit 0", RUNNING, 0, False, 0),
        (None, "exit 2", RUNNING, 0, False, 2),
        (None, "exit 75", RUNNING, 0, False, 75),  # a STOP file: the user's wish
        (None, "exit 75", RUNNING.replace("PreemptTime=None", "PreemptTime=2030-01-01T00:00:00"), 0, True, 0),
        (signal.SIGUSR1, "exit 75", RUNNING, 0, True, 0),
        (signal.SIGUSR1, "exit 138", RUNNING, 3, True, 0),  # died of the signal before it could handle it
        (signal.SIGUSR1, "exit 0", RUNNING, 0, False, 0),
        (signal.SIGUSR1, "exit 1", RUNNING, 0, False, 1),
        (signal.SIGUSR1, "exit 75", RUNNING, 4, False, 75),
        (signal.SIGTERM, "exit 75", "JobId=5 JobState=CANCELLED Reason=None PreemptTime=None", 0, False, 75),
        (signal.SIGTERM, "exit 75", RUNNING, 0, True, 0),
    ],
)
def test_the_shell_goes_back_to_the_queue_only_when_slurm_asked_to_stop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: signal.Signals | None,
    srun: str,
    job: str,
    restarts: int,
    requeued: bool,
    code: int,
) -> None:
    waits = f"trap '{srun}' USR1; [ $ASKED = TERM ] && (sleep 0.5; kill -USR1 $$) &\ntouch started; while :; do sleep 0.05; done"
    fake_commands(
        tmp_path,
        monkeypatch,
        srun=waits if asked else srun,
        scontrol=f'case "$1 $2" in "show job") echo " {job} " ;; requeue*) echo "$2" >requeued ;; esac',
    )
    for name, value in {
        "SLURM_JOB_ID": "5",
        "SLURM_RESTART_COUNT": str(restarts),
        "ASKED": (asked or 0) and asked.name[3:],
    }.items():
        monkeypatch.setenv(name, str(value))
    script = render(demo(tmp_path, max_requeues=4), "shards", "demo", [])
    process = subprocess.Popen(["bash", "-c", script])
    if asked:
        wait_until(Path("started").exists, 20, "srun")
        process.send_signal(asked)
    assert process.wait(20) == code
    assert Path("requeued").exists() == requeued


def test_ranks_come_from_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    values = {"STEP_ID": "0", "STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "STEP_TASKS_PER_NODE": "2(x2)"}
    try:
        for name, value in values.items():
            os.environ[f"SLURM_{name}"] = value
        take_ranks()
        found = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert found == ["3", "1", "4", "2"]


def test_a_process_bound_to_cores_of_its_own_uses_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(own))
    for on_node, expected in ((str(own), 1), (str(2 * own), own)):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", on_node)
        assert cores_of_rank(own) == expected


def test_cancel_refuses_an_unknown_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--stage: no stage 'mea'; did you mean 'mae'?"):
        cli.cancel("demo", [f"workspace={tmp_path}"], "mea")


def test_the_examples_of_the_page_load(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    keys: set[str] = set()
    for number, body in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(body)
        pipeline = load_pipeline(file, [], KINDS)
        for name in pipeline.stages:
            render(pipeline, name, str(file), [])
        keys |= yaml.safe_load(body)["slurm"].keys()
    assert keys == SlurmConfig.model_fields.keys(), "every key has an example"
