"""From raw datasets to shards: what goes in, what is left out, and that the same input makes the same bytes."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.artifacts import publish, read_artifact
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.collection import open_shards
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource
from pipeline.data.sharding import ShardsReport, make_shards, write_description
from pipeline.errors import ArtifactError, DataError

TRAIN = DatasetSource(name="coco", split="train")
VAL = DatasetSource(name="coco", split="val")


def _image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 100, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO with 6 training images of two people each; training image 3 is also validation image 1."""
    folder = tmp_path / "data" / "coco"
    for split, images in (("train", range(6)), ("val", range(2))):
        (folder / f"{split}2017").mkdir(parents=True)
        records: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
        for image in images:
            seed = 3 if (split, image) == ("val", 1) else image + 100 * (split == "val")
            (folder / f"{split}2017" / f"{image}.jpg").write_bytes(_image(seed))
            records["images"].append({"id": image, "file_name": f"{image}.jpg", "width": 100, "height": 80})
            for person in range(2):
                keypoints = [20.0 + person, 30.0, 2] * 17
                records["annotations"].append(
                    {
                        "id": image * 2 + person + 1,
                        "image_id": image,
                        "category_id": 1,
                        "iscrowd": 0,
                        "area": 900.0,
                        "num_keypoints": 17,
                        "bbox": [10.0 + person, 10.0, 40.0, 60.0],
                        "keypoints": keypoints,
                    }
                )
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"person_keypoints_{split}2017.json").write_text(json.dumps(records))
    return tmp_path / "data"


def _make(work: Path, root: Path, **changes: Any) -> ShardsReport:
    settings: dict[str, Any] = {
        "seed": 1,
        "samples_per_shard": 5,
        "max_bad_fraction": 0.5,
        "measured_people": 4,
        "augmentation": PoseAugmentation(),
        "output": None,
        "workers": 1,
    }
    crop = changes.pop("crop", CropConfig(input_size=(64, 48)))
    exclude = changes.pop("exclude", [])
    return make_shards(work, str(root), [TRAIN], exclude, crop, **{**settings, **changes})


def _bytes(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((work / "shards").iterdir())}


def test_parts_make_every_shard_once_and_the_whole_sums_them_up(root: Path, tmp_path: Path) -> None:
    whole = _make(tmp_path / "whole", root)
    assert len(whole.shards) == 3
    for part, expected in ((1, {1}), (0, {0, 2})):
        before = set((tmp_path / "parts").glob("report-*.json"))
        assert _make(tmp_path / "parts", root, part=(part, 2)).shards == []
        made = set((tmp_path / "parts").glob("report-*.json")) - before
        assert made == {tmp_path / "parts" / f"report-{number:06d}.json" for number in expected}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "shards").iterdir()}
    summed = _make(tmp_path / "parts", root)
    assert (summed.shards, summed.samples) == (whole.shards, whole.samples)
    assert _bytes(tmp_path / "parts") == _bytes(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "shards").iterdir()} == written
    assert _make(tmp_path / "few", root, part=(5, 7)).shards == []
    assert not list((tmp_path / "few").glob("report-*"))


def test_the_same_bytes_whatever_the_number_of_processes_and_after_a_resume(root: Path, tmp_path: Path) -> None:
    _make(tmp_path / "one", root)
    _make(tmp_path / "two", root, workers=2)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    before = _bytes(tmp_path / "two")
    (tmp_path / "two" / "report-000001.json").unlink()
    (tmp_path / "two" / "shards" / "shard-000001.tar").write_bytes(b"half")
    _make(tmp_path / "two", root)
    assert _bytes(tmp_path / "two") == before


def test_people_of_evaluation_images_are_left_out_by_digest_and_counted(root: Path, tmp_path: Path) -> None:
    report = _make(tmp_path / "work", root, exclude=[VAL])
    assert (report.excluded, report.samples["coco"]) == (2, 10)


def test_a_broken_image_is_named_and_counted(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "coco" / "train2017" / "4.jpg").write_bytes(_image(4)[:200])
    (root / "coco" / "train2017" / "5.jpg").unlink()
    report = _make(tmp_path / "work", root)
    assert (report.unreadable, report.samples["coco"]) == (4, 8)
    assert "4.jpg" in caplog.text and "5.jpg" in caplog.text


def test_too_many_broken_images_stop_the_stage(root: Path, tmp_path: Path) -> None:
    (root / "coco" / "train2017" / "4.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 12 people can't be read, more than max_bad_fraction 0.1"):
        _make(tmp_path / "work", root, max_bad_fraction=0.1)


def test_whole_image_mode_stores_each_image_once(root: Path, tmp_path: Path) -> None:
    report = _make(tmp_path / "work", root, crop=CropConfig(mode="image", input_size=(64, 48)))
    assert report.samples["coco"] == 6


def test_an_artifact_opens_and_refuses_a_larger_input(root: Path, tmp_path: Path) -> None:
    report = _make(tmp_path / "work", root)
    staged = tmp_path / "staged"
    staged.mkdir()
    write_description(tmp_path / "work", staged, report)
    fields = {"pipeline": "p", "stage": "s", "kind": "shards", "fingerprint": "f", "config": {}, "parents": {}}
    publish(staged, tmp_path / "artifact", **fields, metrics={}, licences=[])
    artifact = read_artifact(tmp_path / "artifact")
    collection = open_shards(artifact, needs=(64, 48))
    assert collection.counts() == {"coco": 12}
    assert {collection.shards.read(i).meta["id"] for i in range(12)} == set(range(1, 13))
    with pytest.raises(ArtifactError, match="stored for inputs up to 64x48, this stage needs 128x96"):
        open_shards(artifact, needs=(128, 96))


def _spoil(root: Path, count: int, first: int = 1000, **fields: Any) -> Path:
    """Adds annotations of one image."""
    file = root / "coco" / "annotations" / "person_keypoints_train2017.json"
    content = json.loads(file.read_text())
    person = content["annotations"][0]
    content["annotations"] += [{**person, "id": first + number, **fields} for number in range(count)]
    file.write_text(json.dumps(content))
    return file


@pytest.mark.fault(23)
def test_every_annotation_that_is_left_out_is_written_down(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _spoil(root, 30, num_keypoints=0)  # CrowdPose's people who do not count, and no fault
    _spoil(root, 30, first=2000, iscrowd=1)
    report = _make(tmp_path / "work", root, max_bad_fraction=0)
    file = tmp_path / "work" / "left_out.txt"
    lines = file.read_text().splitlines()
    assert len(lines) == report.problems == 30
    assert all(f"annotation {1000 + number} (image 0): num_keypoints 0" in line for number, line in enumerate(lines))
    assert f"30 annotations in all, each named in {file}" in caplog.text


@pytest.mark.fault(23)
def test_too_many_malformed_annotations_stop_the_stage(root: Path, tmp_path: Path) -> None:
    file = _spoil(root, 2, keypoints=[1, 2, 2])
    assert _make(tmp_path / "a", root, max_bad_fraction=2 / 14).problems == 2
    told = rf"^{file}: 2 of 14 annotations are malformed, more than max_bad_fraction 0.1; they are named in .*left_out.txt$"
    with pytest.raises(DataError, match=told):
        _make(tmp_path / "b", root, max_bad_fraction=0.1)
    assert len((tmp_path / "b" / "left_out.txt").read_text().splitlines()) == 2


def test_a_file_system_without_hard_links_gets_copies(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _make(tmp_path / "work", root, samples_per_shard=100)
    staged = tmp_path / "staged"
    staged.mkdir()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_description(tmp_path / "work", staged, report)
    assert _bytes(staged).items() <= _bytes(tmp_path / "work").items() and _bytes(staged)
