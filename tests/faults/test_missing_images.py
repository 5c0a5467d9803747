"""A validation image that is gone: counted, named and bounded alike where it is kept out of training and where it is
evaluated on."""

import shutil
from pathlib import Path

import pytest

from pipeline.data.annotations import read
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource
from pipeline.data.sharding import ShardsReport, make_shards
from pipeline.errors import DataError
from pipeline.evaluation.inference import predict, requests_from_ground_truth
from pipeline.evaluation.score import score
from pipeline.models.loading import load_pose
from tests.faults.fixtures import publish_pose, raw_coco

pytestmark = pytest.mark.fault(19)
VAL = DatasetSource(
    name="coco", split="val", annotations="coco/annotations/person_keypoints_train2017.json", images="coco/val2017"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four training images that are the validation images, too; one of the latter is gone and one is damaged."""
    root = raw_coco(tmp_path / "raw")
    shutil.copytree(root / "coco" / "train2017", root / "coco" / "val2017")
    (root / "coco" / "val2017" / "1.jpg").unlink()
    (root / "coco" / "val2017" / "2.jpg").write_bytes(b"")
    return root


def shards(root: Path, work: Path, limit: float) -> ShardsReport:
    settings = {"seed": 1, "samples_per_shard": 4, "measured_people": 0, "output": None, "workers": 1}
    crop, augmentation = CropConfig(input_size=(64, 48)), PoseAugmentation()
    sources = [DatasetSource(name="coco")]
    return make_shards(
        work, str(root), sources, [VAL], crop, max_bad_fraction=limit, augmentation=augmentation, **settings
    )


def test_shards_count_evaluation_images_that_they_can_not_compare(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its copy among the training images is not found: counted up to the limit, an error above it."""
    with pytest.raises(DataError, match="1 of 4 images of `exclude` can't be read, more than max_bad_fraction 0.2"):
        shards(root, tmp_path / "a", 0.2)
    assert "val2017/1.jpg" in caplog.text
    report = shards(root, tmp_path / "b", 0.25)
    assert report.metrics()["unread_evaluation_images"] == 1
    assert (report.excluded, report.samples["coco"]) == (2, 2)


def test_people_in_images_that_evaluation_can_not_read_count_as_not_found(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Silence gains nothing: they stay in the denominator. Above the limit nothing is evaluated."""
    model, spec = load_pose(publish_pose(tmp_path / "model"))
    annotations = read(VAL, root)
    requests = requests_from_ground_truth(annotations, (64, 48))
    with pytest.raises(
        DataError, match=r"2 of 4 people's images can't be read, more than max_bad_fraction 0\.4; .*1\.jpg"
    ):
        predict(model, annotations.definition, requests, spec.codec, flip=False, max_bad_fraction=0.4)
    found = predict(model, annotations.definition, requests, spec.codec, flip=False, max_bad_fraction=0.5)
    assert [prediction.instance_id for prediction in found] == [1, 4]
    assert "1.jpg" in caplog.text and "2.jpg" in caplog.text
    by_id = {one.id: one for one in annotations.instances}
    for prediction in found:  # as if the model were perfect
        prediction.keypoints[:] = by_id[prediction.instance_id].keypoints
        prediction.keypoints[:, 2] = 1
    assert score(annotations, found).metrics["AR"] == pytest.approx(50)
