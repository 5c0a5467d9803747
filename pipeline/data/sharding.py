"""From raw datasets to shards: in parallel, resumable, the same bytes whatever the number of processes.

Every shard is one task: a fixed slice of a seeded permutation of all people. A finished shard leaves a report beside
the work; a killed run makes only the shards that have none.
"""

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.data.annotations import Annotations, read
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.collection import DESCRIPTION, ShardsDescription, index_name
from pipeline.data.crops import CropConfig, crop_instance, lost_share, sample_meta
from pipeline.data.definitions import DatasetDefinition, DatasetSource
from pipeline.data.images import decode_image, encode_jpeg, read_bytes
from pipeline.data.instance import Instance
from pipeline.data.readers.records import MALFORMED
from pipeline.data.shard_index import index_path
from pipeline.data.shards import shard_name, write_shard
from pipeline.errors import DataError
from pipeline.files import link_or_copy, read_json, write_json, write_text
from pipeline.processes import end_with_parent
from pipeline.progress import progress

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.txt"
"""A file of the work: every annotation that was not used, and why."""
_TOLD = 20


@dataclass
class ShardsReport:
    """What was made, left out and lost."""

    base: str
    crop: CropConfig
    datasets: dict[str, DatasetDefinition]
    licences: list[str]
    shards: list[str] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    problems: int = 0
    """Annotations left out when they were read."""
    unreadable: int = 0
    """People left out because of their image or box."""
    unread_evaluation_images: int = 0
    """Evaluation images that can't be read, so that a copy of them among the training images is not found."""
    excluded: int = 0
    """People left out because their image is an evaluation image."""
    lost: float = 0.0
    measured: int = 0

    @property
    def lost_pixels(self) -> float:
        """Mean share of the training windows' pixels that the crops do not hold."""
        return self.lost / max(1, self.measured)

    def metrics(self) -> dict[str, float]:
        """For the artifact."""
        counts = {f"samples_{name}": float(count) for name, count in self.samples.items()}
        left_out = {"left_out_annotations": self.problems, "left_out_unreadable": self.unreadable}
        return {
            **counts,
            **{name: float(value) for name, value in left_out.items()},
            "left_out_evaluation_images": float(self.excluded),
            "unread_evaluation_images": float(self.unread_evaluation_images),
            "shards": float(len(self.shards)),
            "lost_pixels": self.lost_pixels,
        }


@dataclass(frozen=True)
class _Task:
    """One shard, as its process gets it."""

    path: str
    report: Path
    first: int
    people: list[tuple[Instance, str]]
    measured: int
    crop: CropConfig
    augmentation: PoseAugmentation
    definitions: dict[str, DatasetDefinition]
    excluded: frozenset[str]
    seed: int


def make_shards(
    work: Path,
    root: str,
    sources: list[DatasetSource],
    exclude: list[DatasetSource],
    crop: CropConfig,
    *,
    seed: int,
    samples_per_shard: int,
    max_bad_fraction: float,
    measured_people: int,
    augmentation: PoseAugmentation,
    output: str | None,
    workers: int,
    part: tuple[int, int] | None = None,
) -> ShardsReport:
    """Makes the shards that are missing below `work` (or at the URL `output`).

    part: (I, N) makes only every N-th shard from number I on, beside other processes that make the others, and leaves
    summing up to a later call without it: the report then holds no shards.
    Raises DataError where more than `max_bad_fraction` of a source's annotations are malformed, or of the people, or of
    the images of `exclude`, can't be read. These are named in the log, annotations in `LEFT_OUT` of the work. Raises
    StorageError for a URL that can't be reached, which leaves nobody out: a later call goes on.
    """
    work.mkdir(parents=True, exist_ok=True)
    read_sources = [read(source, root) for source in sources]
    report = _begin(read_sources, work, output, crop, max_bad_fraction)
    people = [
        (instance, annotations.source.split) for annotations in read_sources for instance in _wanted(annotations, crop)
    ]
    if not people:
        raise DataError(f"{root}: no usable person in {', '.join(source.name for source in sources)}")
    order = np.random.default_rng([seed, 0x5AAD]).permutation(len(people))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        excluded, report.unread_evaluation_images = _excluded_digests(pool, exclude, root, max_bad_fraction)
        tasks = [
            _Task(
                f"{output.rstrip('/')}/{shard_name(number)}" if output else str(work / "shards" / shard_name(number)),
                work / f"report-{number:06d}.json",
                start,
                [people[i] for i in order[start : start + samples_per_shard]],
                max(0, min(samples_per_shard, measured_people - start)),
                crop,
                augmentation,
                report.datasets,
                excluded,
                seed,
            )
            for number, start in enumerate(range(0, len(people), samples_per_shard))
        ]
        _run(pool, tasks if part is None else tasks[part[0] :: part[1]])
    if part is not None:
        return report
    _sum_up(report, tasks)
    if report.unreadable > max_bad_fraction * len(people):
        for task in tasks:  # the images may be repaired: the next run looks at them again
            if read_json(task.report)["unreadable"]:
                task.report.unlink()
        raise DataError(
            f"{report.unreadable} of {len(people)} people can't be read, more than max_bad_fraction {max_bad_fraction}; "
            f"they are named above"
        )
    if not report.samples:
        raise DataError(f"{root}: nothing is left: {report.excluded} people are in evaluation images")
    _tell(report)
    return report


def write_description(work: Path, staged: Path, report: ShardsReport) -> None:
    """Moves the finished shards into an artifact's folder and describes them there."""
    (staged / "index").mkdir()
    for name in report.shards:
        if "://" in report.base:
            (staged / index_name(name)).write_bytes(
                read_bytes(f"{report.base.rstrip('/')}/{Path(index_name(name)).name}")
            )
        else:
            shutil.copy2(work / "shards" / Path(index_name(name)).name, staged / index_name(name))
    if "://" not in report.base:
        (staged / "shards").mkdir()
        for name in report.shards:
            # A link, not a move: a run that is killed while it publishes still has them.
            link_or_copy(work / "shards" / name, staged / "shards" / name)
    description = ShardsDescription(
        base=report.base,
        shards=report.shards,
        mode=report.crop.mode,
        max_input=report.crop.input_size,
        samples=dict(sorted(report.samples.items())),
        datasets=report.datasets,
        lost_pixels=report.lost_pixels,
    )
    write_json(staged / DESCRIPTION, description.model_dump(mode="json"))


def _wanted(annotations: Annotations, crop: CropConfig) -> list[Instance]:
    """Every person, or in whole-image mode the first of each image."""
    if crop.mode == "person":
        return annotations.instances
    return list({instance.image: instance for instance in reversed(annotations.instances)}.values())[::-1]


def _begin(
    sources: list[Annotations], work: Path, output: str | None, crop: CropConfig, max_bad_fraction: float
) -> ShardsReport:
    """A report with what the annotations alone tell."""
    definitions = {annotations.definition.name: annotations.definition for annotations in sources}
    licences = [f"{d.name}: {text}" for d in definitions.values() for text in (d.licence.annotations, d.licence.images)]
    report = ShardsReport(output or "shards", crop, definitions, sorted(set(licences)))
    report.problems = _tell_problems(sources, work / LEFT_OUT)
    for annotations in sources:
        _require_wellformed(annotations, max_bad_fraction, work / LEFT_OUT)
    return report


def _tell(report: ShardsReport) -> None:
    logger.info(
        "%d samples in %d shards (%s); left out: %d annotations, %d unreadable, %d in evaluation images; the crops lack "
        "%.3f%% of the training windows' pixels",
        sum(report.samples.values()),
        len(report.shards),
        ", ".join(f"{name} {count}" for name, count in sorted(report.samples.items())),
        report.problems,
        report.unreadable,
        report.excluded,
        100 * report.lost_pixels,
    )


def _tell_problems(sources: list[Annotations], file: Path) -> int:
    """Writes down every annotation that was left out, and why, and logs the first of each source; how many they are."""
    lines: list[str] = []
    for annotations in sources:
        told = [f"{problem.where}: {problem.what}" for problem in annotations.problems if problem.dropped]
        for line in told[:_TOLD]:
            logger.warning("left out: %s", line)
        lines += told
    write_text(file, "".join(f"{line}\n" for line in lines))
    if lines:
        logger.warning("left out: %d annotations in all, each named in %s", len(lines), file)
    return len(lines)


def _require_wellformed(annotations: Annotations, max_bad_fraction: float, file: Path) -> None:
    broken = {problem.where for problem in annotations.problems if problem.dropped and problem.kind in MALFORMED}
    if len(broken) > max_bad_fraction * annotations.records:
        raise DataError(
            f"{annotations.files.annotations}: {len(broken)} of {annotations.records} annotations are malformed, more "
            f"than max_bad_fraction {max_bad_fraction}; they are named in {file}"
        )


def _excluded_digests(
    pool: ProcessPoolExecutor, exclude: list[DatasetSource], root: str, max_bad_fraction: float
) -> tuple[frozenset[str], int]:
    """Digests of the evaluation images, and how many of these can't be read."""
    paths = sorted({image.path for source in exclude for image in read(source, root).images.values()})
    found = list(pool.map(_digest, paths, chunksize=64))
    unread = [fault for _, fault in found if fault]
    for fault in unread:
        logger.warning("evaluation image: %s", fault)
    if len(unread) > max_bad_fraction * len(paths):
        raise DataError(
            f"{len(unread)} of {len(paths)} images of `exclude` can't be read, more than max_bad_fraction "
            f"{max_bad_fraction}; they are named above. Copies of them could not be kept out of the training data."
        )
    return frozenset(digest for digest, _ in found if digest), len(unread)


def _run(pool: ProcessPoolExecutor, tasks: list[_Task]) -> None:
    missing = [task for task in tasks if not _is_done(task)]
    if len(missing) < len(tasks):
        logger.info("%d of %d shards are there already", len(tasks) - len(missing), len(tasks))
    with progress("writing shards") as show:
        futures = [pool.submit(_make, task) for task in missing]
        try:
            for done, future in enumerate(as_completed(futures), start=len(tasks) - len(missing) + 1):
                future.result()
                show(done, len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_done(task: _Task) -> bool:
    """True if the task left its report, and the shard that the report speaks of is there."""
    if not task.report.is_file():
        return False
    local = "://" not in task.path
    return not (local and read_json(task.report)["samples"] and not Path(index_path(task.path)).is_file())


def _sum_up(report: ShardsReport, tasks: list[_Task]) -> None:
    for task in tasks:
        content = read_json(task.report)
        if content["samples"]:
            report.shards.append(Path(task.path).name)
        report.samples.update(content["samples"])
        report.unreadable += len(content["unreadable"])
        report.excluded += content["excluded"]
        report.lost += content["lost"]
        report.measured += content["measured"]
        for name in content["unreadable"]:
            logger.warning("left out: %s", name)


def _start_worker() -> None:
    end_with_parent()
    cv2.setNumThreads(1)


def _digest(path: str) -> tuple[str | None, str | None]:
    """Runs in a process of the pool: the digest of a file, or what is wrong with it."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest(), None
    except DataError as error:
        return None, str(error)


def _make(task: _Task) -> None:
    """Runs in a process of the pool: writes one shard, then its report."""
    content: dict[str, Any] = {"samples": {}, "unreadable": [], "excluded": 0, "lost": 0.0, "measured": 0}
    samples = list(_samples(task, content))
    if samples:
        write_shard(task.path, samples)
        content["samples"] = dict(Counter(meta["dataset"] for _, _, meta in samples))
    write_json(task.report, content)


def _samples(task: _Task, content: dict[str, Any]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for place, (instance, split) in enumerate(task.people):
        try:
            data = read_bytes(instance.image)
            digest = hashlib.sha256(data).hexdigest()
            if digest in task.excluded:
                content["excluded"] += 1
                continue
            image = decode_image(data, where=instance.image, size=instance.image_size)
            crop = crop_instance(image, instance, task.crop)
        except DataError as error:
            content["unreadable"].append(str(error))
            continue
        size = (image.shape[1], image.shape[0])
        if place < task.measured:
            rng = np.random.default_rng([task.seed, 0x105, task.first + place])
            definition = task.definitions[instance.dataset]
            content["lost"] += lost_share(instance, crop, size, task.crop, definition, task.augmentation, rng)
            content["measured"] += 1
        meta = sample_meta(instance, crop, task.crop, split=split, image_sha256=digest, image_size=size)
        yield f"{instance.dataset}_{task.first + place:09d}", encode_jpeg(crop.image, task.crop.quality), dict(meta)
