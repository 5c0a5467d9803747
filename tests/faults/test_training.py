"""Ranks that die, stop, hang or compute nonsense. The faults are numbered as in docs/faults.md."""

import dataclasses
import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import read_artifact
from pipeline.checkpoint import load_tensor_file, load_tensors
from tests.chain.running import only_run
from tests.faults.injection import PLACES
from tests.faults.running import Left, Stage, left


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest) -> dict[str, Left]:
    """Runs that nothing happened to, by what they were run with."""
    return {}


def expected(stage: Stage, known: dict[str, Left]) -> Left:
    """What the stage leaves when nothing happens."""
    if stage.name not in known:
        known[stage.name] = stage.finish()
        stage.forget()
    return known[stage.name]


def kill(step: int, at: str = "step", rank: int = 1) -> dict[str, Any]:
    """kill -9 of a rank."""
    return {"do": "kill", "step": step, "at": at, "rank": rank}


@pytest.mark.fault(1)
def test_killed_at_several_steps_a_stage_ends_like_one_never_killed(stage: Stage, undisturbed: dict[str, Left]) -> None:
    clean = expected(stage, undisturbed)
    for step in (0, 5, 13, 19):
        outcome = stage.run(2, fault=kill(step, rank=step % 2))
        assert outcome.codes[step % 2] == -9
        assert not (stage.run_dir / "artifact").exists()
    assert stage.finish() == clean


@pytest.mark.fault(3)
@pytest.mark.fault(28)
@pytest.mark.parametrize("place", [place for place in PLACES if place != "step"])
@pytest.mark.slow
def test_killed_anywhere_in_a_step_a_save_or_an_evaluation(
    place: str, stage: Stage, undisturbed: dict[str, Left]
) -> None:
    clean = expected(stage, undisturbed)
    rank = 0 if place.startswith("save-") and place != "save-files" else 1
    step = 8 if place == "accumulation" else 10
    assert stage.run(2, fault=kill(step, place, rank)).codes[rank] == -9
    published = [path.name for path in (stage.run_dir / "resume").glob("step-*")]
    assert ("step-00000010" in published) == (place == "save-prune")
    assert stage.finish() == clean
    assert not list((stage.run_dir / "resume").glob(".step-*")), "what was half written is cleared away"


@pytest.mark.fault(28)
@pytest.mark.slow
def test_killed_at_the_end_of_an_epoch_and_in_the_next(stage: Stage, undisturbed: dict[str, Left]) -> None:
    """The shards hold 106 people, less those in evaluation images: an epoch ends inside a batch, after some 6 steps."""
    clean = expected(stage, undisturbed)
    for step in (6, 7, 12, 13):
        assert stage.run(2, fault=kill(step)).codes[1] == -9
    assert stage.finish() == clean


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", [pytest.param("step", marks=pytest.mark.slow), "evaluation"])
def test_a_signal_to_one_rank_saves_once_together_and_loses_no_step(
    name: str, place: str, stage: Stage, undisturbed: dict[str, Left]
) -> None:
    clean = expected(stage, undisturbed)
    step = 10 if place == "evaluation" else 7
    outcome = stage.run(2, fault={"do": "signal", "signal": name, "step": step, "at": place, "rank": 1})
    assert outcome.codes == [75, 75], outcome.log[-4000:]
    assert outcome.seconds < 20
    status = json.loads((stage.run_dir / "status.json").read_text())
    done = step if place == "evaluation" else step + 1
    assert (status["state"], status["saved_step"]) == ("stopped", done)
    # Only what it was stopped for: the points at 5 and 10 were due, those after a stop are one more.
    found = stage.finish()
    assert (found.digest, found.lines) == (clean.digest, clean.lines)


@pytest.mark.fault(4)
@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_with_75(stage: Stage, undisturbed: dict[str, Left]) -> None:
    clean = expected(stage, undisturbed)
    fault = {"do": "signal", "signal": "SIGTERM", "step": 0, "at": "step", "rank": 0}
    assert stage.run(2, fault=fault).codes == [75, 75]
    assert stage.finish().digest == clean.digest


@pytest.mark.fault(9)
@pytest.mark.slow
def test_ranks_and_zero_stages_change_between_launches(stage: Stage) -> None:
    """Samples and their order stay; the weights at load are the saved ones; then only rounding differs."""
    plain = ("average_decay=null",)
    overrides = [f"stages.finetune.{line}" for line in plain]
    clean = stage.finish(2, *overrides)
    stage.forget()
    launches = [(2, 1, 6), (1, 2, 11), (2, 3, 16), (2, 1, None)]
    for ranks, zero_stage, step in launches:
        fault = kill(step, rank=0) if step else None
        outcome = stage.run(ranks, *overrides, f"engine.zero_stage={zero_stage}", fault=fault)
        assert outcome.codes[0] == (-9 if step else 0), outcome.log[-4000:]
    found = left(stage.run_dir)
    assert [line["sample_checksum"] for line in found.lines] == [line["sample_checksum"] for line in clean.lines]
    losses = [line["loss"] for line in found.lines], [line["loss"] for line in clean.lines]
    assert losses[0][:5] == losses[1][:5]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.fault(9)
@pytest.mark.slow
def test_other_ranks_and_zero_stages_load_the_same_bits(stage: Stage, tmp_path: Path) -> None:
    """Weights, moments and optimizer steps, frozen or not; before a step is taken."""
    plain = "stages.finetune.average_decay=null"
    assert stage.run(2, plain, "engine.zero_stage=1", fault=kill(7)).codes[1] == -9
    saved = load_tensors(stage.run_dir / "resume" / "step-00000005")
    assert {name.split("/")[0] for name in saved} > {"weight", "exp_avg", "exp_avg_sq"}
    for ranks, zero_stage in ((2, 1), (1, 2), (2, 2), (2, 3), (1, 3), (2, 0)):
        folder = tmp_path / f"{ranks}-{zero_stage}"
        folder.mkdir()
        fault = {"do": "leave after loading", "rank": "all", "folder": str(folder)}
        outcome = stage.run(ranks, plain, f"engine.zero_stage={zero_stage}", fault=fault)
        assert outcome.codes == [3] * ranks, outcome.log[-4000:]
        loaded = {name: value for file in folder.iterdir() for name, value in load_tensor_file(file).items()}
        assert loaded.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == [], (ranks, zero_stage)


@pytest.mark.fault(1)
@pytest.mark.slow
def test_the_best_weights_belong_to_the_resume_point(stage: Stage) -> None:
    """Killed after an evaluation that the point does not know yet, the run publishes what one never killed does."""
    overrides = ("average_decay=null", "keep=best", "evaluation.every=4")
    overrides = tuple(f"stages.finetune.{line}" for line in overrides)
    clean = stage.finish(2, *overrides)
    last = load_tensors(stage.run_dir / "resume" / "step-00000020")
    best = {name.removeprefix("evaluate/"): value for name, value in last.items() if name.startswith("evaluate/")}
    (name,) = (name for name in best if name.endswith("patch_embed.proj.weight"))
    assert not torch.equal(best[name], last[f"weight/{name}"]), "the last evaluation is the best: this shows nothing"
    published = load_tensor_file(stage.run_dir / "artifact" / "model.safetensors")
    assert published and all(torch.equal(value, best[f"model.{key}"]) for key, value in published.items())
    stage.forget()
    for step in (6, 13, 17):
        assert stage.run(2, *overrides, fault=kill(step)).codes[1] == -9
    assert stage.finish(2, *overrides) == clean


@pytest.mark.fault(9)
@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(stage: Stage, undisturbed: dict[str, Left]) -> None:
    clean = expected(stage, undisturbed)
    assert stage.run(2, "runtime.workers=2", fault=kill(8)).codes[1] == -9
    assert stage.finish(2, "runtime.workers=0") == clean


@pytest.mark.fault(9)
@pytest.mark.slow
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(stage: Stage) -> None:
    outcome = stage.run(3)
    assert 2 in outcome.codes  # the launcher ends those that are not as far
    assert "global_batch_size 16 does not divide over 3 processes" in outcome.log


@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.parametrize("damage", [pytest.param("truncated", marks=pytest.mark.slow), "flipped"])
@pytest.mark.parametrize(
    "pattern",
    [
        "weights-00001*",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("buffers-00000*", "state.json", "manifest.json")),
    ],
)
def test_a_damaged_resume_point_is_seen_and_the_one_before_is_taken(
    pattern: str, damage: str, stage: Stage, undisturbed: dict[str, Left]
) -> None:
    clean = expected(stage, undisturbed)
    stage.run(2, fault=kill(12))
    (file,) = (stage.run_dir / "resume" / "step-00000010").glob(pattern)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = stage.run(2)
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    assert "FALLING BACK to the resume point of step 5" in outcome.log
    assert left(stage.run_dir) == clean


@pytest.mark.fault(7)
@pytest.mark.slow
def test_without_its_resume_points_a_stage_never_starts_from_scratch(stage: Stage) -> None:
    stage.run(2, fault=kill(12))
    shutil.rmtree(stage.run_dir / "resume")
    outcome = stage.run(2)
    assert 1 in outcome.codes
    assert "step 10 was saved, but its folder is gone" in outcome.log
    assert "start over on purpose with --fresh" in outcome.log


@pytest.mark.fault(11)
@pytest.mark.parametrize("place", ["save-files", "save-rename"])
@pytest.mark.slow
def test_a_full_disk_during_a_save_leaves_the_point_before(
    place: str, stage: Stage, undisturbed: dict[str, Left]
) -> None:
    clean = expected(stage, undisturbed)
    outcome = stage.run(2, fault={"do": "disk full", "step": 10, "at": place, "rank": 0})
    assert outcome.codes[0] == 1
    assert "No space left on device" in outcome.log
    assert [path.name for path in (stage.run_dir / "resume").glob("step-*")] == ["step-00000005"]
    assert stage.finish() == clean


@pytest.mark.fault(14)
@pytest.mark.parametrize("zero_stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_nan_on_one_rank_is_skipped_by_all_and_named(precision: str, zero_stage: int, stage: Stage) -> None:
    overrides = (
        f"engine.precision={precision}",
        f"engine.zero_stage={zero_stage}",
        f"stages.finetune.inputs.init={only_run(stage.workspace, 'mae') / 'artifact'}",  # made in float32
        "stages.finetune.average_decay=null",
    )
    fault = {"do": "nan", "step": 7, "steps": 2, "rank": 1}
    outcome = stage.run(2, *overrides, fault=fault)
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    skipped = [line for line in outcome.log.splitlines() if "skipped: the loss is not finite" in line]
    assert [line.split("step ")[1].split()[0] for line in skipped] == ["8", "9"]
    assert "it is of the samples " in skipped[0]
    lines = left(stage.run_dir).lines
    assert [line["step"] for line in lines if line["loss"] is None] == [8, 9]
    assert all(line["loss"] is not None for line in lines[9:])
    assert read_artifact(stage.run_dir / "artifact")


@pytest.mark.fault(14)
@pytest.mark.parametrize("zero_stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_an_infinite_gradient_on_one_rank_is_skipped_by_all(zero_stage: int, stage: Stage) -> None:
    """The loss is finite everywhere: only the gradients tell."""
    overrides = (f"engine.zero_stage={zero_stage}", "stages.finetune.average_decay=null")
    outcome = stage.run(2, *overrides, fault={"do": "infinite gradient", "step": 7, "steps": 2, "rank": 1})
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    skipped = [line for line in outcome.log.splitlines() if "skipped" in line and "step " in line]
    assert [line.split("step ")[1].split()[0] for line in skipped] == ["8", "9"], skipped
    lines = left(stage.run_dir).lines
    assert all(math.isfinite(line["loss"]) for line in lines)
    weights = load_tensor_file(stage.run_dir / "artifact" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.fault(14)
@pytest.mark.slow
def test_a_skipped_step_changes_nothing_and_resumes_bitwise(stage: Stage) -> None:
    fault = {"do": "nan", "step": 7, "steps": 2, "rank": 1}
    stage.run(2, fault=fault)
    clean = left(stage.run_dir)
    before = json.loads((stage.run_dir / "resume" / "step-00000015" / "state.json").read_text())
    assert before["hooks"]["skipped"]["total"] == 2
    stage.forget()
    stage.run(2, fault={**fault, "steps": 1})
    assert left(stage.run_dir).digest != clean.digest, "the second of the two steps was taken now"


@pytest.mark.fault(14)
@pytest.mark.slow
def test_after_too_many_skipped_steps_the_stage_stops_and_the_last_good_point_stands(stage: Stage) -> None:
    fault = {"do": "nan", "step": 7, "steps": 20, "rank": 1}
    outcome = stage.run(2, "stages.finetune.skipping.max_in_a_row=2", fault=fault)
    assert 1 in outcome.codes
    assert "3 steps in a row were skipped, the last of them step 10" in outcome.log
    assert [path.name for path in (stage.run_dir / "resume").glob("step-*")] == ["step-00000005"]


@pytest.mark.fault(14)
@pytest.mark.slow
def test_a_spike_is_skipped_by_all(stage: Stage, tmp_path: Path) -> None:
    """No loss is below 1.0001 times the median for long: some of the steps after the 20th are left out."""
    overrides = ("stages.finetune.steps=40", "stages.finetune.skipping.spike_factor=1.0001")
    outcome = stage.run(2, *overrides)
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    spikes = [line for line in outcome.log.splitlines() if "1.0001 x the median" in line]
    assert spikes


@pytest.mark.fault(15)
def test_a_rank_that_hangs_ends_the_job_with_everybodys_stacks(stage: Stage) -> None:
    outcome = stage.run(2, "runtime.hang_minutes=0.25", fault={"do": "hang", "step": 7, "at": "step", "rank": 1})
    assert 1 in outcome.codes
    assert outcome.seconds < 60
    assert "no progress for" in outcome.log
    assert "rank 1 on" in outcome.log and "step 7" in outcome.log
    assert "all_reduce" in outcome.log or "backward" in outcome.log, "the stack of the rank that waited"


@pytest.mark.fault(8)
@pytest.mark.slow
def test_a_resume_point_of_another_model_is_refused(stage: Stage) -> None:
    stage.run(2, fault=kill(7))
    (mae,) = (stage.workspace / "tiny" / "mae").iterdir()
    shutil.rmtree(stage.run_dir / "resume")
    shutil.copytree(mae / "resume", stage.run_dir / "resume")
    outcome = stage.run(2)
    assert outcome.codes[0] == 1
    assert "the resume point holds other parameters than the model; differing: " in outcome.log


@pytest.mark.fault(13)
@pytest.mark.slow
def test_files_emptied_by_a_power_cut_are_seen(stage: Stage, undisturbed: dict[str, Left]) -> None:
    """What a rename without fsync leaves: the name is there, the content is not."""
    clean = expected(stage, undisturbed)
    stage.run(2, fault=kill(12))
    for file in (stage.run_dir / "resume" / "step-00000010").iterdir():
        file.write_bytes(b"")
    outcome = stage.run(2)
    assert outcome.codes == [0, 0]
    assert "FALLING BACK to the resume point of step 5" in outcome.log
    assert left(stage.run_dir) == clean


@pytest.mark.fault(27)
@pytest.mark.slow
def test_moved_to_another_folder_host_and_time_a_stage_goes_on(stage: Stage, undisturbed: dict[str, Left]) -> None:
    clean = expected(stage, undisturbed)
    stage.run(2, fault=kill(8))
    moved = dataclasses.replace(stage, workspace=stage.workspace.with_name("elsewhere"))
    stage.workspace.rename(moved.workspace)
    outcome = moved.run(2, fault={"do": "clock", "seconds": -86_400, "rank": "all"})
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    assert "resumes, resume point of step 5" in outcome.log
    assert left(moved.run_dir) == clean


@pytest.mark.fault(29)
@pytest.mark.slow
def test_a_killed_data_worker_is_named_and_the_stage_resumes(stage: Stage, undisturbed: dict[str, Left]) -> None:
    clean = expected(stage, undisturbed)
    fault = {"do": "kill worker", "step": 7, "at": "step", "rank": 1}
    outcome = stage.run(2, "runtime.workers=1", "stages.finetune.steps=20", fault=fault)
    assert outcome.codes[1] == 1
    assert "rank 1: a data loading process died" in outcome.log
    assert stage.finish() == clean


@pytest.mark.fault(30)
def test_a_port_that_is_taken_is_said_and_another_works(stage: Stage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = stage.run(1, port=port)
    assert outcome.codes == [2]
    assert f"the ranks can't meet at 127.0.0.1:{port}: the port is taken" in outcome.log
    stage.finish(1)
