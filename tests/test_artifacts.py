"""Artifacts: what is published is what is read, and anything else is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph
from pipeline.artifacts import MANIFEST, Artifact, payload_digest, publish, read_artifact
from pipeline.errors import ArtifactError
from pipeline.files import digest_of, read_json, sha256, write_json

FIELDS: dict[str, Any] = {
    "pipeline": "trial",
    "stage": "mae",
    "kind": "mae",
    "fingerprint": "f" * 64,
    "config": {"kind": "mae"},
    "parents": {"shards": {"stage": "shards", "digest": "d" * 64}},
    "metrics": {"loss": 0.5},
    "licences": ["CC0-1.0"],
}


def publish_files(final: Path, files: dict[str, bytes], **changes: Any) -> Artifact:
    staged = final.with_name("." + final.name)
    for name, content in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(content)
    return publish(staged, final, **{**FIELDS, **changes})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return publish_files(tmp_path / "artifact", {"model.safetensors": b"weights", "sub/model.json": b"{}"})


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = read_json(path / MANIFEST)
    change(manifest)
    write_json(path / MANIFEST, manifest)


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_published_is_read_back(artifact: Artifact) -> None:
    read = read_artifact(artifact.path)
    assert read == artifact
    assert read.manifest.parents["shards"].digest == "d" * 64
    assert read.manifest.environment["python"]
    assert read.file("sub/model.json").read_bytes() == b"{}"
    read.verify()
    assert not artifact.path.with_name(".artifact").exists()


def test_the_digest_is_that_of_names_and_contents(artifact: Artifact) -> None:
    digests = {name: sha256(artifact.path / name) for name in ("model.safetensors", "sub/model.json")}
    assert artifact.digest == digest_of(digests)


def test_the_digest_ignores_what_is_for_people_and_how_it_came_about(tmp_path: Path) -> None:
    plain = publish_files(tmp_path / "a", {"model": b"1"})
    dressed = publish_files(
        tmp_path / "b",
        {"model": b"1", "metrics.json": b"{}", "card.md": b"#", "pictures/a.jpg": b"x"},
        metrics={"loss": 0.25},
        fingerprint="e" * 64,
    )
    assert plain.digest == dressed.digest
    assert set(dressed.manifest.files) == {"model", "metrics.json", "card.md", "pictures/a.jpg"}
    assert publish_files(tmp_path / "c", {"model": b"2"}).digest != plain.digest
    assert publish_files(tmp_path / "d", {"renamed": b"1"}).digest != plain.digest


def test_a_changed_byte_is_found_when_the_file_is_used(artifact: Artifact) -> None:
    (artifact.path / "model.safetensors").write_bytes(b"Weights")
    read = read_artifact(artifact.path)
    assert read.file("sub/model.json").is_file()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not match the manifest's digest"):
        read.file("model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        read.verify()


def test_a_missing_or_cut_file_is_named(artifact: Artifact) -> None:
    (artifact.path / "model.safetensors").write_bytes(b"weight")
    assert "model.safetensors: missing or of another size" in refused(artifact.path)
    (artifact.path / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(artifact.path)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing although the manifest names it"):
        artifact.file("model.safetensors")


def test_a_file_that_the_artifact_never_had_is_refused(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"without 'other'; it has model\.safetensors, sub/model\.json"):
        artifact.file("other")


def test_a_manifest_whose_list_was_changed_is_refused(artifact: Artifact) -> None:
    rewrite(artifact.path, lambda manifest: manifest["files"]["model.safetensors"].update(sha256="0" * 64))
    assert "digest does not match its list of files" in refused(artifact.path)


@pytest.mark.fault(31)
def test_a_newer_schema_is_refused(artifact: Artifact) -> None:
    rewrite(artifact.path, lambda manifest: manifest.update(schema_version=2, something_new=1))
    assert "schema version 2 is newer" in refused(artifact.path)


@pytest.mark.fault(24)
@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/../../x"])
def test_a_path_that_escapes_the_folder_is_refused(tmp_path: Path, artifact: Artifact, name: str) -> None:
    (tmp_path / "x").write_bytes(b"outside")

    def escape(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"sha256": sha256(tmp_path / "x"), "size": 7}
        digests = {key: record["sha256"] for key, record in manifest["files"].items()}
        manifest["digest"] = digest_of(digests)

    rewrite(artifact.path, escape)
    assert f"names a file outside the artifact: {name!r}" in refused(artifact.path)


@pytest.mark.fault(24)
def test_a_link_that_leads_outside_is_refused(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "x").write_bytes(b"weights")
    (artifact.path / "model.safetensors").unlink()
    (artifact.path / "model.safetensors").symlink_to(tmp_path / "x")
    assert "outside the artifact" in refused(artifact.path)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"schema_version": "two"}', '{"schema_version": null}', "\xff"]
)
def test_anything_but_a_manifest_is_refused(artifact: Artifact, text: str) -> None:
    (artifact.path / MANIFEST).write_text(text, encoding="latin-1")
    assert "not a manifest" in refused(artifact.path)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    assert "no artifact here" in refused(tmp_path)


def test_nothing_half_written_is_taken_for_finished(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / ".artifact").mkdir(parents=True)
    (run_dir / ".artifact" / "model.safetensors").write_bytes(b"weights")
    assert graph._state(run_dir)[0] == "start"
    publish(run_dir / ".artifact", run_dir / "elsewhere", **FIELDS)
    (run_dir / "elsewhere").rename(run_dir / ".artifact")  # killed after the manifest, before the rename
    assert graph._state(run_dir)[0] == "start"
    (run_dir / ".artifact").rename(run_dir / "artifact")
    assert graph._state(run_dir)[0] == "done"


def test_publishing_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    publish_files(tmp_path / "a", {"old": b"1"})
    publish_files(tmp_path / "a", {"new": b"2"})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MANIFEST, "new"]


def test_the_payload_digest_of_nothing_is_that_of_an_empty_mapping() -> None:
    assert payload_digest({}) == digest_of({})
