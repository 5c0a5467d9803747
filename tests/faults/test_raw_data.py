"""Raw data that a stage made is an artifact like any other: what was changed in it is not used."""

from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from stages import module_of
from tests.faults.fixtures import context, publish_at, raw_coco


@pytest.mark.fault(34)
def test_raw_data_of_an_artifact_that_was_changed_is_refused(tmp_path: Path) -> None:
    data = publish_at(tmp_path / "data", lambda staged: raw_coco(staged / "raw"))
    stage = {
        "kind": "shards",
        "inputs": {"data": str(data.path)},
        "datasets": ["coco"],
        "crop": {"input_size": [64, 48]},
    }
    ready = context(tmp_path, stage)
    file = data.path / "raw" / "coco" / "annotations" / "person_keypoints_train2017.json"
    file.write_text(file.read_text().replace("900.0", "901.0", 1))
    with pytest.raises(ArtifactError, match=f"^{file}: does not match the manifest's digest") as raised:
        module_of("shards").run(ready, ready.plan.config)
    assert len(str(raised.value).splitlines()) == 1
    file.write_text(file.read_text().replace("901.0", "900.0", 1))
    assert ready.data_root() == str(data.path / "raw")
