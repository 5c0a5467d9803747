"""What `vitruvian convert`, `vitruvian split` and `vitruvian export` do."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from launchers.artifact_source import local_artifact
from launchers.output import publish_artifact, require_new
from pipeline.artifacts import Parent, read_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import staging
from pipeline.models import splitting
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Wanted
from pipeline.models.formats.registry import READERS, WRITERS, read_source
from pipeline.models.loading import (
    PoseSpec,
    load_pose,
    read_spec,
    read_tensors,
    require_fit,
    save_model,
    summary,
)
from pipeline.models.pose import PoseModel
from stages.importing import Config


def convert(
    source: str,
    format: str,
    out: Path,
    datasets: list[str],
    input_size: str | None,
    heads: int | None,
    licence: str | None,
    sha256: str | None,
) -> dict[str, Any]:
    """Others' weights as an artifact in `out`, as the stage kind `import` makes it. Returns what happened."""
    _require_known("--from", format, list(READERS))
    if "://" in source and sha256 is None:
        raise ConfigError("--sha256: a URL needs the sha256 of what lies there")
    require_new(out)
    wanted = Wanted(datasets=tuple(datasets), input_size=_size(input_size), heads=heads)
    imported, digest = read_source(source, format, wanted, sha256)
    if datasets and not isinstance(imported.spec, PoseSpec):
        raise ConfigError(f"--dataset: {source} holds an encoder, which has no decoders; leave it out")
    described = imported.spec.config.model_dump(mode="json")
    section = Config.model_validate(
        {
            "kind": "import",
            "source": source,
            "sha256": digest,
            "format": format,
            "datasets": datasets,
            "model": described,
            "licence": licence or "not stated",
        }
    ).model_dump(mode="json")
    about = "".join(f"- {key}: {value}\n" for key, value in imported.about(source, digest).items())
    artifact = publish_artifact(
        out,
        lambda staged: save_model(staged, imported.spec, imported.tensors),
        f"# {out.name}\n\nConverted from {format}.\n\n{about}".rstrip(),
        pipeline="convert",
        stage=out.name,
        kind="import",
        config=section,
        licences=[section["licence"]],
    )
    return {
        "artifact": str(out),
        "digest": artifact.digest,
        "sha256": digest,
        "model": summary(imported.spec),
        "report": imported.report(),
    }


def split(artifact: str, dataset: str, out: Path, tracking_uri: str | None) -> dict[str, Any]:
    """One dataset's plain model out of a pose model of several, as an artifact in `out`. Returns what happened.

    Raises ConfigError and ArtifactError.
    """
    require_new(out)
    with tempfile.TemporaryDirectory() as folder:
        source = read_artifact(local_artifact(artifact, tracking_uri, Path(folder)))
        whole = read_spec(source)
        if not isinstance(whole, PoseSpec):
            raise ArtifactError(f"{artifact}: holds a model of type {whole.model!r}, expected a pose model")
        spec, tensors = splitting.split(whole, read_tensors(source), dataset, artifact)
    with torch.device("meta"):
        require_fit(PoseModel(spec.config, spec.keypoints), tensors, artifact)
    manifest = source.manifest
    made = publish_artifact(
        out,
        lambda staged: save_model(staged, spec, tensors),
        f"# {manifest.pipeline} / {manifest.stage}, {dataset} alone\n\n"
        f"The plain model that computes what `{source.digest[:12]}` does for `{dataset}`; the shared weights saw all of its "
        "datasets.",
        pipeline=manifest.pipeline,
        stage=manifest.stage,
        kind="split",
        config={"kind": "split", "dataset": dataset},
        licences=manifest.licences,
        parents={"model": Parent(stage=manifest.stage, digest=source.digest, fingerprint=manifest.fingerprint)},
    )
    return {"artifact": str(out), "digest": made.digest, "model": summary(spec), "report": []}


def export(artifact: str, format: str, out: Path, dataset: str | None, tracking_uri: str | None) -> dict[str, Any]:
    """A pose model in somebody else's format, as files in `out`. Returns what happened."""
    _require_known("--to", format, list(WRITERS))
    require_new(out)
    with tempfile.TemporaryDirectory() as folder:
        model, spec = load_pose(read_artifact(local_artifact(artifact, tracking_uri, Path(folder))))
    outgoing = Outgoing(spec, model.state_dict(), Path(artifact).name, dataset)
    with staging(out) as staged:
        report = WRITERS[format](outgoing, staged)
        files = sorted(path.name for path in staged.iterdir())
    return {"folder": str(out), "files": files, "report": report}


def _require_known(option: str, format: str, known: list[str]) -> None:
    if format not in known:
        raise ConfigError(f"{option}: no format {format!r}; one of {', '.join(known)}")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--input: expected height x width in pixels, such as 256x192, found {text!r}")
    return int(match.group(1)), int(match.group(2))
