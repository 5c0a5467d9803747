"""What the tests of the chain start from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chain.running import only_run

Copy = Callable[..., Path]


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
