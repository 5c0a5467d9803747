"""The synthetic datasets: deterministic, counted, in the real formats, and true to the picture."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pydantic import ValidationError
from scipy.io import loadmat

from pipeline.data.synthetic import SyntheticConfig, generate, scene
from pipeline.data.synthetic.body import FACE_NORMALS, JOINTS, Pose, articulate, sample_pose, sample_proportions
from pipeline.data.synthetic.detections import iou
from pipeline.data.synthetic.figure import Camera
from pipeline.data.synthetic.scene import Habits, Person, render_scene
from pipeline.data.synthetic.writers import AIC_NAMES, COCO_NAMES, MPII_NAMES
from pipeline.errors import DataError

CONFIG = SyntheticConfig(coco_train=30, coco_val=60, aic_train=12, aic_val=7, mpii_train=9, mpii_val=11)
AIC = {
    "train": "aic/ai_challenger_keypoint_train_20170909/keypoint_train_annotations_20170909.json",
    "val": "aic/ai_challenger_keypoint_validation_20170911/keypoint_validation_annotations_20170911.json",
}
AIC_IMAGES = {"train": "keypoint_train_images_20170902", "val": "keypoint_validation_images_20170911"}
HABITS = Habits(drop_occluded=0.0, drop_turned=0.0, bystanders=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    seen: list[tuple[int, int]] = []
    counts = generate(folder, CONFIG, seed=3, workers=1, progress=lambda done, total: seen.append((done, total)))
    images = len(list(folder.rglob("*.jpg")))
    assert seen == [(i + 1, images) for i in range(images)]
    assert {k: v for k, v in counts.items() if k.endswith("people")} == {
        f"{name}_people": value for name, value in CONFIG.model_dump().items() if name.endswith(("train", "val"))
    }
    return folder


def read(path: Path) -> list | dict:
    return json.loads(path.read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lone_people(count: int) -> Iterator[Person]:
    config = SyntheticConfig(obstacles=0, truncation=0)
    for number in range(count):
        yield render_scene(np.random.default_rng(number), 1, config, HABITS).people[0]


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_workers(tmp_path: Path) -> None:
    small = SyntheticConfig(coco_train=4, coco_val=4, aic_train=3, aic_val=3, mpii_train=2, mpii_val=3)
    for name, seed, workers in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)):
        generate(tmp_path / name, small, seed=seed, workers=workers)
    first = digests(tmp_path / "one")
    assert first == digests(tmp_path / "two")
    assert not set(first.values()) & set(digests(tmp_path / "other").values())


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_files_load_and_agree_with_the_pictures(root: Path, split: str) -> None:
    coco = COCO(str(root / f"coco/annotations/person_keypoints_{split}2017.json"))
    assert coco.dataset["categories"][0]["keypoints"] == list(COCO_NAMES)
    assert len(coco.dataset["categories"][0]["skeleton"]) == 19
    labelled = [a for a in coco.dataset["annotations"] if a["num_keypoints"]]
    assert len(labelled) == getattr(CONFIG, f"coco_{split}")
    for image in coco.dataset["images"]:
        path = root / f"coco/{split}2017" / image["file_name"]
        assert path.stem == f"{image['id']:012d}"
        assert cv2.imread(str(path)).shape == (image["height"], image["width"], 3)
    for a in coco.dataset["annotations"]:
        image = coco.imgs[a["image_id"]]
        x, y, w, h = a["bbox"]
        assert x >= 0 and y >= 0 and w > 2 and h > 2 and x + w <= image["width"] and y + h <= image["height"]
        keypoints = np.array(a["keypoints"]).reshape(17, 3)
        assert set(np.unique(keypoints[:, 2])) <= {0, 1, 2}
        assert a["num_keypoints"] == (keypoints[:, 2] > 0).sum()
        assert not keypoints[keypoints[:, 2] == 0].any()
        inside = (keypoints[:, :2] >= 0).all(1) & (keypoints[:, :2] <= (image["width"], image["height"])).all(1)
        assert inside.all()
        mask = coco.annToMask(a)
        assert mask.sum() == pytest.approx(a["area"], rel=0.25, abs=12)
        rows, columns = np.nonzero(mask)
        found = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        assert np.abs(found - (x, y, x + w, y + h)).max() <= 4


def test_coco_has_crowds_and_people_without_keypoints() -> None:
    config = SyntheticConfig(image_size=(64, 64), person_height=(40, 50))
    habits = Habits(drop_occluded=0.2, drop_turned=0.75, bystanders=True)
    scenes = [render_scene(np.random.default_rng(number), 1, config, habits) for number in range(120)]
    assert 2 <= sum(one.crowd is not None for one in scenes) <= 14, "4 % expected"
    assert 4 <= sum(len(one.bystanders) > 0 for one in scenes) <= 20, "7 % expected"


def test_all_three_visibility_codes_occur(root: Path) -> None:
    coco = read(root / "coco/annotations/person_keypoints_val2017.json")
    codes = np.concatenate([a["keypoints"][2::3] for a in coco["annotations"] if a["num_keypoints"]])
    share = [(codes == code).mean() for code in (0, 1, 2)]
    assert 0.03 < share[0] < 0.3
    assert 0.05 < share[1] < 0.35
    assert share[2] > 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_aic_files_are_those_of_the_original_release(root: Path, split: str) -> None:
    entries = read(root / AIC[split])
    people = 0
    for entry in entries:
        image = cv2.imread(str((root / AIC[split]).parent / AIC_IMAGES[split] / f"{entry['image_id']}.jpg"))
        height, width = image.shape[:2]
        assert entry["human_annotations"].keys() == entry["keypoint_annotations"].keys()
        for name, points in entry["keypoint_annotations"].items():
            people += 1
            x1, y1, x2, y2 = entry["human_annotations"][name]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            keypoints = np.array(points).reshape(len(AIC_NAMES), 3)
            assert set(np.unique(keypoints[:, 2])) <= {1, 2, 3}
            known = keypoints[keypoints[:, 2] < 3, :2]
            assert (known >= 0).all() and (known <= (width, height)).all()
            middle = known.mean(0)
            assert x1 < middle[0] < x2 and y1 < middle[1] < y2
    assert people == getattr(CONFIG, f"aic_{split}")


def test_mpii_entries_are_one_based_and_their_window_holds_the_person(root: Path) -> None:
    for split in ("train", "val"):
        entries = read(root / f"mpii/annotations/mpii_{split}.json")
        assert len(entries) == getattr(CONFIG, f"mpii_{split}")
        for entry in entries:
            height, width = cv2.imread(str(root / "mpii/images" / entry["image"])).shape[:2]
            joints, known = np.array(entry["joints"]), np.array(entry["joints_vis"], bool)
            assert joints.shape == (16, 2) and known.any()
            assert (joints[~known] == -1).all()
            assert (joints[known] >= 1).all() and (joints[known] <= (width + 1, height + 1)).all()
            half = 1.25 * entry["scale"] * 200 / 2
            centre = np.array(entry["center"]) + (0, 15 * entry["scale"])
            assert (np.abs(joints[known] - centre) <= half).all()


def test_the_matlab_file_says_the_same_as_the_json(root: Path) -> None:
    mat = loadmat(str(root / "mpii/annotations/mpii_gt_val.mat"))
    entries = read(root / "mpii/annotations/mpii_val.json")
    joints = np.array([entry["joints"] for entry in entries])
    missing = 1 - np.array([entry["joints_vis"] for entry in entries])
    assert np.array_equal(mat["pos_gt_src"], joints.transpose(1, 2, 0))
    assert np.array_equal(mat["jnt_missing"], missing.T)
    order = {"rank": 0, "rkne": 1, "rhip": 2, "lhip": 3, "lkne": 4, "lank": 5, "pelvis": 6, "thorax": 7, "neck": 8}
    order |= {"head": 9, "rwri": 10, "relb": 11, "rsho": 12, "lsho": 13, "lelb": 14, "lwri": 15}
    assert {name: np.where(mat["dataset_joints"] == name)[1][0] for name in order} == order
    heads = mat["headboxes_src"]
    assert heads.shape == (2, 2, len(entries))
    sizes = np.linalg.norm(heads[1] - heads[0], axis=0) * 0.6
    assert ((sizes > 4) & (sizes < 40)).all()
    tops = [(k, MPII_NAMES.index("head_top")) for k in range(len(entries)) if not missing[k, 9]]
    for k, j in tops:
        assert (joints[k, j] >= heads[0, :, k] - 2).all() and (joints[k, j] <= heads[1, :, k] + 2).all()


def test_the_detector_jitters_repeats_misses_and_imagines_people(root: Path) -> None:
    coco = COCO(str(root / "coco/annotations/person_keypoints_val2017.json"))
    boxes = read(root / "coco/person_detection_results/COCO_val2017_detections_AP_H_56_person.json")
    assert all(box["category_id"] == 1 and 0 < box["score"] < 1 for box in boxes)
    by_image = {image: [box for box in boxes if box["image_id"] == image] for image in coco.imgs}
    hits, nobody = [], 0
    for image, found in by_image.items():
        truth = [tuple(a["bbox"]) for a in coco.imgToAnns[image]]
        best = [max(((iou(t, tuple(d["bbox"])), i) for i, t in enumerate(truth)), default=(0, -1)) for d in found]
        nobody += sum(overlap < 0.3 for overlap, _ in best)
        hits += [
            [d["score"] for d, (o, i) in zip(found, best, strict=True) if o > 0.5 and i == t] for t in range(len(truth))
        ]
    times = np.array([len(scores) for scores in hits])
    assert (times == 0).sum() >= 1
    assert (times >= 2).sum() >= 1
    assert (times >= 1).mean() > 0.75
    assert nobody >= 5
    assert np.mean([max(scores) for scores in hits if scores]) > 0.6
    exact = {tuple(a["bbox"]) for a in coco.dataset["annotations"]}
    assert sum(tuple(box["bbox"]) in exact for box in boxes) < 0.1 * len(boxes)


@pytest.mark.parametrize(("yaw", "side"), [(0.0, 1), (25.0, 1), (180.0, -1), (155.0, -1)])
def test_the_left_of_a_person_is_right_in_the_image_only_when_facing_us(yaw: float, side: int) -> None:
    rng = np.random.default_rng(0)
    angles = {name: 5.0 for name in sample_pose(rng, 0.5).angles}
    body = articulate(sample_proportions(rng), Pose("standing", yaw, angles))
    camera = Camera(100.0, (50.0, 60.0), 6.0)
    for joint in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        left, right = (camera.project(body.joints[f"{name}_{joint}"]) for name in ("left", "right"))
        assert (left[0] - right[0]) * side > 0
    assert camera.project(body.joints["head_top"])[1] < 60.0 < camera.project(body.joints["left_knee"])[1]


def test_positive_angles_bend_as_people_do() -> None:
    rng = np.random.default_rng(1)
    zero = {name: 0.0 for name in sample_pose(rng, 0.5).angles}
    proportions = sample_proportions(rng)

    def joint(name: str, **angles: float) -> np.ndarray:
        return articulate(proportions, Pose("standing", 0.0, {**zero, **angles})).joints[name]

    assert joint("left_wrist", left_elbow=90.0)[2] > 0.1 * proportions.size, "forearms fold forward"
    assert joint("left_ankle", left_knee=90.0)[2] < -0.1 * proportions.size, "shins fold backward"
    assert joint("left_elbow", left_arm_out=90.0)[0] > joint("left_elbow")[0], "arms spread outward"
    assert joint("right_elbow", right_arm_out=90.0)[0] < joint("right_elbow")[0]
    assert joint("right_knee", right_leg_flex=90.0)[2] > 0.1 * proportions.size, "thighs lift forward"
    assert joint("nose", bend=60.0)[2] > joint("nose")[2], "the trunk bends forward"


def test_faces_are_seen_from_the_front_and_not_from_behind() -> None:
    face = [JOINTS.index(name) for name in ("nose", "left_eye", "right_eye")]
    hips = [JOINTS.index("left_hip"), JOINTS.index("right_hip")]
    shoulders = [JOINTS.index("left_shoulder"), JOINTS.index("right_shoulder")]
    front, back = [], []
    for person in lone_people(60):
        if person.family not in ("standing", "gesturing"):
            continue
        turned = abs((person.yaw + 180) % 360 - 180)
        sides = [person.points[left, 0] - person.points[right, 0] for left, right in (hips, shoulders)]
        if turned < 30:
            front.append((person.visibility[face] == 2).mean())
            assert min(sides) > 0
        elif turned > 150:
            back.append((person.visibility[face] == 2).mean())
            assert max(sides) < 0
    assert len(front) >= 5 and len(back) >= 3
    assert np.mean(front) > 0.8
    assert np.mean(back) < 0.2


def test_labels_sit_on_the_silhouette() -> None:
    """Joints of the body lie under painted pixels; only the tip of a profile's nose may stand out."""
    body = [j for j, name in enumerate(JOINTS) if name not in FACE_NORMALS and name != "head_top"]
    for person in lone_people(25):
        canvas = np.round(person.points * 2 + 0.5).astype(int)
        for j in body:
            if person.visibility[j]:
                assert person.mask[canvas[j, 1], canvas[j, 0]], JOINTS[j]


@pytest.mark.parametrize(("yaw", "near", "far"), [(90.0, "right", "left"), (-90.0, "left", "right")])
def test_the_far_shoulder_in_a_side_view_is_occluded(
    monkeypatch: pytest.MonkeyPatch, yaw: float, near: str, far: str
) -> None:
    angles = dict.fromkeys(sample_pose(np.random.default_rng(0), 0.5).angles, 5.0)
    monkeypatch.setattr(scene, "sample_pose", lambda rng, variety: Pose("standing", yaw, angles))
    for person in lone_people(6):
        assert person.visibility[JOINTS.index(f"{near}_shoulder")] == 2
        assert person.visibility[JOINTS.index(f"{far}_shoulder")] == 1
        assert person.visibility[JOINTS.index(f"{near}_ear")] == 2
        assert person.visibility[JOINTS.index(f"{far}_ear")] == 1


def test_a_count_of_zero_leaves_the_split_out(tmp_path: Path) -> None:
    none = dict.fromkeys(("coco_train", "coco_val", "aic_train", "aic_val", "mpii_train"), 0)
    counts = generate(tmp_path, SyntheticConfig(**none, mpii_val=2), seed=0, workers=1)
    assert counts["mpii_val_people"] == 2 and counts["coco_train_images"] == 0
    assert not (tmp_path / "coco").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="image_size"):
        SyntheticConfig(image_size=(200, 100))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="choose another folder"):
        generate(blocked, SyntheticConfig(coco_train=1), seed=0, workers=1)
