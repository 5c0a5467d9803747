"""The rows of ViTPose's tables, from `configs/rows.yaml`: preset, stage, published values, official weights, status."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config_file import did_you_mean, explain, read_yaml, shipped_presets
from pipeline.errors import ConfigError
from pipeline.strict import Strict

Values = dict[Literal["AP", "AR", "PCKh"], Annotated[float, Field(ge=0, le=100)]]
"""Metrics in percent."""


class CocoVal(Strict):
    """What COCO val holds where it is as in the papers."""

    images: int
    """Of person_keypoints_val2017.json."""
    people: int
    """With keypoints, without crowds."""
    boxes: int
    """Of COCO_val2017_detections_AP_H_56_person.json."""


class OfficialWeights(Strict):
    """A published model, and what it should reach on COCO val with detector boxes."""

    size: Literal["S", "B", "L", "H"]
    """Of its backbone."""
    decoder: Literal["classic", "simple"] = "classic"
    """Of its heads."""
    paper: Values
    """Published AP and AR."""
    published: str
    """Where: the row of a table in the README of ViTAE-Transformer/ViTPose."""


class Row(Strict):
    """One row of a table."""

    name: str
    """The row's name in the paper."""
    preset: str
    """The shipped pipeline that holds it."""
    without_aic: str | None = None
    """The preset for those who lack AI Challenger, where names do not tell."""
    stage: str = "finetune"
    """The stage of the preset whose model it is."""
    model: str | None = None
    """The model's name in the preset's evaluation; unset: the one that the stage makes."""
    dataset: str | None = None
    """Definition that is evaluated on; unset: the table's."""
    split: str = "val"
    """Its split."""
    paper: Values = {}
    """Published values; none: the paper has no such row."""
    check: str | None = None
    """Official weights that are evaluated first; unset: the table's."""
    note: str = ""
    """What is different from the paper."""
    status: str = Field("not run", pattern=r"^(not run|measured|run by .+)$")
    """not run; measured: by this project; or who ran it."""
    measured: Values = {}
    """What came out, if it was run."""

    @model_validator(mode="after")
    def _what_was_run_was_measured(self) -> "Row":
        if (self.status == "not run") == bool(self.measured):
            raise ValueError(f"status {self.status!r} and measured {dict(self.measured)} contradict each other")
        return self


class Table(Strict):
    """The rows of one table of the paper."""

    title: str
    """Of the table."""
    check: str | None = None
    """Official weights that rows are checked by."""
    ungated: str | None = None
    """Why the table's rows need no check."""
    dataset: str = "coco"
    """Definition that is evaluated on."""
    boxes: Literal["ground_truth", "detector"] = "detector"
    """Annotated boxes or a detector's."""
    rows: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$")], Row]
    """By the second half of their names."""


class Rows(Strict):
    """The whole file."""

    coco_val: CocoVal
    """Expected data."""
    weights: dict[str, OfficialWeights]
    """Published models by the name that rows give them."""
    tables: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$")], Table]
    """By the first half of their rows' names."""

    @model_validator(mode="after")
    def _checks_are_known(self) -> "Rows":
        for name, table in self.tables.items():
            for row, content in table.rows.items():
                check = content.check or table.check
                if (check is None) == (table.ungated is None):
                    raise ValueError(f"{name}/{row}: give a check, or the table's reason for none in ungated")
                if check is not None and check not in self.weights:
                    raise ValueError(f"{name}/{row}: check {check!r} is not among the weights")
        return self

    def find(self, name: str) -> tuple[Table, Row]:
        """A row by its whole name, such as table5/window_shift. Raises ConfigError."""
        first, _, second = name.partition("/")
        table = self.tables.get(first)
        if table is None or second not in table.rows:
            raise ConfigError(
                f"no row {name!r}{did_you_mean(name, self.names())}; vitruvian reproduce --list has them all"
            )
        return table, table.rows[second]

    def names(self) -> list[str]:
        """Whole names of all rows."""
        return [f"{first}/{second}" for first, table in self.tables.items() for second in table.rows]


@cache
def load_rows() -> Rows:
    """The shipped table of rows. Raises ConfigError."""
    path = Path(str(resources.files("configs") / "rows.yaml"))
    try:
        return Rows.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "\n  ".join(explain(error, Rows, ""))) from None


def without_aic(preset: str) -> str | None:
    """The shipped twin of a preset that does without AI Challenger, by its name; None if there is none."""
    twins = (f"{preset}_without_aic", preset.replace("coco_aic_mpii", "coco_mpii"))
    return next((twin for twin in twins if twin != preset and twin in shipped_presets()), None)
