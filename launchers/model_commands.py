"""`vitruvian predict`, `split`, `convert`, `export`: what is done with one model, without a pipeline."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.console import AsJson

ArtifactArgument = Annotated[str, typer.Argument(help="Folder of a pose model's artifact, or mlflow:RUN_ID.")]
NewFolder = Annotated[Path, typer.Option(help="Folder of what is made; must not be there yet.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server, for mlflow:RUN_ID.")]


def predict(
    artifact: ArtifactArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    boxes: Annotated[
        Path | None,
        typer.Option(help="JSON: image file name -> list of [x, y, width, height]; unset: the whole image."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Whose decoder; unset: COCO's, else the first.")] = None,
    out: Annotated[Path, typer.Option(help="Where keypoints.json and the pictures go.")] = Path("predictions"),
    tracking_uri: TrackingUri = None,
    flip: Annotated[bool, typer.Option(help="Average with the mirrored image.")] = True,
    as_json: AsJson = False,
) -> None:
    """Find keypoints of people in images: JSON, and pictures with the skeleton drawn."""
    from launchers.predict import predict_files

    found = predict_files(artifact, images, boxes, dataset, out, tracking_uri, flip)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, people in found["images"].items():
        typer.echo(f"{name}: {len(people)} {'person' if len(people) == 1 else 'people'}")
    typer.echo(f"keypoints and pictures are in {out}")


def split(
    artifact: ArtifactArgument,
    dataset: Annotated[str, typer.Option(help="Whose expert and decoder stay.")],
    out: NewFolder,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Take one dataset's plain model out of a model of several datasets, with ViTPose+'s experts or without."""
    from launchers import conversion

    found = conversion.split(artifact, dataset, out, tracking_uri)
    _tell(found, f"{_artifact(found)}, {dataset} alone", as_json)


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint file, or Hugging Face folder; a path or an fsspec URL.")],
    format: Annotated[
        str, typer.Option("--from", help="mae, vitpose (ViTPose+, too), mmpose, huggingface, timm or torchvision.")
    ],
    out: NewFolder,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose decoder to take, several times for several; unset: all of them, COCO for a single one."
        ),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option("--input", metavar="HxW", help="Input size, where the positions do not tell it.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, where the width does not tell them.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, kept with everything made of them.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the file must have; needed for a URL.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn others' weights into an artifact. Nothing in the file is executed; every tensor is accounted for."""
    from launchers import conversion

    found = conversion.convert(source, format, out, dataset or [], input_size, heads, licence, sha256)
    _tell(found, _artifact(found), as_json)


def export(
    artifact: ArtifactArgument,
    format: Annotated[str, typer.Option("--to", help="huggingface, mmpose or onnx.")],
    out: NewFolder,
    dataset: Annotated[
        str | None, typer.Option(help="Whose decoder; needed where the format takes one of several.")
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Write a pose model in somebody else's format, exactly or not at all."""
    from launchers import conversion

    found = conversion.export(artifact, format, out, dataset, tracking_uri)
    _tell(found, f"{', '.join(found['files'])} in {out}", as_json)


def _artifact(found: dict[str, Any]) -> str:
    return f"artifact {found['digest'][:12]} in {found['artifact']}: {', '.join(map(str, found['model'].values()))}"


def _tell(found: dict[str, Any], summary: str, as_json: bool) -> None:
    """All of it as JSON; for people the report, line by line, and what came of it."""
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in found["report"]:
        typer.echo(line)
    typer.echo(summary)
