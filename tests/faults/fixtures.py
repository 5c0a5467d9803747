"""Tiny artifacts of every kind, published directly, and the context in which a stage would run on them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from torch import Tensor

from pipeline import graph
from pipeline.artifacts import Artifact, publish
from pipeline.config_file import load_pipeline
from pipeline.context import Context
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.codec import CodecConfig
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.data.sharding import make_shards, write_description
from pipeline.distributed import World
from pipeline.files import write_json
from pipeline.heartbeat import Heartbeat
from pipeline.models.config import PoseConfig
from pipeline.models.loading import PoseSpec, TokenSpec, save_model
from pipeline.models.pose import PoseModel
from pipeline.status import Status
from pipeline.tracking.tracker import Tracker
from stages import KINDS

BACKBONE = {"size": "micro", "image_size": [64, 48], "patch_size": 8, "patch_padding": 0}
DECODER = {"deconv_layers": 2, "filters": 4}
FIELDS: dict[str, Any] = {
    "pipeline": "tiny",
    "stage": "any",
    "kind": "any",
    "fingerprint": "f",
    "config": {},
    "parents": {},
    "metrics": {},
    "licences": [],
}

Fill = Callable[[Path], None]


def publish_at(final: Path, fill: Fill) -> Artifact:
    """What `fill` writes, as an artifact with digests that hold."""
    staged = final.with_name("." + final.name)
    staged.mkdir(parents=True)
    fill(staged)
    return publish(staged, final, **FIELDS)


def republish(artifact: Artifact, final: Path, change: Fill) -> Artifact:
    """A copy of an artifact with something changed before it was published: every digest holds."""

    def fill(staged: Path) -> None:
        for name in artifact.manifest.files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes((artifact.path / name).read_bytes())
        change(staged)

    return publish_at(final, fill)


def pose_spec(**changes: Any) -> PoseSpec:
    """A tiny pose model of COCO; keys of its backbone can be changed."""
    config = PoseConfig.model_validate({"backbone": {**BACKBONE, **changes}, "decoder": DECODER})
    codec = CodecConfig(input_size=config.backbone.image_size, heatmap_size=config.heatmap_size)
    return PoseSpec(config=config, datasets={"coco": load_definition("coco")}, codec=codec)


def publish_pose(final: Path, spec: PoseSpec | None = None) -> Artifact:
    """A model with random weights."""
    spec = spec or pose_spec()
    torch.manual_seed(0)
    model = PoseModel(spec.config, spec.keypoints)
    model.init_weights()
    return publish_at(final, lambda staged: save_model(staged, spec, model.state_dict()))


def publish_token(final: Path, teacher: str, token: Tensor, **described: Any) -> Artifact:
    """A knowledge token, described as it is unless told otherwise."""
    spec = TokenSpec(**{"teacher": teacher, "tokens": token.shape[1], "width": token.shape[-1], **described})
    return publish_at(final, lambda staged: save_model(staged, spec, {"token": token}))


def raw_coco(root: Path, images: int = 4, definition: str = "coco") -> Path:
    """COCO files with one person in each image."""
    count = load_definition(definition).num_keypoints
    folder = root / "coco"
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    records: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 100, 3), np.uint8)
        cv2.imwrite(str(folder / "train2017" / f"{number}.jpg"), pixels)
        records["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 80})
        keypoints = [value for k in range(count) for value in (25.0 + k, 20.0 + 2 * k, 2)]
        person = {"id": number + 1, "image_id": number, "bbox": [20, 15, 40, 50], "area": 900.0, "category_id": 1}
        records["annotations"].append({**person, "iscrowd": 0, "num_keypoints": count, "keypoints": keypoints})
    (folder / "annotations" / "person_keypoints_train2017.json").write_text(json.dumps(records))
    return root


def publish_shards(
    final: Path, images: int = 4, per_shard: int = 2, datasets: Sequence[DatasetSource] = (DatasetSource(name="coco"),)
) -> Artifact:
    """Shards of `raw_coco`, made as the stage makes them."""
    work = final.with_name(f"{final.name}-work")
    report = make_shards(
        work,
        str(raw_coco(final.with_name(f"{final.name}-raw"), images)),
        list(datasets),
        [],
        CropConfig(input_size=(64, 48)),
        seed=1,
        samples_per_shard=per_shard,
        max_bad_fraction=0,
        measured_people=0,
        augmentation=PoseAugmentation(),
        output=None,
        workers=1,
    )
    return publish_at(final, lambda staged: write_description(work, staged, report))


def change_json(path: Path, **changes: Any) -> None:
    """Replaces keys of a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **changes})


def context(folder: Path, stage: dict[str, Any]) -> Context:
    """A stage of this process alone, planned as the command line does it."""
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "tracking": {"uri": None}, "stages": {"one": stage}}))
    pipeline = load_pipeline(file, [f"workspace={folder / 'workspace'}", "runtime.device=cpu"], KINDS)
    plan = graph.plan(pipeline)["one"]
    assert plan.run_dir is not None
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    world = World(0, 0, 1, torch.device("cpu"))
    tracker = Tracker(pipeline, plan.run_dir, "one", {}, {}, [])
    heartbeat = Heartbeat(plan.run_dir, 0, None, leave=lambda: None)
    return Context(pipeline, plan, world, tracker, Status(plan.run_dir, True), None, heartbeat)
