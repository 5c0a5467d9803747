"""A workspace whose training stage can be run again quickly."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.ranks import Ranks
from tests.faults.running import Stage


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One process that forks all launches."""
    with Ranks(tmp_path_factory.mktemp("launches")) as found:
        yield found


@pytest.fixture
def stage(finished: Path, ranks: Ranks, tmp_path: Path) -> Stage:
    """`finetune`, the stage with evaluation, averaged weights and batch norm, not run yet; accumulating over 2 batches."""
    workspace = tmp_path / "workspace"
    shutil.copytree(finished, workspace, symlinks=True)
    found = Stage("finetune", workspace, ranks, ("runtime.micro_batch_size=4", "runtime.workers=0"))
    found.forget()
    return found
