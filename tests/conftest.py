"""Fixtures that every test folder may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real dataset samples, found by the environment variable VITRUVIAN_SAMPLES."""
    folder = os.environ.get("VITRUVIAN_SAMPLES")
    if not folder:
        pytest.skip("VITRUVIAN_SAMPLES is not set: no real samples")
    return Path(folder).resolve()
