"""A real cluster for each test, where Slurm is installed."""

from collections.abc import Callable, Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not

Start = Callable[[int], Cluster]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a cluster of so many nodes, and ends it. Commands of this process and its children use it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    started: list[Cluster] = []

    def start(nodes: int) -> Cluster:
        started.append(Cluster(nodes))
        started[-1].start()
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, started[-1].environment[name])
        return started[-1]

    yield start
    for one in started:
        one.stop()
