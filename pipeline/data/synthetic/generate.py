"""Makes the synthetic datasets: plans the pictures, paints them on several processes, writes the annotation files."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.synthetic.config import SyntheticConfig
from pipeline.data.synthetic.detections import detect
from pipeline.data.synthetic.scene import Habits, render_scene
from pipeline.data.synthetic.writers import (
    Record,
    aic_record,
    coco_record,
    image_path,
    mpii_record,
    write_aic,
    write_coco,
    write_mpii,
)
from pipeline.errors import DataError

DATASETS = ("coco", "aic", "mpii")
SPLITS = ("train", "val")
_HABITS = {
    "coco": Habits(drop_occluded=0.2, drop_turned=0.75, bystanders=True),
    "aic": Habits(drop_occluded=0.2, drop_turned=0.0, bystanders=False),
    "mpii": Habits(drop_occluded=0.0, drop_turned=0.0, bystanders=False),
}
_WRITERS = {"coco": write_coco, "aic": write_aic, "mpii": write_mpii}


@dataclass(frozen=True, slots=True)
class _Job:
    """One picture to paint."""

    dataset: str
    split: str
    index: int
    people: int


def generate(
    root: Path,
    config: SyntheticConfig,
    *,
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes the raw datasets `coco`, `aic` and `mpii` under `root` and returns how many images and people each has.

    The files depend on `config` and `seed` only, byte by byte, not on `workers` (processes; 0 or 1 paints in this
    one). `progress` is called with the images done and their total. The counts are named `coco_train_people`,
    `coco_train_images` and so on; people are those with keypoints. Raises DataError if `root` can't be written.
    """
    jobs = [job for dataset in DATASETS for split in SPLITS for job in _plan(config, dataset, split, seed)]
    records: dict[tuple[str, str], list[Record]] = {}
    try:
        for job in jobs:
            image_path(root, job.dataset, job.split, seed, 0).parent.mkdir(parents=True, exist_ok=True)
        for done, (job, record) in enumerate(zip(jobs, _paint_all(jobs, root, config, seed, workers), strict=True), 1):
            records.setdefault((job.dataset, job.split), []).append(record)
            if progress is not None:
                progress(done, len(jobs))
        for (dataset, split), found in records.items():
            _WRITERS[dataset](root, split, found)
    except OSError as error:
        raise DataError(f"synthetic data can't be written under {root}: {error}; choose another folder") from error
    counts = {
        f"{dataset}_{split}_{what}": 0 for dataset in DATASETS for split in SPLITS for what in ("images", "people")
    }
    for job in jobs:
        counts[f"{job.dataset}_{job.split}_images"] += 1
        counts[f"{job.dataset}_{job.split}_people"] += job.people
    return counts


def _rng(seed: int, dataset: str, split: str, number: int) -> np.random.Generator:
    """The randomness of one picture, whoever paints it: number 1 and up; 0 is that of the split's plan."""
    key = (seed, DATASETS.index(dataset), SPLITS.index(split), number)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _plan(config: SyntheticConfig, dataset: str, split: str, seed: int) -> Iterator[_Job]:
    """Shares the people of one split out over pictures."""
    left = int(getattr(config, f"{dataset}_{split}"))
    most = config.crowding[1] if dataset == "mpii" else config.crowding[0]
    draws = _rng(seed, dataset, split, 0)
    index = 0
    while left > 0:
        people = min(int(draws.integers(1, most + 1)), left)
        yield _Job(dataset, split, index, people)
        left, index = left - people, index + 1


def _paint_all(jobs: list[_Job], root: Path, config: SyntheticConfig, seed: int, workers: int) -> Iterable[Record]:
    """Records in the order of the jobs."""
    paint = partial(_paint, root=root, config=config, seed=seed)
    if workers <= 1 or len(jobs) < 2:
        yield from map(paint, jobs)
        return
    # Spawned, not forked: the caller may hold threads and a GPU.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)), cv2.setNumThreads, (1,)) as pool:
        yield from pool.imap(paint, jobs, chunksize=8)


def _paint(job: _Job, *, root: Path, config: SyntheticConfig, seed: int) -> Record:
    """Paints one picture, writes it and describes it."""
    rng = _rng(seed, job.dataset, job.split, job.index + 1)
    scene = render_scene(rng, job.people, config, _HABITS[job.dataset])
    path = image_path(root, job.dataset, job.split, seed, job.index)
    quality = int(rng.integers(90, 97))
    path.write_bytes(cv2.imencode(".jpg", scene.image, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes())
    if job.dataset == "coco":
        return coco_record(scene, path, detect(rng, scene) if job.split == "val" else ())
    return aic_record(scene, path) if job.dataset == "aic" else mpii_record(rng, scene, path)
