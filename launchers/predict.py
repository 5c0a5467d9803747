"""What `vitruvian predict` does: files in, `keypoints.json` and pictures out."""

import tempfile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launchers.artifact_source import local_artifact
from pipeline.data.images import decode_image, read_bytes
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.pictures import draw_skeleton, save_jpg
from pipeline.files import read_json, require_writable, write_json
from pipeline.predictor import Predictor


def predict_files(
    artifact: str,
    images: list[Path],
    boxes: Path | None,
    dataset: str | None,
    out: Path,
    tracking_uri: str | None,
    flip: bool,
) -> dict[str, Any]:
    """Predicts on every image and writes the results. Returns the content of `keypoints.json`."""
    with tempfile.TemporaryDirectory() as folder:
        predictor = Predictor(local_artifact(artifact, tracking_uri, Path(folder)), dataset, flip=flip)
    stems = [path.stem for path in images]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ConfigError(f"two images are called {twice!r}: their pictures would overwrite each other")
    given = _read_boxes(boxes) if boxes else None
    require_writable(out)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in images:
        image = decode_image(read_bytes(str(path)), where=str(path))
        whole = [[0.0, 0.0, float(image.shape[1]), float(image.shape[0])]]
        people = given.get(path.name, []) if given is not None else whole
        keypoints = predictor(image, people)
        drawn = image
        for person in keypoints:
            drawn = draw_skeleton(drawn, person, predictor.definition)
        save_jpg(drawn, out / f"{path.stem}-keypoints.jpg")
        found[path.name] = [
            {"bbox": list(map(float, box)), "keypoints": person.round(3).tolist(), "score": float(person[:, 2].mean())}
            for box, person in zip(people, keypoints, strict=True)
        ]
    content = {
        "dataset": predictor.definition.name,
        "keypoint_names": list(predictor.definition.keypoints),
        "images": found,
    }
    write_json(out / "keypoints.json", content)
    return content


def _read_boxes(path: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}") from None
    try:
        return TypeAdapter(dict[str, list[tuple[float, float, float, float]]]).validate_python(content)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        wanted = "a mapping from image file names to lists of [x, y, width, height]"
        raise DataError(f"{path}: {place or 'top'}: expected {wanted}") from None
