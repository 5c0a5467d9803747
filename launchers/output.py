"""The folder that a command makes at `--out`: not there before, whole or absent afterwards."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, Parent, publish
from pipeline.errors import ConfigError
from pipeline.files import digest_of, require_writable, write_text


def require_new(out: Path) -> None:
    """Refuses a place that holds something, and one that can't be written to, before any work is done.

    Raises ConfigError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already; choose another folder or remove this one")
    require_writable(out.absolute().parent)


def publish_artifact(
    out: Path,
    fill: Callable[[Path], None],
    card: str,
    *,
    pipeline: str,
    stage: str,
    kind: str,
    config: dict[str, Any],
    licences: Sequence[str],
    parents: dict[str, Parent] | None = None,
) -> Artifact:
    """An artifact that no stage made: what `fill` writes into a folder, the card, and the licences below it.

    Its fingerprint is of the config and the parents' content.
    """
    parents = parents or {}
    listed = "".join(f"- {licence}\n" for licence in licences)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        staged = Path(folder) / "artifact"
        staged.mkdir()
        fill(staged)
        write_text(staged / "card.md", f"{card}\n\n## Licences\n\n{listed}")
        return publish(
            staged,
            out,
            pipeline=pipeline,
            stage=stage,
            kind=kind,
            fingerprint=digest_of({**config, **{role: parent.digest for role, parent in parents.items()}}),
            config=config,
            parents=parents,
            metrics={},
            licences=list(licences),
        )
