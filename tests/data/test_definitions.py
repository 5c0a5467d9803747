"""Dataset definitions, and where their files are found."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from pipeline.data.definitions import DatasetSource, load_definition, resolve, shipped_definitions
from pipeline.errors import ConfigError, DataError
from pipeline.strict import Strict

SHIPPED = ["aic", "ap10k", "apt36k", "coco", "crowdpose", "mpii", "ochuman", "people", "wholebody"]


def small(**changes: object) -> dict[str, object]:
    """A definition of three keypoints."""
    definition = {
        "name": "small",
        "licence": {"annotations": "CC0", "images": "CC0"},
        "format": "coco",
        "metric": "coco",
        "half_body_min_keypoints": None,
        "keypoints": ["nose", "left_hand", "right_hand"],
        "flip_pairs": [["left_hand", "right_hand"]],
        "sigmas": [0.1, 0.2, 0.2],
        "upper_body": ["nose"],
        "skeleton": [["nose", "left_hand"]],
        "splits": {"train": {"annotations": ["small/train.json"], "images": ["small/images", "small"]}},
    }
    return definition | changes


def written(folder: Path, **changes: object) -> str:
    """Path of a YAML with `small`, changed."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(small(**changes)))
    return str(path)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_every_shipped_definition_is_valid_and_named_as_its_file() -> None:
    assert shipped_definitions() == SHIPPED
    assert [load_definition(name).name for name in SHIPPED] == SHIPPED


@pytest.mark.parametrize(
    ("name", "count", "pairs", "upper", "half_body", "metric"),
    [
        ("coco", 17, "1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16", range(11), 8, "coco"),
        ("ochuman", 17, "1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16", range(11), 8, "coco"),
        ("aic", 14, "0-3 1-4 2-5 6-9 7-10 8-11", [0, 1, 2, 3, 4, 5, 12, 13], 8, "aic"),
        ("mpii", 16, "0-5 1-4 2-3 10-15 11-14 12-13", range(7, 16), None, "pckh"),
        ("crowdpose", 14, "0-1 2-3 4-5 6-7 8-9 10-11", [0, 1, 2, 3, 4, 5, 12, 13], 6, "crowdpose"),
        ("people", 0, "", [], None, "none"),
        ("ap10k", 17, "0-1 5-8 6-9 7-10 11-14 12-15 13-16", [0, 1, 2, 3, 5, 6, 7, 8, 9], 8, "coco"),
        ("apt36k", 17, "0-1 5-8 6-9 7-10 11-14 12-15 13-16", [0, 1, 2, 3, 5, 6, 7, 8, 9], 8, "coco"),
    ],
)
def test_shipped_definitions_have_the_published_pairs_and_upper_bodies(
    name: str, count: int, pairs: str, upper: list[int], half_body: int | None, metric: str
) -> None:
    definition = load_definition(name)
    expected = list(range(count))
    for pair in pairs.split():
        left, right = (int(number) for number in pair.split("-"))
        expected[left], expected[right] = right, left
    assert definition.num_keypoints == count
    assert definition.flip_index.tolist() == expected
    assert definition.upper_body_index.tolist() == list(upper)
    assert (definition.half_body_min_keypoints, definition.metric) == (half_body, metric)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_flip_pair_joins_a_left_and_a_right_keypoint_of_the_same_name(name: str) -> None:
    definition = load_definition(name)
    names = np.array(definition.keypoints)
    swapped = names[definition.flip_index].tolist() if len(names) else []
    mirrored = {"left": "right", "right": "left"}
    for before, after in zip(definition.keypoints, swapped, strict=True):
        side, _, part = before.partition("_")
        if side == "face":  # numbered, not named: iBUG's 68 points
            assert after.startswith("face_")
            continue
        assert after == (f"{mirrored[side]}_{part}" if side in mirrored else before)


def test_sigmas_are_the_published_ones() -> None:
    from pycocotools.cocoeval import Params

    np.testing.assert_allclose(load_definition("coco").sigmas, Params("keypoints").kpt_oks_sigmas)
    assert load_definition("aic").sigmas[6] == 0.03909642
    assert load_definition("mpii").sigmas[12:14] == (0.179, 0.179)
    assert load_definition("crowdpose").sigmas[-2:] == (0.079, 0.079)
    assert sum(load_definition("crowdpose").sigmas) == pytest.approx(
        2 * (0.079 * 2 + 0.072 + 0.062 + 0.107 + 0.087 + 0.089)
    )


def test_a_whole_body_has_its_parts_in_order_and_the_faces_published_pairs() -> None:
    definition = load_definition("wholebody")
    assert definition.fields == (
        ("keypoints", 17),
        ("foot_kpts", 6),
        ("face_kpts", 68),
        ("lefthand_kpts", 21),
        ("righthand_kpts", 21),
    )
    body = load_definition("coco")
    assert definition.keypoints[:17] == body.keypoints and definition.sigmas[:17] == body.sigmas
    assert definition.upper_body == body.upper_body
    face = (definition.flip_index[23:91] - 23).tolist()
    assert [face[point] for point in (0, 8, 17, 21, 27, 31, 36, 39, 41, 48, 51, 57, 60, 66)] == [
        16, 8, 26, 22, 27, 35, 45, 42, 46, 54, 51, 57, 64, 66,
    ]  # fmt: skip
    assert definition.flip_index[91:112].tolist() == list(range(112, 133))
    assert sum(definition.sigmas[17:23]) == pytest.approx(0.48) and sum(definition.sigmas) == pytest.approx(3.861)


def test_sample_annotations_name_the_keypoints_in_the_definition_order(samples: Path) -> None:
    for name, file in [
        ("coco", "coco/annotations/person_keypoints_val2017.json"),
        ("ochuman", "ochuman/test_ochuman.json"),
        ("aic", "aic/test_aic.json"),
        ("crowdpose", "crowdpose/test_crowdpose.json"),
    ]:
        stated = json.loads((samples / file).read_text())["categories"][0]["keypoints"]
        stated = [keypoint.lower().replace(" ", "_").replace("head_top", "head") for keypoint in stated]
        ours = load_definition(name).keypoints
        assert [keypoint.replace("head_top", "head").replace("top_head", "head") for keypoint in ours] == stated


def test_skeletons_are_index_pairs_and_connect_every_keypoint() -> None:
    for name in set(SHIPPED) - {"people"}:
        definition = load_definition(name)
        limbs = definition.skeleton_index
        assert set(limbs.ravel().tolist()) == set(range(definition.num_keypoints)), name
        if name == "wholebody":
            continue  # the contours of a face hang together with nothing
        reached = {0}
        for _ in limbs:
            reached |= {int(end) for limb in limbs if reached & set(limb.tolist()) for end in limb}
        assert reached == set(range(definition.num_keypoints)), name
    assert load_definition("people").skeleton_index.shape == (0, 2)


def test_a_definition_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    definition = load_definition(written(tmp_path))
    assert definition.flip_index.tolist() == [0, 2, 1]
    assert definition.skeleton_index.tolist() == [[0, 1]]


def test_an_unknown_name_is_a_config_error_with_the_closest_name() -> None:
    with pytest.raises(ConfigError, match="'croudpose'.*did you mean 'crowdpose'"):
        load_definition("croudpose")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_definition("some/nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_pairs": [["left_hand", "right_hant"]]}, "flip_pairs: unknown keypoint 'right_hant'.*'right_hand'"),
        (
            {"flip_pairs": [["left_hand", "right_hand"], ["nose", "left_hand"]]},
            "flip_pairs: 'left_hand'.*more than once",
        ),
        ({"flip_pairs": [["nose", "nose"]]}, "flip_pairs: 'nose'.*more than once"),
        ({"flip_pairs": [["nose"]]}, r"flip_pairs\.0"),
        ({"sigmas": [0.1, 0.2]}, "sigmas: expected one for each of 3 keypoints, found 2"),
        ({"sigmas": [0.1, 0.2, 0]}, "sigmas: expected positive numbers"),
        ({"upper_body": ["toe"]}, "upper_body: unknown keypoint 'toe'"),
        ({"skeleton": [["nose", "tail"]]}, "skeleton: unknown keypoint 'tail'"),
        ({"keypoints": ["nose", "nose", "right_hand"]}, "keypoints: 'nose'.*more than once"),
        ({"format": "boxes"}, "'boxes' with 3 keypoints"),
        ({"metric": "pckh"}, "pckh needs format 'mpii'"),
        ({"format": "mpii"}, "'mpii' has no ground truth for 'coco'"),
        ({"parts": [{"name": "a", "field": "k", "count": 2}]}, "parts: they have 2 keypoints together, .* names 3"),
        ({"parts": [{"name": "a", "field": "k", "count": 1}] * 3}, "parts: 'a' is there more than once"),
        ({"parts": [{"name": "a", "field": "k", "count": 3}], "metric": "aic"}, "parts: expected .* 'coco'.* 'aic'"),
        ({"average_over_categories": True, "metric": "crowdpose"}, "average_over_categories: expected .* 'coco'"),
        ({"sigma": [1]}, "sigma: unknown key; did you mean 'sigmas'"),
        ({"splits": {"train": {"annotation": [], "images": []}}}, "did you mean 'annotations'"),
        ({"name": "Not A Name"}, "name: "),
    ],
)
def test_a_wrong_definition_is_a_config_error_that_says_where(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_definition(written(tmp_path, **changes))
    assert "small.yaml" in str(error.value)


def test_a_source_may_be_a_bare_name() -> None:
    class Section(Strict):
        data: DatasetSource

    assert Section(data="coco").data == DatasetSource(name="coco", split="train")
    assert Section.model_validate({"data": {"name": "coco", "split": "val"}}).data.split == "val"
    with pytest.raises(ValidationError):
        Section(data={"name": "coco", "spilt": "val"})


def test_the_first_place_that_exists_is_taken(tmp_path: Path) -> None:
    touch(tmp_path / "mpii/annot/valid.json")
    touch(tmp_path / "mpii/annot/gt_valid.mat")
    touch(tmp_path / "mpii/images/1.jpg")
    found = resolve(DatasetSource(name="mpii", split="val"), tmp_path)
    assert found == (
        str(tmp_path / "mpii/annot/valid.json"),
        str(tmp_path / "mpii/images"),
        None,
        str(tmp_path / "mpii/annot/gt_valid.mat"),
    )
    newer = touch(tmp_path / "mpii/annotations/mpii_val.json")
    assert resolve(DatasetSource(name="mpii", split="val"), tmp_path).annotations == str(newer)


def test_a_parent_folder_without_images_is_not_taken_for_the_image_folder(tmp_path: Path) -> None:
    touch(tmp_path / "aic/annotations/aic_val.json")
    with pytest.raises(DataError, match="images not found"):
        resolve(DatasetSource(name="aic", split="val"), tmp_path)
    touch(tmp_path / "aic/1.JPG")
    assert resolve(DatasetSource(name="aic", split="val"), tmp_path).images == str(tmp_path / "aic")


def test_a_missing_file_is_a_data_error_that_lists_the_places(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        resolve(DatasetSource(name="crowdpose", split="test"), tmp_path)
    for place in ["annotations/mmpose_crowdpose_test.json", "json/crowdpose_test.json", "test_crowdpose.json"]:
        assert str(tmp_path / "crowdpose" / place) in str(error.value)


def test_given_paths_replace_the_places_relative_absolute_or_by_url(tmp_path: Path) -> None:
    annotations, images = touch(tmp_path / "mine/a.json"), touch(tmp_path / "elsewhere/1.jpg").parent
    url = f"file://{touch(tmp_path / 'boxes.json')}"
    source = DatasetSource(name="coco", annotations="mine/a.json", images=str(images), detections=url)
    assert resolve(source, tmp_path) == (str(annotations), str(images), url, None)
    with pytest.raises(DataError, match=r"detections not found.*\n.*none\.json"):
        resolve(source.model_copy(update={"detections": "none.json"}), tmp_path)
    with pytest.raises(DataError, match="detections not found"):
        resolve(source.model_copy(update={"detections": url + "x"}), tmp_path)


def test_the_data_root_may_be_a_url(tmp_path: Path) -> None:
    touch(tmp_path / "coco/annotations/person_keypoints_train2017.json")
    (tmp_path / "coco/images/train2017").mkdir(parents=True)
    found = resolve(DatasetSource(name="coco"), f"file://{tmp_path}/")
    assert found.images == f"file://{tmp_path}/coco/images/train2017"


def test_an_unknown_split_is_a_config_error_unless_both_paths_are_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'vall'; did you mean 'val'"):
        resolve(DatasetSource(name="coco", split="vall"), tmp_path)
    file = touch(tmp_path / "a.json")
    source = DatasetSource(name="coco", split="mine", annotations="a.json", images=".")
    assert resolve(source, tmp_path).annotations == str(file)
