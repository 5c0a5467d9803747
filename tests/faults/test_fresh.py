"""`--fresh` with several ranks: a run that somebody works on stays where it is, and nobody writes into one that moves."""

import os
from pathlib import Path

import pytest

from pipeline.status import held
from tests.faults.running import Stage, left


@pytest.fixture
def done(stage: Stage) -> Stage:
    """`mae`, which ran to its end on one rank."""
    return Stage("mae", stage.workspace, stage.ranks, ("runtime.workers=0",))


def content(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the lock."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(run_dir)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.fault(10)
def test_a_run_that_another_process_holds_is_not_set_aside(done: Stage) -> None:
    before = content(done.run_dir)
    with held(done.run_dir):
        outcome = done.run(2, "--fresh")
        assert outcome.codes == [2, 2], outcome.log[-4000:]
        assert f"{done.run_dir}: is being run by process {os.getpid()} on " in outcome.log
    assert content(done.run_dir) == before
    assert not list(done.run_dir.parent.glob("*.old-*"))


@pytest.mark.fault(10)
def test_no_rank_touches_the_old_run_before_it_was_moved(done: Stage) -> None:
    before, expected = content(done.run_dir), left(done.run_dir)
    outcome = done.run(2, "--fresh", fault={"do": "late", "seconds": 2})
    assert outcome.codes == [0, 0], outcome.log[-4000:]
    [old] = done.run_dir.parent.glob("*.old-1")
    assert content(old) == before and left(old) == expected
    for name in ("log-0.txt", "log-1.txt", "heartbeats/rank-00000.json", "heartbeats/rank-00001.json"):
        assert (done.run_dir / name).is_file(), name
    assert len(left(done.run_dir).lines) == len(expected.lines)
