"""What a dataset is: its keypoints, and where its files lie on people's disks. A new dataset is a new YAML."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from pipeline.config_file import did_you_mean, explain, read_yaml
from pipeline.data.readers import files
from pipeline.errors import ConfigError
from pipeline.strict import AddedLater, Strict


class Licence(Strict):
    """Who allows what; published with every artifact that was trained on the data."""

    annotations: str
    """Name and URL of the annotations' licence."""
    images: str
    """Name and URL of the images' licence."""


class SplitFiles(Strict):
    """Where one split's files may lie, relative to the data root. The first place that exists is taken."""

    annotations: tuple[str, ...]
    """Annotation files."""
    images: tuple[str, ...]
    """Folders that hold the images."""
    nested: Annotated[bool, AddedLater] = False
    """The images lie in folders below; unset: at least one lies in the folder itself, or it is not taken for theirs."""
    detections: tuple[str, ...] = ()
    """Boxes of a person detector (a list of image_id, category_id, bbox, score), for evaluation."""
    truth: tuple[str, ...] = ()
    """Ground truth that the annotation file lacks (MPII: mpii_gt_val.mat)."""


class KeypointPart(Strict):
    """Keypoints that an annotation holds in a field of their own, and that the metric scores on their own, too."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Names the part's metrics: AP_<name>, AR_<name>."""
    field: str
    """Field of an annotation with x, y and visibility of each of the part's keypoints."""
    count: int = Field(ge=1)
    """How many keypoints it holds."""
    valid: str | None = None
    """Field that says whether the part could be labelled. A part that says no and is labelled all the same is reported
    and used: published evaluations look at the visibilities alone."""


class DatasetDefinition(Strict):
    """A dataset definition, as a YAML in `configs/datasets` or anywhere else."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Names the dataset and its decoder."""
    url: str = ""
    """The dataset's home page."""
    licence: Licence
    """Of annotations and images."""
    format: Literal["coco", "aic", "mpii", "boxes"]
    """coco: images, annotations, categories; aic: the original AI Challenger list, or coco; mpii: the json list of
    HRNet and mmpose; boxes: coco without keypoints."""
    metric: Literal["coco", "aic", "crowdpose", "pckh", "none"]
    """coco: AP with the annotated areas; aic: AP with area 0.53 x width x height of the box; crowdpose: as aic, and by
    crowd index; pckh: MPII's."""
    average_over_categories: Annotated[bool, AddedLater] = False
    """AP and AR are means over the categories of the annotation file (species), each evaluated on its own, as published
    for AP-10K; needs annotated boxes. Unset: all categories are one."""
    half_body_min_keypoints: int | None = Field(ge=0)
    """Half-body augmentation only if strictly more keypoints are labelled; null: never."""
    keypoints: tuple[str, ...]
    """Names, in the order of the annotation files."""
    parts: Annotated[tuple[KeypointPart, ...], AddedLater] = ()
    """Where annotations keep their keypoints in several fields: these, in order, together all keypoints. AP is that of
    all of them, and each part has its own. Who has no keypoint of the first part is not used (the released COCO-WholeBody
    code: the body). A visibility may be any number here; above 0 is labelled. Empty: all are in `keypoints`."""
    flip_pairs: tuple[tuple[str, str], ...]
    """Left and right partners, which a mirrored image swaps."""
    sigmas: tuple[float, ...]
    """OKS sigma of each keypoint."""
    upper_body: tuple[str, ...]
    """The upper half, for half-body augmentation; the others are the lower half."""
    skeleton: tuple[tuple[str, str], ...]
    """Limbs, for pictures."""
    splits: dict[str, SplitFiles]
    """Files by split: train, val, test, ..."""

    @model_validator(mode="after")
    def _keypoints_are_consistent(self) -> Self:
        _no_twice("keypoints", self.keypoints)
        _no_twice("upper_body", self.upper_body)
        _no_twice("flip_pairs", [name for pair in self.flip_pairs for name in pair])
        mentioned = {"flip_pairs": self.flip_pairs, "skeleton": self.skeleton, "upper_body": [self.upper_body]}
        for field, groups in mentioned.items():
            for name in (name for group in groups for name in group):
                if name not in self.keypoints:
                    raise ValueError(f"{field}: unknown keypoint {name!r}{did_you_mean(name, self.keypoints)}")
        if len(self.sigmas) != len(self.keypoints):
            raise ValueError(
                f"sigmas: expected one for each of {len(self.keypoints)} keypoints, found {len(self.sigmas)}"
            )
        if any(sigma <= 0 for sigma in self.sigmas):
            raise ValueError(f"sigmas: expected positive numbers, found {min(self.sigmas)}")
        return self

    @model_validator(mode="after")
    def _parts_are_consistent(self) -> Self:
        if not self.parts:
            return self
        _no_twice("parts", [part.name for part in self.parts])
        total = sum(part.count for part in self.parts)
        if total != len(self.keypoints):
            raise ValueError(f"parts: they have {total} keypoints together, `keypoints` names {len(self.keypoints)}")
        if (self.format, self.metric) != ("coco", "coco"):
            raise ValueError(f"parts: expected format and metric 'coco', found {self.format!r} and {self.metric!r}")
        return self

    @model_validator(mode="after")
    def _format_and_metric_fit(self) -> Self:
        if (self.format == "boxes") != (not self.keypoints):
            raise ValueError(f"format {self.format!r} with {len(self.keypoints)} keypoints: only 'boxes' has none")
        if self.format == "boxes" and self.metric != "none":
            raise ValueError(f"metric: expected none for format 'boxes', found {self.metric!r}")
        if self.metric == "pckh" and self.format != "mpii":
            raise ValueError(f"metric: pckh needs format 'mpii', found {self.format!r}")
        if self.format == "mpii" and self.metric not in ("pckh", "none"):
            raise ValueError(f"metric: format 'mpii' has no ground truth for {self.metric!r}, expected pckh or none")
        if self.average_over_categories and (self.format, self.metric) != ("coco", "coco"):
            raise ValueError("average_over_categories: expected format and metric 'coco'")
        return self

    @property
    def num_keypoints(self) -> int:
        """K."""
        return len(self.keypoints)

    @property
    def flip_index(self) -> np.ndarray:
        """(K,) int64: a mirrored person's keypoint k is the original's flip_index[k]."""
        index = np.arange(self.num_keypoints, dtype=np.int64)
        for left, right in self._pairs(self.flip_pairs):
            index[left], index[right] = right, left
        return index

    @property
    def upper_body_index(self) -> np.ndarray:
        """(U,) int64, ascending: the keypoints of the upper body."""
        return np.array(sorted(self.keypoints.index(name) for name in self.upper_body), dtype=np.int64)

    @property
    def skeleton_index(self) -> np.ndarray:
        """(L, 2) int64: the keypoints that each limb joins."""
        return np.array(self._pairs(self.skeleton), dtype=np.int64).reshape(-1, 2)

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """The fields of an annotation that hold its keypoints, and how many each holds."""
        if not self.parts:
            return (("keypoints", self.num_keypoints),)
        return tuple((part.field, part.count) for part in self.parts)

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        return [(self.keypoints.index(first), self.keypoints.index(second)) for first, second in pairs]


class DatasetSource(Strict):
    """A split of a dataset to read. Written as a mapping, or as the bare name of a definition."""

    name: str
    """A shipped definition's name (coco, aic, ...) or the path of a definition YAML."""
    split: str = "train"
    """One of the definition's splits."""
    annotations: str | None = None
    """Annotation file, instead of the definition's places: relative to the data root, absolute, or an fsspec URL."""
    images: str | None = None
    """Image folder, likewise."""
    detections: str | None = None
    """Detector boxes, likewise."""
    truth: str | None = None
    """Additional ground truth, likewise."""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ResolvedFiles(NamedTuple):
    """Paths or URLs of one split's files; None for those that it does not have."""

    annotations: str
    images: str
    detections: str | None
    truth: str | None


def shipped_definitions() -> list[str]:
    """Names of the definitions that the package ships."""
    folder = resources.files("configs") / "datasets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_definition(name_or_path: str) -> DatasetDefinition:
    """A shipped definition by its name, or one from a YAML file by its path.

    Raises ConfigError for an unknown name, and with one line per mistake for a definition that is not valid.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and path.name == name_or_path:
        path = Path(str(resources.files("configs") / "datasets" / f"{name_or_path}.yaml"))
        if not path.is_file():
            hint = did_you_mean(name_or_path, shipped_definitions())
            raise ConfigError(
                f"no dataset definition {name_or_path!r} is shipped (give the path of your own .yaml){hint}"
            )
    stat = path.stat() if os.path.isfile(path) else None
    return _read_definition(path, stat and (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=256)
def _read_definition(path: Path, state: tuple[int, int] | None) -> DatasetDefinition:
    """A plan asks for the same definitions many times; `state`, size and time, tells one that was changed."""
    try:
        return DatasetDefinition.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "\n  ".join(explain(error, DatasetDefinition, ""))) from None


def resolve(source: DatasetSource, root: str | Path) -> ResolvedFiles:
    """Finds a split's files below the data root.

    Detections and truth are None where the definition's places hold none. Raises ConfigError for a split that the
    definition lacks, DataError that lists the places for anything else that is missing, StorageError for a URL that
    can't be reached.
    """
    definition = load_definition(source.name)
    split = definition.splits.get(source.split)
    if split is None:
        if source.annotations is None or source.images is None:
            hint = did_you_mean(source.split, sorted(definition.splits))
            raise ConfigError(f"dataset {source.name}: no split {source.split!r}{hint}")
        split = SplitFiles(annotations=(), images=())
    label, base = f"dataset {source.name}, split {source.split}", str(root)

    def required(field: str, places: Sequence[str], kind: Callable[[str], bool]) -> str:
        given = getattr(source, field)
        places = [files.join(base, place) for place in (places if given is None else [given])]
        hint = "put it there, or set the data root or this source's " + repr(field)
        return files.first_found(f"{label}: {field}", places, kind, hint)

    def optional(field: str, places: Sequence[str]) -> str | None:
        if getattr(source, field) is not None:
            return required(field, places, files.is_file)
        return next((path for path in (files.join(base, place) for place in places) if files.is_file(path)), None)

    # A parent folder may be a candidate, too, so a candidate must hold images; a folder that was asked for need not.
    folder = files.is_folder if source.images is not None or split.nested else files.is_image_folder
    return ResolvedFiles(
        annotations=required("annotations", split.annotations, files.is_file),
        images=required("images", split.images, folder),
        detections=optional("detections", split.detections),
        truth=optional("truth", split.truth),
    )


def _no_twice(field: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{field}: {twice[0]!r} is there more than once")
