"""Fixtures that every test folder may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_server import Server


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real dataset samples, found by the environment variable VITRUVIAN_SAMPLES."""
    folder = os.environ.get("VITRUVIAN_SAMPLES")
    if not folder:
        pytest.skip("VITRUVIAN_SAMPLES is not set: no real samples")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server. Starting one takes long, so all tests share it under experiments of their own."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()
