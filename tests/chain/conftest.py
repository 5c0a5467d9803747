"""One finished tiny chain, shared by the tests that look at it or go on from it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chain.running import TINY, only_run, succeeded, vitruvian
from tests.s3 import S3Server

Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a tiny chain that ran to its end, by the command a user types. Read only."""
    workspace = tmp_path_factory.mktemp("finished")
    done = succeeded(vitruvian("run", str(TINY), f"workspace={workspace}"))
    (workspace / "stdout.txt").write_text(done.stdout)
    return workspace


@pytest.fixture
def without(finished: Path, tmp_path: Path) -> Copy:
    """Copies the finished workspace without the runs of some stages, so that they can be run again."""

    def copy(*stages: str) -> Path:
        workspace = tmp_path / "workspace"
        shutil.copytree(finished, workspace, symlinks=True)
        for stage in stages:
            shutil.rmtree(only_run(workspace, stage))
        return workspace

    return copy


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An empty S3 with a bucket, for this process and those that it starts."""
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    try:
        server.start()
        yield server
    finally:
        server.stop()
