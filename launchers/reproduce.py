"""`vitruvian reproduce ROW`: published weights on the user's COCO first, then the row's training, and a result file."""

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers import chain
from launchers.console import table
from pipeline import graph
from pipeline.artifacts import Artifact
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.data.definitions import DatasetSource
from pipeline.errors import ConfigError, DataError
from pipeline.files import digest_of, sha256, write_json
from pipeline.rows import OfficialWeights, Row, Table, load_rows
from stages import KINDS

logger = logging.getLogger("vitruvian")

RunStages = Callable[[PipelineConfig, list[str], list[str]], None]
"""Runs stages of a pipeline as `vitruvian run` does: the pipeline, the stages, and the words that load it."""

TOLERANCE = 0.1
"""AP by which published weights may differ from what was published."""
CHECK = "official_weights"
"""The preset that evaluates published weights."""
EVALUATION = "evaluate"
"""The stage of every preset of a row, and of the check, that measures."""
README = "the README of ViTAE-Transformer/ViTPose on GitHub"


@dataclass(frozen=True)
class Job:
    """A pipeline of which everything that leads to its evaluation is run."""

    words: list[str]
    """The preset's name and the overrides."""
    pipeline: PipelineConfig

    @classmethod
    def of(cls, words: list[str]) -> "Job":
        """Raises ConfigError."""
        return cls(words, load_pipeline(words[0], words[1:], KINDS))

    @property
    def chosen(self) -> list[str]:
        """Names of the stages, parents first."""
        return [*graph.ancestors(self.pipeline, EVALUATION), EVALUATION]

    def evaluation(self) -> Artifact:
        """What the evaluation published, once it has run."""
        return graph.plan(self.pipeline, [EVALUATION])[EVALUATION].artifact


@dataclass(frozen=True)
class Reproduction:
    """A row of the paper, resolved."""

    name: str
    table: Table
    row: Row
    model: str
    """Its name in the evaluation."""
    job: Job
    weights: str | None
    """Name of the published weights that are checked first."""
    check: Job | None

    @property
    def dataset(self) -> DatasetSource:
        """What it is evaluated on."""
        return DatasetSource(name=self.row.dataset or self.table.dataset, split=self.row.split)


def resolve(name: str, overrides: Sequence[str], weights: Path | None = None, form: str = "vitpose") -> Reproduction:
    """A row, its pipeline with the overrides, and the pipeline of its check. Raises ConfigError."""
    rows = load_rows()
    found, row = rows.find(name)
    job = Job.of([row.preset, *overrides])
    evaluation = job.pipeline.stages[EVALUATION]
    models = evaluation.inputs.models
    model = row.model or next(label for label, stage in models.items() if stage == row.stage)
    if row.model is None and len(models) > 1:  # no need to train the others
        alone = [f"stages.{EVALUATION}.inputs.models={{{model}: {row.stage}}}", f"stages.{EVALUATION}.compare=[]"]
        job = Job.of([*job.words, *alone])
    key = row.check or found.check
    if key is None:
        return Reproduction(name, found, row, model, job, None, None)
    check = _check_of(rows.weights[key], evaluation.inputs.data, overrides, weights, form)
    return Reproduction(name, found, row, model, job, key, check)


def _check_of(official: OfficialWeights, data: str, overrides: Sequence[str], file: Path | None, form: str) -> Job:
    """The pipeline that evaluates published weights on the same data, machine and workspace."""
    words = [override for override in overrides if not override.startswith(("stages.", "slurm.", "name="))]
    words += [
        f"stages.official.format={json.dumps(form)}",
        f"stages.official.model.backbone.size={official.size}",
        f"stages.official.model.decoder.kind={official.decoder}",
        f"stages.{EVALUATION}.inputs.data={json.dumps(data)}",
    ]
    if file is not None:
        words.append(f"stages.official.source={json.dumps(str(file))}")
    return Job.of([CHECK, *words])


def print_dry_run(reproduction: Reproduction) -> None:
    """What would run: the check, then the row."""
    from launchers import dry_run

    for job in (reproduction.check, reproduction.job):
        if job is not None:
            dry_run.print_dry_run(job.pipeline, job.chosen)


def reproduce(reproduction: Reproduction, run_stages: RunStages, *, weights: Path | None, skip_check: bool) -> Path:
    """Checks, trains, evaluates; returns the result file.

    Raises ConfigError where the weights are missing, DataError where raw data is, and where the weights do not reach what
    was published.
    """
    official = load_rows().weights[reproduction.weights] if reproduction.weights else None
    checked: dict[str, Any] | None = None
    if official is not None and not skip_check:
        assert reproduction.check is not None and reproduction.weights is not None
        if weights is None:
            raise ConfigError(
                f"{reproduction.name}: give the published weights by --weights FILE ({official.published} in {README}; "
                f"they reach {official.paper['AP']} AP on COCO val), or --skip-check"
            )
        if not weights.exists():
            raise ConfigError(f"--weights {weights}: no such file")
        for stage in graph.plan(reproduction.job.pipeline, [EVALUATION]).values():  # before the check, which takes long
            graph.require_raw_data(stage)
        run_stages(reproduction.check.pipeline, reproduction.check.chosen, reproduction.check.words)
        measured = require_published(reproduction.weights, official, reproduction.check)
        checked = {"weights": reproduction.weights, "file": str(weights), "paper": official.paper, "measured": measured}
        checked["sha256"] = sha256(weights) if weights.is_file() else None
    run_stages(reproduction.job.pipeline, reproduction.job.chosen, reproduction.job.words)
    path = reproduction.job.pipeline.workspace / "reproduced" / f"{reproduction.name.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result(reproduction, checked))
    return path


def require_published(name: str, official: OfficialWeights, check: Job) -> dict[str, float]:
    """AP and AR of published weights; raises DataError, after a table of what differs, if AP is not as published."""
    found = metrics_of(
        check.evaluation().manifest.metrics, "official", DatasetSource(name="coco", split="val"), "detector"
    )
    expected = official.paper["AP"]
    # An interval of floats: 75.9 - 75.8 is a little more than 0.1.
    if "AP" in found and abs(found["AP"] - expected) <= TOLERANCE + 1e-6:
        logger.info("%s: %.2f AP, published %.1f", name, found["AP"], expected)
        return {metric: found[metric] for metric in official.paper}
    table(f"{name} on this COCO val", ["what", "expected", "found", ""], what_differs(official, check, found))
    said = f"{found['AP']:.2f} AP" if "AP" in found else "no AP, for there are no detector boxes"
    raise DataError(
        f"{name}: {said} where {expected} is published: nothing was trained; the table says what differs, and --skip-check "
        "trains all the same"
    )


def what_differs(official: OfficialWeights, check: Job, found: Mapping[str, float]) -> list[list[str]]:
    """Rows of name, expected, found and a mark: the metrics, and everything that they depend on."""
    from pipeline.data.annotations import read, read_detections
    from pipeline.models.loading import PoseSpec, read_spec

    plans = graph.plan(check.pipeline, [EVALUATION])
    evaluation = check.pipeline.stages[EVALUATION]
    data = plans[EVALUATION].inputs["data"]
    annotations = read(evaluation.datasets[0], data.reference if "://" in data.reference else str(data.path))
    boxes = len(read_detections(annotations)) if annotations.files.detections else 0
    spec = read_spec(plans["official"].artifact)
    assert isinstance(spec, PoseSpec), "the check imports a pose model"
    expected = load_rows().coco_val
    sizes = ["x".join(map(str, size)) for size in (spec.codec.input_size, spec.codec.heatmap_size)]
    pairs: list[tuple[str, Any, Any]] = [
        *(
            (metric, value, f"{found[metric]:.2f}" if metric in found else "-")
            for metric, value in official.paper.items()
        ),
        ("images", expected.images, len(annotations.images)),
        ("people with keypoints", expected.people, len(annotations.instances)),
        ("detector boxes", expected.boxes, boxes),
        ("people in unreadable images", 0, int(found.get("unread", 0))),
        ("input", "256x192", sizes[0]),
        ("heatmap", "64x48", sizes[1]),
        ("codec", "udp, sigma 2, blur 11", f"{spec.codec.target}, sigma {spec.codec.spread:g}, blur {spec.codec.blur}"),
        ("flip test", True, evaluation.flip),
    ]
    return [[what, str(one), str(other), "" if str(one) == str(other) else "differs"] for what, one, other in pairs]


def metrics_of(metrics: Mapping[str, float], model: str, source: DatasetSource, boxes: str) -> dict[str, float]:
    """The metrics of one model on one split, which is named with its dataset where several of it are evaluated."""
    for label in (f"{source.name}-{source.split}", source.name):
        prefix = f"{model}/{label}/{boxes}/"
        found = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def result(reproduction: Reproduction, checked: dict[str, Any] | None) -> dict[str, Any]:
    """What the result file says."""
    row, job = reproduction.row, reproduction.job
    plans = graph.plan(job.pipeline, [EVALUATION])
    source, boxes = reproduction.dataset, reproduction.table.boxes
    found = metrics_of(plans[EVALUATION].artifact.manifest.metrics, reproduction.model, source, boxes)
    if not found:
        raise DataError(
            f"{reproduction.name}: {source.name} {source.split} was not evaluated with {boxes.replace('_', ' ')} boxes; "
            "look whether they are where the dataset's definition says"
        )
    wanted = list(row.paper) or [name for name in ("AP", "AR", "PCKh") if name in found]
    trained = plans[row.stage].artifact
    return {
        "row": reproduction.name,
        "table": reproduction.table.title,
        "name": row.name,
        "preset": row.preset,
        "stage": row.stage,
        "model": reproduction.model,
        "dataset": {"name": source.name, "split": source.split, "boxes": boxes},
        "paper": row.paper,
        "measured": {name: found[name] for name in wanted},
        "interval": [found["AP_low"], found["AP_high"]] if "AP_low" in found else None,
        "note": row.note,
        "check": checked or reproduction.table.ungated or "skipped",
        "overrides": job.words[1:],
        "seed": job.pipeline.seed,
        "config": digest_of(job.pipeline.model_dump(mode="json")),
        "fingerprints": {name: plan.fingerprint for name, plan in plans.items()},
        "artifact": trained.digest,
        "environment": trained.manifest.environment,
        "hardware": _hardware(job.pipeline),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hardware(pipeline: PipelineConfig) -> dict[str, Any]:
    """The machine on which the row was run."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpus": gpus,
        "processes": chain.processes(pipeline),
        "zero_stage": pipeline.engine.zero_stage,
        "precision": pipeline.engine.precision,
    }
