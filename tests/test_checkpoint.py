"""Resume points: atomic, verified, never from scratch in silence."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.buffers import average_buffers, load_buffers_into
from pipeline.checkpoint import ResumePoints, load_buffers, load_state, load_tensors, verify
from pipeline.distributed import World
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import read_json, write_json
from pipeline.recipe import split_batch
from pipeline.status import Status, read_status

ALONE = World(0, 0, 1, torch.device("cpu"))


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight/a": torch.full((3, 2), float(step)), "exp_avg/a": torch.arange(6.0).view(2, 3).T}


def save(run_dir: Path, *steps: int) -> ResumePoints:
    points = ResumePoints(run_dir, ALONE)
    for step in steps:
        points.save(step, tensors(step), {"bn.mean": torch.tensor([0.5 + step])}, {"data": {"epoch": step}})
    return points


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "resume").iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_point_gives_back_what_was_saved(tmp_path: Path) -> None:
    point = save(tmp_path, 5).newest()
    assert point == tmp_path / "resume" / "step-00000005"
    loaded = load_tensors(point)
    assert loaded.keys() == tensors(5).keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors(5).items())
    assert load_state(point) == {"schema_version": 1, "step": 5, "data": {"epoch": 5}}
    [buffers] = load_buffers(point, rank=0, world_size=1)
    assert torch.equal(buffers["bn.mean"], torch.tensor([5.5]))
    assert set(read_json(point / "manifest.json")["files"]) == {
        "weights-00000.safetensors",
        "buffers-00000.safetensors",
        "state.json",
    }


def test_a_stage_that_never_saved_has_none(tmp_path: Path) -> None:
    assert ResumePoints(tmp_path, ALONE).newest() is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 9, 10)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "resume" / "step-00000003" / "stray").write_text("x")
    point = save(tmp_path, 3).newest()
    assert names(tmp_path) == ["step-00000003"] and not (point / "stray").exists()


@pytest.mark.parametrize("file", ["weights-00000.safetensors", "buffers-00000.safetensors", "state.json"])
def test_a_flipped_byte_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    points = save(tmp_path, 4, 8)
    flip(tmp_path / "resume" / "step-00000008" / file)
    with caplog.at_level(logging.ERROR):
        assert points.newest() == tmp_path / "resume" / "step-00000004"
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    message = record.getMessage()
    assert "FALLING BACK" in message and "step 4" in message
    assert f"step-00000008: {file} does not match its digest" in message


def test_an_undamaged_point_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 4, 8).newest()
    assert not caplog.records


def test_a_later_damaged_point_goes_when_the_run_has_saved_again(tmp_path: Path) -> None:
    points = save(tmp_path, 4, 8)
    flip(tmp_path / "resume" / "step-00000008" / "state.json")
    assert points.newest() == tmp_path / "resume" / "step-00000004"
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_where_all_are_damaged_the_stage_stops_and_names_each(tmp_path: Path) -> None:
    points = save(tmp_path, 4, 8)
    for name in names(tmp_path):
        flip(tmp_path / "resume" / name / "weights-00000.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no resume point can be read \(step-00000008: .*; step-00000004: .*--fresh"
    ):
        points.newest()


def test_a_saved_point_whose_folder_is_gone_is_no_start_from_scratch(tmp_path: Path) -> None:
    points = save(tmp_path, 4)
    Status(tmp_path, writes=True).saved(4)
    assert points.newest() is not None
    shutil.rmtree(tmp_path / "resume")
    with pytest.raises(CheckpointError, match="step 4 was saved, but its folder is gone"):
        points.newest()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda point: (point / "manifest.json").unlink(), "its manifest can't be read"),
        (lambda point: (point / "manifest.json").write_text("{"), "its manifest can't be read"),
        (lambda point: (point / "manifest.json").write_text("[]"), "its manifest can't be read"),
        (lambda point: write_json(point / "manifest.json", {"schema_version": 2, "files": {}}), "newer version"),
        (lambda point: (point / "state.json").unlink(), "state.json is missing"),
        (
            lambda point: os.truncate(point / "weights-00000.safetensors", 50),
            "weights-00000.safetensors does not match",
        ),
        (lambda point: os.truncate(point / "weights-00000.safetensors", 0), "weights-00000.safetensors does not match"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, damage: Any, said: str) -> None:
    point = save(tmp_path, 4).newest()
    assert verify(point) is None
    damage(point)
    assert said in (verify(point) or "")


def test_a_temporary_folder_of_a_killed_save_is_ignored_and_cleaned(tmp_path: Path) -> None:
    points = save(tmp_path, 4)
    shutil.copytree(tmp_path / "resume" / "step-00000004", tmp_path / "resume" / ".step-00000008")
    assert points.newest() == tmp_path / "resume" / "step-00000004"
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_kill_before_the_rename_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = save(tmp_path, 4)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "fsync_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 8)
    assert names(tmp_path) == [".step-00000008", "step-00000004"]
    assert points.newest() == tmp_path / "resume" / "step-00000004"


@pytest.mark.fault(24)
def test_weights_that_are_no_safetensors_are_an_error(tmp_path: Path) -> None:
    point = save(tmp_path, 4).newest()
    (point / "weights-00000.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_tensors(point)


TWO_RANKS = """
    import sys
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from pipeline.checkpoint import ResumePoints, load_buffers, load_tensors
    from pipeline.distributed import World
    from pipeline.errors import CheckpointError

    rank, run_dir = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
    points = ResumePoints(run_dir, World(rank, rank, 2, torch.device("cpu")))
    for step in (1, 2, 3):
        own = {f"weight/{rank}": torch.full((2,), 10.0 * step + rank)}
        points.save(step, own, {"mean": torch.tensor([float(rank)])}, {"rank": rank})
    point = points.newest()
    assert point == run_dir / "resume" / "step-00000003", point
    loaded = load_tensors(point)
    assert {name: value.tolist() for name, value in loaded.items()} == {"weight/0": [30, 30], "weight/1": [31, 31]}
    [mine] = load_buffers(point, rank, 2)
    assert mine["mean"].item() == rank
    assert [share["mean"].item() for share in load_buffers(point, 0, 1)] == [0, 1]
    assert len(load_buffers(point, 2, 3)) == 2
    dist.barrier()
    if rank == 0:
        for path in (run_dir / "resume").glob("*/weights-00001.safetensors"):
            path.write_bytes(b"damaged")
    dist.barrier()
    try:
        points.newest()
    except CheckpointError as error:
        print(f"rank {rank}: {error}")
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_save_shares_and_both_learn_that_nothing_can_be_read(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "run"), str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, (out, err)) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, err
        assert out.startswith(f"rank {rank}: ") and "weights-00001.safetensors does not match" in out
    files = set(read_json(tmp_path / "run" / "resume" / "step-00000003" / "manifest.json")["files"])
    assert files == {
        "weights-00000.safetensors",
        "weights-00001.safetensors",
        "buffers-00000.safetensors",
        "buffers-00001.safetensors",
        "state.json",
    }
    assert names(tmp_path / "run") == ["step-00000002", "step-00000003"]


def test_the_status_file_keeps_what_was_saved_and_forgets_how_the_last_run_ended(tmp_path: Path) -> None:
    status = Status(tmp_path, writes=True)
    status.running(3, 10)
    status.saved(3)
    status.ended("failed", 1, "no memory")
    assert read_status(tmp_path)["message"] == "no memory" and read_status(tmp_path)["exit_code"] == 1
    Status(tmp_path, writes=True).running(4, 10)
    found = read_status(tmp_path)
    assert (found["state"], found["step"], found["saved_step"], found["pid"]) == ("running", 4, 3, os.getpid())
    assert "exit_code" not in found and "message" not in found


def test_only_the_main_rank_writes_the_status_file(tmp_path: Path) -> None:
    Status(tmp_path, writes=False).ended("done", 0)
    assert read_status(tmp_path) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((64, None, 1), (64, 1)),
        ((64, None, 4), (16, 1)),
        ((64, 4, 4), (4, 4)),
        ((8, 99, 2), (4, 1)),
        ((6, 1, 3), (1, 2)),
    ],
)
def test_the_global_batch_is_micro_times_accumulation_times_world(
    asked: tuple[int, int | None, int], given: tuple[int, int]
) -> None:
    assert split_batch(*asked) == given
    assert given[0] * given[1] * asked[2] == asked[0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((10, None, 4), "10 does not divide over 4 processes: use 2 or 5 of them, or another global_batch_size"),
        ((2, None, 4), "2 does not divide over 4 processes: use 2 of them, or another"),
        ((30, 4, 7), "30 does not divide over 7 processes: use 10 of them, or another"),
        ((30, 4, 16), "30 does not divide over 16 processes: use 15 or 30 of them, or another"),
        ((12, 5, 1), "5 does not divide the 12"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(asked: tuple[int, int | None, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_batch(*asked)


def share(seen_a: float, mean_a: float, seen_b: float, mean_b: float, counter: int) -> dict[str, Tensor]:
    return {
        "decoders.a.samples_seen": torch.tensor(seen_a),
        "decoders.a.bn.running_mean": torch.tensor([mean_a, 2 * mean_a]),
        "decoders.a.bn.num_batches_tracked": torch.tensor(counter),
        "decoders.b.samples_seen": torch.tensor(seen_b),
        "decoders.b.bn.running_mean": torch.tensor([mean_b]),
        "positions": torch.tensor([7.0]),
    }


def test_running_statistics_are_averaged_by_the_samples_that_each_rank_saw() -> None:
    averaged = average_buffers([share(30, 1.0, 0, 5.0, 4), share(10, 3.0, 0, 9.0, 6)])
    assert averaged["decoders.a.bn.running_mean"].tolist() == pytest.approx([1.5, 3.0])
    assert averaged["decoders.b.bn.running_mean"].tolist() == [5.0]
    assert averaged["decoders.a.bn.num_batches_tracked"].item() == 6
    assert averaged["positions"].tolist() == [7.0]
    assert averaged["decoders.a.bn.running_mean"].dtype == torch.float32


def test_one_share_averages_to_itself() -> None:
    only = share(3, 0.1, 2, 0.7, 1)
    averaged = average_buffers([only])
    assert all(torch.equal(averaged[name], value) for name, value in only.items())


def test_buffers_are_copied_in_place_and_must_be_the_same_ones() -> None:
    module = nn.BatchNorm1d(2)
    before = module.running_mean
    given = {
        "running_mean": torch.tensor([1.0, 2]),
        "running_var": torch.ones(2),
        "num_batches_tracked": torch.tensor(3),
    }
    load_buffers_into(module, given)
    assert module.running_mean is before and before.tolist() == [1, 2] and module.num_batches_tracked.item() == 3
    with pytest.raises(CheckpointError, match="buffers differ: running_var"):
        load_buffers_into(module, {name: value for name, value in given.items() if name != "running_var"})
    with pytest.raises(CheckpointError, match="buffers differ: more"):
        load_buffers_into(module, {**given, "more": torch.ones(1)})
