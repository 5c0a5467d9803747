"""What a checkpoint is of, told by the shapes of its tensors."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from pipeline.config_file import explain
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.formats.keys import Intake
from pipeline.models.vit_config import SIZES

Config = TypeVar("Config", bound=BaseModel)


def backbone_shape(
    intake: Intake, prefix: str, slots: int, input_size: tuple[int, int] | None, heads: int | None, padding: int
) -> dict[str, Any]:
    """The keys of a `ViTConfig` that a file's tensors tell.

    prefix: of the backbone in our names, `backbone.` or nothing; slots: leading positions that belong to no patch;
    input_size: (height, width), for a grid that the number of positions does not tell; heads: for a width and depth
    without a name. Raises ArtifactError for a missing tensor or positions that do not fit, ConfigError where the file
    leaves something open.
    """
    weight = _take(intake, f"{prefix}patch_embed.proj.weight", "(C, 3, p, p)")
    positions = _take(intake, f"{prefix}pos_embed", "(1, N, C)")
    width, patch = weight.shape[0], weight.shape[-1]
    depth = len(intake.numbers(f"{prefix}blocks"))
    mlp_width = intake.take(f"{prefix}blocks.0.mlp.fc1.weight").shape[0]
    where = f"{intake.where}: {intake.theirs(f'{prefix}pos_embed')}"
    rows, columns = _grid(positions.shape[1] - slots, patch, input_size, where)
    return {
        "image_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": heads or _heads(width, depth, mlp_width, intake.where),
        "mlp_width": mlp_width,
        "patch_padding": padding,
    }


def _take(intake: Intake, name: str, expected: str) -> Tensor:
    """A tensor with as many dimensions as `expected` names. Raises ArtifactError."""
    tensor = intake.take(name)
    if tensor.ndim != expected.count(",") + 1:
        raise ArtifactError(
            f"{intake.where}: {intake.theirs(name)} has shape {tuple(tensor.shape)}, expected {expected}"
        )
    return tensor


def _grid(count: int, patch: int, input_size: tuple[int, int] | None, where: str) -> tuple[int, int]:
    """Rows and columns of that many patches: as `input_size` says, else those of 4:3 upright or of a square."""
    if input_size is not None:
        rows, columns = input_size[0] // patch, input_size[1] // patch
        if (rows * patch, columns * patch) != tuple(input_size) or rows * columns != count:
            raise ArtifactError(
                f"{where} holds the positions of {count} patches; an input of {input_size[0]}x{input_size[1]} with "
                f"patches of {patch} has {input_size[0] / patch:g} x {input_size[1] / patch:g}"
            )
        return rows, columns
    if (grid := usual_grid(count)) is not None:
        return grid
    raise ArtifactError(
        f"{where} holds the positions of {count} patches, no 4:3 or square grid; give the input size (--input)"
    )


def usual_grid(count: int) -> tuple[int, int] | None:
    """Rows and columns of that many patches in a 4:3 upright grid, or else a square one; None where there is neither."""
    for rows_of, columns_of in ((4, 3), (1, 1)):
        unit = round((count / (rows_of * columns_of)) ** 0.5) if count > 0 else 0
        if unit and unit * unit * rows_of * columns_of == count:
            return unit * rows_of, unit * columns_of
    return None


def described(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """The config that shapes tell. Raises ArtifactError where there can be no such model."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(f"{where}: no model that can be: {'; '.join(explain(error, kind, 'model')[:3])}") from None


def _heads(width: int, depth: int, mlp_width: int, where: str) -> int:
    """The number of heads, which no shape tells: of the named size. Raises ConfigError where there is none."""
    for size in SIZES.values():
        if (size["width"], size["depth"], size["mlp_width"]) == (width, depth, mlp_width):
            return size["heads"]
    raise ConfigError(
        f"{where}: width {width}, depth {depth} and MLP width {mlp_width} are no named size; give --heads"
    )


def decoder_shape(intake: Intake, index: int) -> dict[str, Any]:
    """The keys of a `DecoderConfig` that the tensors of a head tell. Raises ArtifactError."""
    final = intake.take(f"heads.{index}.final_layer.weight")
    layers = intake.numbers(f"heads.{index}.deconv_layers")
    if not layers:
        if final.shape[-1] == 3:
            return {"kind": "simple"}
        return {"kind": "classic", "deconv_layers": 0}
    first = intake.take(f"heads.{index}.deconv_layers.0.weight")
    return {
        "kind": "classic",
        "deconv_layers": (layers[-1] + 2) // 3,
        "filters": first.shape[1] if first.ndim > 1 else 1,
    }
