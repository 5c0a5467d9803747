"""Shards on a real S3 endpoint: a moto server on loopback."""

import pytest

from pipeline.artifacts import read_artifact
from pipeline.data.collection import open_shards
from tests.chain.conftest import Copy
from tests.chain.running import TINY, only_run, succeeded, vitruvian
from tests.s3 import S3Server


@pytest.mark.slow
def test_shards_are_written_to_s3_and_trained_on_from_there(without: Copy, s3: S3Server) -> None:
    workspace = without("shards", "mae")
    remote = ["stages.shards.output=s3://crops/tiny", "storage.cache_gb=0.1", f"storage.cache={workspace}/cache"]
    succeeded(vitruvian("run", str(TINY), "--until", "mae", f"workspace={workspace}", *remote, "stages.mae.steps=4"))
    artifact = read_artifact(only_run(workspace, "shards") / "artifact")
    assert not list(artifact.path.rglob("*.tar"))
    collection = open_shards(artifact)
    assert collection.is_remote
    assert collection.counts() == {"aic": 30, "coco": 60, "mpii": 16}
    assert collection.shards.read(5).jpg[:2] == b"\xff\xd8"
    assert read_artifact(only_run(workspace, "mae") / "artifact").manifest.kind == "mae"
    cached = [path for path in (workspace / "cache").glob("??/*") if path.is_file()]
    assert 4 * 16 <= len(cached) <= 106, "what the loader's workers read"
