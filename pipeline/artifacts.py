"""What a finished stage publishes: files under a manifest, immutable, named by the digest of their content.

```
<run directory>/artifact/
    manifest.json        written last; without it the folder is not an artifact
    model.safetensors    weights, for stages that train
    model.json           how to build the model that they fit
    metrics.json         what was measured
    card.md              for people
    pictures/            for people
```
Only the payload (everything but metrics, card and pictures) enters the digest, so that two runs which computed the same
thing publish the same digest.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ArtifactError
from pipeline.files import digest_of, publish_folder, read_json, sha256, write_json
from pipeline.strict import Strict

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_FOR_PEOPLE = ("metrics.json", "card.md", "pictures/")


class FileRecord(Strict):
    """One file of an artifact."""

    sha256: str
    size: int


class Parent(Strict):
    """An artifact that this one was made from."""

    stage: str
    digest: str
    fingerprint: str | None = None
    mlflow_run: str | None = None


class Manifest(Strict):
    """The contract of an artifact; see the module docstring."""

    schema_version: int = SCHEMA_VERSION
    pipeline: str
    stage: str
    kind: str
    fingerprint: str
    digest: str
    files: dict[str, FileRecord]
    config: dict[str, Any]
    parents: dict[str, Parent]
    metrics: dict[str, float]
    licences: list[str]
    environment: dict[str, str]
    created: str
    mlflow_run: str | None = None


@dataclass(frozen=True)
class Artifact:
    """An artifact on a local path."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Of the payload."""
        return self.manifest.digest

    def file(self, name: str) -> Path:
        """The path of one of its files, after its digest was checked. Raises ArtifactError."""
        record = self.manifest.files.get(name)
        if record is None:
            has = ", ".join(sorted(self.manifest.files)[:8])
            raise ArtifactError(
                f"{self.path}: an artifact of kind {self.manifest.kind!r} without {name!r}; it has {has}"
            )
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing although the manifest names it; restore it or run the stage with --fresh"
            )
        if path.stat().st_size != record.size or sha256(path) != record.sha256:
            raise ArtifactError(
                f"{path}: does not match the manifest's digest; restore it or run the stage with --fresh"
            )
        return path

    def verify(self) -> None:
        """Checks the digest of every file. Raises ArtifactError."""
        for name in self.manifest.files:
            self.file(name)


def publish(staged: Path, final: Path, **fields: Any) -> Artifact:
    """Turns a folder of finished files into the artifact at `final`, in one rename.

    `fields` are the manifest's, without `digest` and `files`, which are computed here. Every file is made durable
    before the rename.
    """
    files = {
        str(path.relative_to(staged)): FileRecord(sha256=sha256(path), size=path.stat().st_size)
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        digest=payload_digest(files),
        files=files,
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    )
    write_json(staged / MANIFEST, manifest.model_dump())
    publish_folder(staged, final)
    return Artifact(final, manifest)


def payload_digest(files: Mapping[str, FileRecord]) -> str:
    """The digest that names an artifact: of its payload's names and digests."""
    return digest_of({name: record.sha256 for name, record in files.items() if not name.startswith(_FOR_PEOPLE)})


def read_artifact(path: Path) -> Artifact:
    """Opens the artifact in a folder, checking its manifest and the presence and size of its files.

    Digests are checked by `Artifact.file`, when a file is used. Raises ArtifactError.
    """
    where = path / MANIFEST
    if not where.is_file():
        raise ArtifactError(f"{path}: no artifact here ({MANIFEST} is missing)")
    try:
        raw = read_json(where)
        if raw.get("schema_version", 0) > SCHEMA_VERSION:
            raise ArtifactError(
                f"{where}: schema version {raw['schema_version']} is newer than this program's; update it"
            )
        if raw["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {raw['schema_version']!r}, expected {SCHEMA_VERSION}")
        manifest = Manifest.model_validate(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ArtifactError(f"{where}: not a manifest: {' '.join(str(error).split())[:200]}") from None
    if manifest.digest != payload_digest(manifest.files):
        raise ArtifactError(
            f"{where}: its digest does not match its list of files; restore it or run the stage with --fresh"
        )
    for name, record in manifest.files.items():
        file = path / name
        try:
            inside = file.resolve().is_relative_to(path.resolve()) and ".." not in name.split("/")
            whole = inside and file.is_file() and file.stat().st_size == record.size
        except (OSError, ValueError):  # a name that no file can have
            raise ArtifactError(f"{where}: names a file that can't be: {name[:60]!r}") from None
        if not inside:
            raise ArtifactError(f"{where}: names a file outside the artifact: {name!r}")
        if not whole:
            raise ArtifactError(f"{file}: missing or of another size than the manifest says; restore it or use --fresh")
    return Artifact(path, manifest)


def environment() -> dict[str, str]:
    """What produced an artifact: versions, machine, commit."""
    found = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "argv": without_passwords(" ".join(sys.argv)),
    }
    packages = ("torch", "deepspeed", "timm", "numpy", "opencv-python-headless", "pycocotools", "mlflow", "vitruvian")
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = git_commit()
    return found | ({"git": commit} if commit else {})


def without_passwords(text: str) -> str:
    """Text with the credentials of its URLs left out, for logs and records."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit that the code lies at, `-dirty` appended where it was changed; None outside a checkout.

    An installed package may lie below another repository, which does not track its files: that one's commit says nothing.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=file.parent, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
