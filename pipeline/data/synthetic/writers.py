"""Synthetic people in the file formats of COCO, of AI Challenger's original release, and of MPII.

Each `*_record` describes one picture and is made next to it, in a worker; each `write_*` gathers a split's records into
the annotation files. Paths and names are those of the trees that users have on disk (mmpose's `data/`).
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.io import savemat

from pipeline.data.synthetic.body import JOINTS
from pipeline.data.synthetic.scene import SUPERSAMPLING, Person, Scene, mask_box

Record = dict[str, Any]

COCO_NAMES = JOINTS[:17]
COCO_SKELETON = (
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10)),
    *((9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
)
AIC_NAMES = (
    *("right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "right_hip"),
    *("right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "head_top", "neck"),
)
MPII_NAMES = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax"),
    *("upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow"),
    "left_wrist",
)
MPII_MAT_NAMES = (
    *("rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelvis", "thorax", "neck", "head", "rwri", "relb", "rsho"),
    *("lsho", "lelb", "lwri"),
)
"""How `mpii_gt_val.mat` calls the same joints."""

_AIC_FOLDERS = {
    "train": ("ai_challenger_keypoint_train_20170909", "keypoint_train_images_20170902", "train_annotations_20170909"),
    "val": (
        "ai_challenger_keypoint_validation_20170911",
        "keypoint_validation_images_20170911",
        "validation_annotations_20170911",
    ),
}
_COCO_FIRST_ID = {"train": 100_001, "val": 500_001}
_MPII_FIRST_ID = {"train": 10_000_001, "val": 60_000_001}
_MAT_HEADER = b"MATLAB 5.0 MAT-file, synthetic people".ljust(116)


def image_path(root: Path, dataset: str, split: str, seed: int, index: int) -> Path:
    """Where the picture with this number lies."""
    if dataset == "coco":
        return root / "coco" / f"{split}2017" / f"{_COCO_FIRST_ID[split] + index:012d}.jpg"
    if dataset == "mpii":
        return root / "mpii" / "images" / f"{_MPII_FIRST_ID[split] + index:09d}.jpg"
    stem = hashlib.sha1(f"{seed}/{split}/{index}".encode(), usedforsecurity=False).hexdigest()
    return root / "aic" / _AIC_FOLDERS[split][0] / _AIC_FOLDERS[split][1] / f"{stem}.jpg"


def coco_record(scene: Scene, path: Path, detections: Sequence[tuple[tuple[float, ...], float]]) -> Record:
    """One image entry, its annotations, and its detected boxes."""
    height, width = scene.image.shape[:2]
    image_id = int(path.stem)
    annotations = []
    for number, person in enumerate([*scene.people, *scene.bystanders]):
        keypoints = _labelled(person, COCO_NAMES) if number < len(scene.people) else np.zeros((17, 3))
        annotations.append(
            {
                "segmentation": mask_polygons(person.mask),
                "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                "area": float(person.mask.sum()) / SUPERSAMPLING**2,
                "iscrowd": 0,
                "keypoints": _plain(keypoints),
                "image_id": image_id,
                "bbox": list(person.box),
                "category_id": 1,
                "id": image_id * 10 + number,
            }
        )
    if scene.crowd is not None:
        annotations.append(_crowd_annotation(scene.crowd, image_id))
    image = {"license": 1, "file_name": path.name, "height": height, "width": width, "id": image_id}
    boxes = [
        {"bbox": [round(v, 3) for v in box], "category_id": 1, "image_id": image_id, "score": round(score, 6)}
        for box, score in detections
    ]
    return {"image": image, "annotations": annotations, "detections": boxes}


def aic_record(scene: Scene, path: Path) -> Record:
    """One entry of the original release: v is 1 visible, 2 occluded but labelled, 3 not labelled."""
    height, width = scene.image.shape[:2]
    boxes, points = {}, {}
    for number, person in enumerate(scene.people, 1):
        x, y, w, h = person.box
        corners = (max(int(x), 0), max(int(y), 0), min(int(np.ceil(x + w)), width), min(int(np.ceil(y + h)), height))
        boxes[f"human{number}"] = list(corners)
        keypoints = _labelled(person, AIC_NAMES)
        keypoints[:, 2] = 3 - keypoints[:, 2]
        points[f"human{number}"] = _plain(keypoints)
    return {"image_id": path.stem, "url": "", "human_annotations": boxes, "keypoint_annotations": points}


def mpii_record(rng: np.random.Generator, scene: Scene, path: Path) -> Record:
    """One entry a person with 1-based (MATLAB) points, and the head boxes that only PCKh needs.

    The scale is the person's length over 200 pixels and the centre lies a little above the middle, both as roughly
    as people estimate them; evaluation code moves the centre down by 15 scales and widens the window by a quarter.
    """
    entries, heads = [], []
    for person in scene.people:
        keypoints = _labelled(person, MPII_NAMES)
        known = keypoints[:, 2] > 0
        x, y, w, h = person.extent
        scale = max(w, h) / 200 * float(rng.uniform(0.93, 1.07))
        middle = np.array((x + w / 2, y + h / 2 - 15 * scale)) + rng.normal(0, 0.015 * max(w, h), 2) + 1
        joints = np.where(known[:, None], keypoints[:, :2] + 1, -1.0)
        entries.append(
            {
                "joints_vis": known.astype(int).tolist(),
                "joints": np.round(joints, 4).tolist(),
                "image": path.name,
                "scale": round(scale, 6),
                "center": np.round(middle).tolist(),
            }
        )
        heads.append([round(v + 1, 4) for v in person.head_box])
    return {"entries": entries, "heads": heads}


def write_coco(root: Path, split: str, records: Sequence[Record]) -> None:
    """`person_keypoints_<split>2017.json`, and for val the detector's boxes."""
    category = {"supercategory": "person", "id": 1, "name": "person", "keypoints": COCO_NAMES}
    content = {
        "info": {"description": "Synthetic people in the format of COCO 2017 keypoints", "version": "1.0"},
        "licenses": [{"id": 1, "name": "Generated, no rights reserved", "url": ""}],
        "images": [record["image"] for record in records],
        "annotations": [annotation for record in records for annotation in record["annotations"]],
        "categories": [category | {"skeleton": COCO_SKELETON}],
    }
    _write_json(root / "coco" / "annotations" / f"person_keypoints_{split}2017.json", content)
    if split == "val":
        boxes = [box for record in records for box in record["detections"]]
        folder = root / "coco" / "person_detection_results"
        _write_json(folder / "COCO_val2017_detections_AP_H_56_person.json", boxes)


def write_aic(root: Path, split: str, records: Sequence[Record]) -> None:
    """`keypoint_<split>_annotations_<date>.json` of the original release."""
    folder, _, name = _AIC_FOLDERS[split]
    _write_json(root / "aic" / folder / f"keypoint_{name}.json", list(records))


def write_mpii(root: Path, split: str, records: Sequence[Record]) -> None:
    """`mpii_<split>.json`, and for val the MATLAB file that PCKh is computed from."""
    folder = root / "mpii" / "annotations"
    entries = [entry for record in records for entry in record["entries"]]
    _write_json(folder / f"mpii_{split}.json", entries)
    if split != "val":
        return
    names = np.empty((1, 16), object)
    names[0] = MPII_MAT_NAMES
    heads = np.array([head for record in records for head in record["heads"]]).reshape(-1, 2, 2)
    joints = np.array([entry["joints"] for entry in entries])
    visible = np.array([entry["joints_vis"] for entry in entries])
    content = {
        "dataset_joints": names,
        "jnt_missing": (1 - visible.T).astype(np.uint8),
        "pos_gt_src": joints.transpose(1, 2, 0),
        "headboxes_src": heads.transpose(1, 2, 0),
    }
    buffer = io.BytesIO()
    savemat(buffer, content)
    # The first 116 bytes are free text in which scipy puts the time, and equal seeds must give equal files.
    (folder / "mpii_gt_val.mat").write_bytes(_MAT_HEADER + buffer.getvalue()[116:])


def mask_polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons around a canvas mask, in pixels from the image's top-left corner."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, 0.7, closed=True)[:, 0] for contour in contours]
    return [_plain((points + 0.5) / SUPERSAMPLING) for points in simple if len(points) > 2]


def _crowd_annotation(crowd: np.ndarray, image_id: int) -> Record:
    """A group as one region, run-length encoded down the columns, with no keypoints."""
    mask = crowd[::SUPERSAMPLING, ::SUPERSAMPLING]
    flat = mask.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {
        "segmentation": {"counts": counts, "size": list(mask.shape)},
        "num_keypoints": 0,
        "area": float(mask.sum()),
        "iscrowd": 1,
        "keypoints": [0] * 51,
        "image_id": image_id,
        "bbox": list(mask_box(crowd)),
        "category_id": 1,
        "id": 900_100_000_000 + image_id,
    }


def _labelled(person: Person, names: Sequence[str]) -> np.ndarray:
    """(K, 3) of x, y, visibility, zeros where not labelled."""
    chosen = [JOINTS.index(name) for name in names]
    visibility = person.visibility[chosen, None]
    return np.concatenate([np.where(visibility > 0, person.points[chosen], 0.0), visibility], 1)


def _plain(values: np.ndarray) -> list[float]:
    """Flat Python numbers, to a hundredth, whole ones as integers."""
    return [int(v) if v == int(v) else v for v in np.round(values, 2).ravel().tolist()]


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
