"""The original ViTPose's .pth: one dataset, several, or ViTPose+ with its experts (ViTAE-Transformer/ViTPose)."""

from pathlib import Path

from pipeline.models.formats.experts import split_experts
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.pose import Imported, Wanted, choose_heads, finish, fold_positions

KEYS = KeyMap(
    (
        ("backbone", "backbone"),
        ("heads.0", "keypoint_head"),
        ("associates.*", "associate_keypoint_heads.*"),
    )
)
DROPS = (("backbone.cls_token", "ViTPose has no use for a class token"),)


def read(path: Path, wanted: Wanted) -> Imported:
    """The model in a .pth. Raises ArtifactError and ConfigError as `choose_heads`, `split_experts` and `finish`."""
    intake = Intake.of(path.name, read_checkpoint(path), KEYS, DROPS)
    for index in intake.numbers("associates"):
        intake.move(f"associates.{index}", f"heads.{index + 1}")
    fold_positions(intake)
    definitions = split_experts(intake, wanted.datasets) or choose_heads(intake, wanted.datasets)
    return finish(intake, definitions, wanted)
