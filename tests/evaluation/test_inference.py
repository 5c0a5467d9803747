"""Images to keypoints, and the stage that evaluates."""

from pathlib import Path

import numpy as np
import yaml

from configs import __file__ as configs
from pipeline.artifacts import read_artifact
from pipeline.data.annotations import read
from pipeline.data.definitions import DatasetSource
from pipeline.evaluation.inference import predict, requests_from_ground_truth
from pipeline.files import read_json
from pipeline.models.loading import load_pose
from stages import module_of
from tests.faults.fixtures import context, publish_pose, raw_coco


def test_processes_that_load_images_change_nothing_and_count_what_they_can_not_read(tmp_path: Path) -> None:
    model, spec = load_pose(publish_pose(tmp_path / "model"))
    root = raw_coco(tmp_path / "raw", images=7)
    (root / "coco" / "train2017" / "3.jpg").write_bytes(b"no image")
    annotations = read(DatasetSource(name="coco"), root)
    requests = requests_from_ground_truth(annotations, (64, 48))
    here, there = (
        predict(
            model,
            annotations.definition,
            requests,
            spec.codec,
            flip=True,
            batch_size=2,
            workers=n,
            max_bad_fraction=0.2,
        )
        for n in (0, 2)
    )
    assert [one.instance_id for one in here] == [one.instance_id for one in there] == [1, 2, 3, 5, 6, 7]
    assert all(np.array_equal(one.keypoints, other.keypoints) for one, other in zip(here, there, strict=True))


def test_two_splits_of_a_users_own_dataset_keep_their_own_numbers(tmp_path: Path) -> None:
    """A definition named by its path: labels are of its name and the split, not of the file."""
    shipped = yaml.safe_load((Path(configs).parent / "datasets" / "coco.yaml").read_text())
    places = {"annotations": ["coco/annotations/person_keypoints_train2017.json"], "images": ["coco/train2017"]}
    own = tmp_path / "some.file.yaml"
    own.write_text(yaml.safe_dump(shipped | {"name": "climbing", "splits": {"val": places, "test": places}}))
    model = publish_pose(tmp_path / "model")
    stage = {
        "kind": "evaluate",
        "inputs": {"data": str(raw_coco(tmp_path / "raw")), "models": {"one": str(model.path)}},
        "datasets": [{"name": str(own), "split": split} for split in ("val", "test")],
        "bootstrap": 0,
        "pictures": 1,
    }
    running = context(tmp_path, stage)
    module_of("evaluate").run(running, running.plan.config)
    artifact = read_artifact(running.run_dir / "artifact")
    labels = {name.split("/")[1] for name in artifact.manifest.metrics}
    assert labels == {"climbing-val", "climbing-test"}
    assert [row[1] for row in read_json(artifact.path / "table.json")["rows"]] == ["climbing-val", "climbing-test"]
    assert {path.name for path in (artifact.path / "pictures").iterdir()} == {
        *("one-climbing-val.jpg", "one-climbing-test.jpg")
    }
