"""What `vitruvian split` does: a pose model's artifact in, the artifact of one of its datasets' plain model out."""

import tempfile
from pathlib import Path

import torch

from pipeline.artifacts import Artifact, Parent, publish, read_artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import digest_of, require_writable, write_json, write_text
from pipeline.models.loading import PoseSpec, read_spec, read_tensors, require_fit, save_model
from pipeline.models.pose import PoseModel
from pipeline.models.splitting import split


def split_artifact(source: Path, dataset: str, out: Path) -> Artifact:
    """Publishes the artifact at `out`, which must not exist yet. Raises ConfigError and ArtifactError."""
    artifact = read_artifact(source)
    whole = read_spec(artifact)
    if not isinstance(whole, PoseSpec):
        raise ArtifactError(f"{source}: holds a model of type {whole.model!r}, expected a pose model")
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give another folder")
    require_writable(out.absolute().parent)
    spec, tensors = split(whole, read_tensors(artifact), dataset)
    with torch.device("meta"):
        require_fit(PoseModel(spec.config, spec.keypoints), tensors, str(source))
    manifest = artifact.manifest
    wanted = {"kind": "split", "dataset": dataset}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        staged = Path(folder) / "artifact"
        staged.mkdir()
        save_model(staged, spec, tensors)
        write_json(staged / "metrics.json", {})
        write_text(staged / "card.md", _card(artifact, dataset))
        return publish(
            staged,
            out,
            pipeline=manifest.pipeline,
            stage=manifest.stage,
            kind="split",
            fingerprint=digest_of({**wanted, "model": artifact.digest}),
            config=wanted,
            parents={"model": Parent(stage=manifest.stage, digest=artifact.digest, fingerprint=manifest.fingerprint)},
            metrics={},
            licences=manifest.licences,
        )


def _card(source: Artifact, dataset: str) -> str:
    licences = "".join(f"- {licence}\n" for licence in source.manifest.licences)
    return (
        f"# {source.manifest.pipeline} / {source.manifest.stage}, {dataset} alone\n\n"
        f"The plain model that computes what `{source.digest[:12]}` does for `{dataset}`; the shared weights saw all of "
        f"its datasets.\n\n## Licences of the data\n\n{licences}"
    )
