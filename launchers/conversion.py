"""What `vitruvian convert` and `vitruvian export` do."""

import re
import tempfile
from pathlib import Path
from typing import Any

from launchers.artifact_source import local_artifact
from pipeline.artifacts import publish, read_artifact
from pipeline.errors import ConfigError
from pipeline.files import digest_of, require_writable, staging, write_text
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Wanted
from pipeline.models.formats.registry import READERS, WRITERS, read_source
from pipeline.models.loading import MAESpec, load_pose, save_model, summary
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
    _require_new(out)
    wanted = Wanted(datasets=tuple(datasets), input_size=_size(input_size), heads=heads)
    imported, digest = read_source(source, format, wanted, sha256)
    if datasets and isinstance(imported.spec, MAESpec):
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
    about = imported.about(source, digest)
    with tempfile.TemporaryDirectory(dir=_parent(out), prefix=f".{out.name}.") as folder:
        staged = Path(folder) / out.name
        staged.mkdir()
        save_model(staged, imported.spec, imported.tensors)
        lines = [
            f"# {out.name}",
            "",
            f"Converted from {format}.",
            "",
            *(f"- {key}: {value}" for key, value in about.items()),
        ]
        write_text(staged / "card.md", "\n".join([*lines, "", "## Licences", "", f"- {section['licence']}", ""]))
        artifact = publish(
            staged,
            out,
            pipeline="convert",
            stage=out.name,
            kind="import",
            fingerprint=digest_of(section),
            config=section,
            parents={},
            metrics={},
            licences=[section["licence"]],
        )
    return {
        "artifact": str(out),
        "digest": artifact.digest,
        "sha256": digest,
        "model": summary(imported.spec),
        "report": imported.report(),
    }


def export(artifact: str, format: str, out: Path, dataset: str | None, tracking_uri: str | None) -> dict[str, Any]:
    """A pose model in somebody else's format, as files in `out`. Returns what happened."""
    _require_known("--to", format, list(WRITERS))
    _require_new(out)
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


def _require_new(out: Path) -> None:
    """Refuses a place that holds something, and one that can't be written to, before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already; choose another folder or remove this one")
    require_writable(_parent(out))


def _parent(out: Path) -> Path:
    return out.absolute().parent


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--input: expected height x width in pixels, such as 256x192, found {text!r}")
    return int(match.group(1)), int(match.group(2))
