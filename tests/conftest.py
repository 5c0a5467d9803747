"""Fixtures that every test folder may use."""

import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.chain.running import TINY, succeeded, vitruvian
from tests.mlflow_server import Server
from tests.s3 import S3Server

_OUTCOMES: dict[int, Counter[str]] = defaultdict(Counter)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Counts, for each fault of docs/faults.md, how its tests ended."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for mark in item.iter_markers("fault"):
            _OUTCOMES[mark.args[0]][report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The outcome of each fault, where its tests were what was asked for."""
    if terminalreporter.config.option.markexpr == "fault":
        terminalreporter.section("faults")
        for number, outcomes in sorted(_OUTCOMES.items()):
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            terminalreporter.write_line(f"fault {number:2d}: {told}")


@pytest.fixture(autouse=True)
def _denormal_numbers() -> Iterator[None]:
    """Training in the process of the tests leaves denormal numbers flushed to zero, which other tests need."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _handlers_of_closed_streams() -> Iterator[None]:
    """A command in the process of the tests leaves its log handler; what other tests log there would be an error."""
    yield
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
            root.removeHandler(handler)


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a tiny chain that ran to its end, by the command a user types. Read only."""
    workspace = tmp_path_factory.mktemp("finished")
    done = succeeded(vitruvian("run", str(TINY), f"workspace={workspace}"))
    (workspace / "stdout.txt").write_text(done.stdout)
    return workspace


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
