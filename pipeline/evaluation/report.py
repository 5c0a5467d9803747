"""Several models on several datasets: one table, intervals, comparisons, pictures, server files."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.annotations import Annotations, read
from pipeline.data.definitions import DatasetDefinition, DatasetSource
from pipeline.data.images import decode_image, read_bytes
from pipeline.errors import ConfigError
from pipeline.evaluation.bootstrap import bootstrap_ap, bootstrap_difference
from pipeline.evaluation.coco import Matches, coco_results
from pipeline.evaluation.inference import ceiling, predict, requests_from_detections, requests_from_ground_truth
from pipeline.evaluation.model_set import ModelSet
from pipeline.evaluation.oks import per_instance_oks
from pipeline.evaluation.pictures import contact_sheet, draw_skeleton, save_jpg
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.results import write_server_files
from pipeline.evaluation.score import Score, headline, score
from pipeline.models.loading import PoseSpec

logger = logging.getLogger(__name__)

_COLUMNS = ["model", "dataset", "boxes", "people", "metric", "value", "95 % interval", "AR", "AP50", "AP75"]


@dataclass
class EvaluationReport:
    """Collects what `evaluate` finds; `table`, `metrics` and `write_files` give it out."""

    root: str
    models: ModelSet
    flip: bool
    batch_size: int
    bootstrap: int
    seed: int
    workers: int = 0
    """Processes that read and crop images; 0: this one does."""
    max_bad_fraction: float = 0.0
    """Share of people whose image can't be read at which the evaluation stops; below it they count as not found."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`<model>/<dataset>/<boxes>/<metric>`."""
    _rows: list[list[str]] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)
    _kept: dict[tuple[str, str, str], tuple[Annotations, list[Prediction]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._notes += self.models.notes

    def evaluate(
        self, label: str, source: DatasetSource, boxes: Sequence[str], compare: Sequence[tuple[str, str]]
    ) -> None:
        """Every model that has a decoder for the split, with every kind of boxes that it has; `label` names it."""
        annotations = read(source, self.root)
        definition = annotations.definition
        headline(definition)
        if definition.metric == "pckh" and annotations.files.truth is None:
            self._notes.append(f"{label}: no mpii_gt_val.mat; head sizes come from the head's two joints")
        self._note_ceiling(label, annotations)
        for kind in boxes:
            if kind == "detector" and annotations.files.detections is None:
                continue
            matches: dict[str, Matches] = {}
            for name in self.models.names:
                found = self._evaluate_model(name, label, annotations, kind)
                if found is not None and found.matches is not None:
                    matches[name] = found.matches
            if self.bootstrap:
                self._compare(matches, label, kind, compare)

    def table(self) -> dict[str, Any]:
        """Columns, rows and notes, as they are printed."""
        return {"columns": _COLUMNS, "rows": self._rows, "notes": self._notes}

    def write_files(self, folder: Path, people: int) -> None:
        """`pictures/` of each model on each dataset, and `server/` with results files for COCO."""
        for (name, dataset, kind), (annotations, predictions) in self._kept.items():
            if kind == "ground_truth" and people:
                sheet = _picture(annotations, predictions, people, self.seed)
                (folder / "pictures").mkdir(exist_ok=True)
                save_jpg(sheet, folder / "pictures" / f"{name}-{dataset}.jpg")
            if kind == "detector" and annotations.definition.name == "coco" and annotations.source.split == "val":
                results = coco_results(predictions, annotations.definition)
                write_server_files(results, folder / "server", "val2017", re.sub("[^A-Za-z0-9]+", "-", name))

    def _evaluate_model(self, name: str, label: str, annotations: Annotations, kind: str) -> Score | None:
        spec = self.models.spec(name)
        definition = annotations.definition
        decoder = decoder_for(spec, definition)
        if decoder is None:
            self._notes.append(f"{name} has no decoder for {definition.name}: not evaluated on {label}")
            return None
        make = requests_from_detections if kind == "detector" else requests_from_ground_truth
        requests = make(annotations, spec.codec.input_size)
        predictions = predict(
            self.models.model(name),
            definition,
            requests,
            spec.codec,
            flip=self.flip,
            batch_size=self.batch_size,
            workers=self.workers,
            decoder=decoder,
            max_bad_fraction=self.max_bad_fraction,
        )
        if unread := len(requests) - len(predictions):
            self.metrics[f"{name}/{label}/{kind}/unread"] = float(unread)
            self._notes.append(
                f"{name} on {label}, {kind.replace('_', ' ')} boxes: {unread} of {len(requests)} people are in images that "
                "can't be read, and count as not found"
            )
        found = score(annotations, predictions)
        self._kept[name, label, kind] = annotations, predictions
        self._record(name, label, annotations, kind, found)
        return found

    def _record(self, name: str, label: str, annotations: Annotations, kind: str, found: Score) -> None:
        definition = annotations.definition
        prefix = f"{name}/{label}/{kind}"
        self.metrics |= {f"{prefix}/{metric}": value for metric, value in found.metrics.items()}
        interval = "-"
        if found.matches is not None and self.bootstrap:
            low, high = bootstrap_ap(found.matches, resamples=self.bootstrap, seed=self.seed)
            self.metrics |= {f"{prefix}/AP_low": low, f"{prefix}/AP_high": high}
            interval = f"{low:.1f} - {high:.1f}"
        metric = headline(definition)
        others = [_shown(found.metrics.get(key)) for key in ("AR", "AP50", "AP75")]
        people = str(len(annotations.instances))
        value = _shown(found.metrics[metric])
        self._rows.append([name, label, kind.replace("_", " "), people, metric, value, interval, *others])
        if definition.parts:
            parts = ", ".join(f"{part.name} {_shown(found.metrics[f'AP_{part.name}'])}" for part in definition.parts)
            self._notes.append(f"{name} on {label}, {kind.replace('_', ' ')} boxes, AP by part: {parts}")
        logger.info("%s on %s, %s boxes: %s %s", name, label, kind, metric, value)

    def _compare(
        self, matches: Mapping[str, Matches], dataset: str, kind: str, pairs: Sequence[tuple[str, str]]
    ) -> None:
        for first, second in pairs:
            if first in matches and second in matches:
                a, b = matches[first], matches[second]
                difference = a.average_precision() - b.average_precision()
                low, high = bootstrap_difference(a, b, resamples=self.bootstrap, seed=self.seed)
                self.metrics[f"{first}-minus-{second}/{dataset}/{kind}/AP"] = difference
                where = f"on {dataset}, {kind.replace('_', ' ')} boxes"
                interval = f"95 % interval {low:+.1f} to {high:+.1f}"
                self._notes.append(f"{first} minus {second} {where}: {difference:+.1f} AP, {interval}")

    def _note_ceiling(self, label: str, annotations: Annotations) -> None:
        """What the codec alone allows, once for each codec among the models."""
        definition = annotations.definition
        specs = [self.models.spec(name) for name in self.models.names]
        codecs = [spec.codec for spec in specs if decoder_for(spec, definition) is not None]
        for codec in [codec for place, codec in enumerate(codecs) if codec not in codecs[:place]]:
            metric = headline(definition)
            best = score(annotations, ceiling(annotations, codec)).metrics[metric]
            self.metrics[f"codec_ceiling/{label}/ground_truth/{metric}"] = best
            height, width = codec.heatmap_size
            self._notes.append(
                f"{label}: perfect {height}x{width} heatmaps give {metric} {best:.1f} (the codec's ceiling)"
            )


def decoder_for(spec: PoseSpec, definition: DatasetDefinition) -> str | None:
    """The model's decoder for a dataset: of its name, else one of the same keypoints (OCHuman: COCO's).

    Raises ConfigError if the decoder of that name has other keypoints.
    """
    own = spec.datasets.get(definition.name)
    if own is not None:
        if own.keypoints != definition.keypoints:
            raise ConfigError(
                f"the model's decoder for {definition.name!r} was trained on other keypoints than the data has"
            )
        return definition.name
    return next((name for name, other in spec.datasets.items() if other.keypoints == definition.keypoints), None)


def _picture(annotations: Annotations, predictions: Sequence[Prediction], people: int, seed: int) -> np.ndarray:
    """Rows of the best, the worst and random predictions by OKS, each cut out of its image."""
    values = per_instance_oks(predictions, annotations.instances, annotations.definition)
    ranked = [int(index) for index in np.argsort(-np.nan_to_num(values, nan=-1.0)) if not np.isnan(values[index])]
    people = min(people, len(ranked))
    random = np.random.default_rng(seed).permutation(ranked)[:people]
    chosen = [("best", ranked[:people]), ("worst", ranked[::-1][:people]), ("random", [int(index) for index in random])]
    cells, captions = [], []
    paths = {instance.id: instance for instance in annotations.instances}
    for word, indices in chosen:
        for index in indices:
            prediction = predictions[index]
            assert prediction.instance_id is not None
            instance = paths[prediction.instance_id]
            image = decode_image(read_bytes(instance.image), where=instance.image, size=instance.image_size)
            cells.append(_cut_out(image, prediction, annotations.definition))
            captions.append(f"{word} OKS {values[index]:.2f}")
    return contact_sheet(cells, max(1, people), captions)


def _cut_out(image: np.ndarray, prediction: Prediction, definition: DatasetDefinition) -> np.ndarray:
    """The window of a prediction, enlarged so that thin lines stay readable, with the skeleton drawn."""
    x, y, width, height = prediction.window
    left, top = max(0, int(x - width / 2)), max(0, int(y - height / 2))
    right, bottom = min(image.shape[1], int(x + width / 2) + 1), min(image.shape[0], int(y + height / 2) + 1)
    scale = max(1, round(240 / max(1, bottom - top)))
    part = image[top:bottom, left:right].repeat(scale, axis=0).repeat(scale, axis=1)
    keypoints = prediction.keypoints.copy()
    keypoints[:, :2] = (keypoints[:, :2] - (left, top) + 0.5) * scale - 0.5
    return draw_skeleton(part, keypoints, definition, threshold=0.2)


def _shown(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{value:.1f}"
