"""Shards on a real S3 endpoint: a moto server on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import read_artifact
from pipeline.data.collection import open_shards
from tests.chain.conftest import Copy
from tests.chain.running import TINY, only_run, succeeded, vitruvian


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty S3 with a bucket `crops`, found by the variables that every S3 client reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir("crops")
        yield
    finally:
        server.terminate()
        server.wait(20)


def test_shards_are_written_to_s3_and_trained_on_from_there(without: Copy, s3: None) -> None:
    workspace = without("shards", "mae")
    remote = "stages.shards.output=s3://crops/tiny"
    succeeded(vitruvian("run", str(TINY), "--until", "mae", f"workspace={workspace}", remote, "stages.mae.steps=4"))
    artifact = read_artifact(only_run(workspace, "shards") / "artifact")
    assert not list(artifact.path.rglob("*.tar"))
    collection = open_shards(artifact)
    assert collection.is_remote
    assert collection.counts() == {"aic": 30, "coco": 60, "mpii": 16}
    assert collection.shards.read(5).jpg[:2] == b"\xff\xd8"
    assert read_artifact(only_run(workspace, "mae") / "artifact").manifest.kind == "mae"
