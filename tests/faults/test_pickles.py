"""Files with code in them, in every place where a stage or a user hands over weights: refused, and never run."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import Artifact, read_artifact
from pipeline.checkpoint import ResumePoints, load_buffers, load_tensor_file, load_tensors, verify
from pipeline.distributed import World
from pipeline.errors import ArtifactError, CheckpointError
from pipeline.files import read_json, sha256, write_json
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.loading import load_model, load_token
from pipeline.predictor import Predictor
from stages import module_of
from tests.faults.fixtures import change_json, context, publish_pose, publish_token, republish

pytestmark = pytest.mark.fault(24)

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 0, 1, torch.device("cpu"))


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def header(content: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


FILES: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda canary: pickle.dumps(Evil(canary), protocol=2),
    "pickle of a dictionary": lambda canary: pickle.dumps({"token": Evil(canary)}),
    "torch file": lambda canary: saved({"model": {"a": torch.ones(1)}, "evil": Evil(canary)}),
    "old torch file": lambda canary: saved({"a": Evil(canary)}, _use_new_zipfile_serialization=False),
    "header of exabytes": lambda canary: header(b"{}", length=1 << 62),
    "header beyond the file": lambda canary: header(b"{}", length=1000),
    "header nested without end": lambda canary: header(b"[" * 100_000),
    "header that is no JSON": lambda canary: header(b"x" * 100),
    "tensor beyond the file": lambda canary: header({"a": tensor(0, 1 << 40)}, bytes(16)),
    "tensors that overlap": lambda canary: header({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "one tensor twice": lambda canary: header({"a": tensor(0, 16), "b": tensor(0, 16)}, bytes(16)),
    "a hole between tensors": lambda canary: header({"a": tensor(0, 8), "b": tensor(16, 24)}, bytes(24)),
    "negative place": lambda canary: header({"a": tensor(-16, 16)}, bytes(16)),
    "shape that overflows": lambda canary: header({"a": tensor(0, 16, [1 << 33, 1 << 33])}, bytes(16)),
    "shape that is not the size": lambda canary: header({"a": tensor(0, 16, [5])}, bytes(16)),
    "unknown type": lambda canary: header({"a": tensor(0, 16, dtype="EVIL")}, bytes(16)),
    "bytes after the tensors": lambda canary: header({"a": tensor(0, 16)}, bytes(32)),
    "nothing": lambda canary: b"",
}


def saved(content: Any, **options: Any) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A pose model."""
    return publish_pose(tmp_path_factory.mktemp("sound") / "artifact")


def refused(action: Callable[[], Any], canary: Path, kind: type[Exception]) -> str:
    started = time.process_time()
    with pytest.raises(kind) as caught:
        action()
    took = time.process_time() - started
    assert not canary.exists(), "code was run"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert took < 2, "seconds of this process"
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_weights_of_an_artifact(tmp_path: Path, sound: Artifact, name: str) -> None:
    """Published with digests that hold, as a stranger would: `load_model`, `Predictor` and a token refuse it."""
    canary = tmp_path / "canary"
    content = FILES[name](canary)
    evil = republish(
        sound, tmp_path / "evil", lambda staged: (staged / "model.safetensors").write_bytes(content) and None
    )
    assert "not a safetensors file" in refused(lambda: load_model(evil.path), canary, ArtifactError)
    refused(lambda: Predictor(evil.path), canary, ArtifactError)
    token = publish_token(tmp_path / "token", "d", torch.ones(1, 1, 32))
    token = republish(
        token, tmp_path / "t", lambda staged: (staged / "model.safetensors").write_bytes(content) and None
    )
    assert "not a safetensors file" in refused(lambda: load_token(token, "d", 32), canary, ArtifactError)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_others(tmp_path: Path, name: str, suffix: str) -> None:
    """The `import` stage, from the file's name to the end of its `run`; nothing is published."""
    canary = tmp_path / "canary"
    source = tmp_path / f"weights{suffix}"
    source.write_bytes(FILES[name](canary))
    refused(lambda: read_checkpoint(source), canary, ArtifactError)
    stage = {
        "kind": "import",
        "source": str(source),
        "model": {"backbone": {"size": "micro", "image_size": [32, 32], "patch_size": 8}, "decoder_width": 32},
        "licence": "none",
    }
    found = context(tmp_path, stage)
    assert "refused" in refused(lambda: module_of("import").run(found, found.plan.config), canary, ArtifactError)
    assert not (found.run_dir / "artifact").exists()


def point_with(run_dir: Path, name: str, content: bytes, listed: bool = True) -> Path:
    """A resume point with one file replaced, or added, and a manifest that agrees."""
    points = ResumePoints(run_dir, ALONE)
    points.save(3, {"weight/a": torch.ones(2)}, {"mean": torch.ones(1)}, {"hooks": {}})
    point = run_dir / "resume" / "step-00000003"
    (point / name).write_bytes(content)
    if listed:
        manifest = read_json(point / "manifest.json")
        manifest["files"][name] = {"sha256": sha256(point / name), "size": len(content)}
        write_json(point / "manifest.json", manifest)
    return point


@pytest.mark.parametrize("name", FILES)
def test_a_resume_point_whose_manifest_agrees(tmp_path: Path, name: str) -> None:
    """Weights, moments of the optimizer and buffers: digests that hold make no code run."""
    canary = tmp_path / "canary"
    for file, load in [
        ("weights-00000.safetensors", load_tensors),
        ("buffers-00000.safetensors", lambda point: load_buffers(point, 0, 1)),
    ]:
        point = point_with(tmp_path / file, file, FILES[name](canary))
        assert verify(point) is None
        assert file in refused(lambda point=point, load=load: load(point), canary, CheckpointError)


def test_a_file_that_the_manifest_does_not_name_is_not_loaded(tmp_path: Path) -> None:
    """Another rank's share, slipped in: it would be read with the others."""
    canary = tmp_path / "canary"
    point = point_with(tmp_path, "weights-00001.safetensors", FILES["pickle"](canary), listed=False)
    assert verify(point) == "step-00000003: weights-00001.safetensors is not in its manifest"
    refused(lambda: ResumePoints(tmp_path, ALONE).newest(), canary, CheckpointError)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "sub/x", "..", ""])
def test_a_resume_point_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Its manifest lists the files of its own folder."""
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "x").write_bytes(b"x")
    point = point_with(tmp_path, "weights-00000.safetensors", b"x")
    manifest = read_json(point / "manifest.json")
    manifest["files"][name] = {"sha256": sha256(tmp_path / "resume" / "x"), "size": 1}
    write_json(point / "manifest.json", manifest)
    assert verify(point) is not None and ("elsewhere" in verify(point) or name == "..")


def test_the_evil_files_are_evil(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    for name in ("pickle", "pickle of a dictionary"):
        canary = tmp_path / name.replace(" ", "-")
        pickle.loads(FILES[name](canary))  # noqa: S301 - the proof
        assert canary.exists()
    for name in ("torch file", "old torch file"):
        canary, path = tmp_path / name.replace(" ", "-"), tmp_path / "x.pth"
        path.write_bytes(FILES[name](canary))
        torch.load(path, weights_only=False)
        assert canary.exists()
    (tmp_path / "fine").write_bytes(header({"a": tensor(0, 16)}, bytes(16)))
    assert load_tensor_file(tmp_path / "fine")["a"].tolist() == [0, 0, 0, 0]


NAMES = ["../x", "sub/../../x", "/etc/hostname", "a\0b", "x" * 5000, "pictures/../model.json", "..", "sub/"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_files_of_its_own_folder(tmp_path: Path, sound: Artifact, name: str) -> None:
    """No way up, no other place, no name that can't be; whatever its digest says."""
    from pipeline.artifacts import FileRecord, payload_digest

    artifact = republish(sound, tmp_path / "a", lambda staged: None)
    (tmp_path / "x").write_bytes(b"outside")
    manifest = read_json(artifact.path / "manifest.json")
    manifest["files"][name] = {"sha256": sha256(tmp_path / "x"), "size": 7}
    files = {key: FileRecord.model_validate(record) for key, record in manifest["files"].items()}
    write_json(artifact.path / "manifest.json", {**manifest, "digest": payload_digest(files)})
    refused(lambda: read_artifact(artifact.path), tmp_path / "canary", ArtifactError)


@pytest.mark.parametrize(
    "change",
    [
        {"codec": {"input_size": ["../x", 1]}},
        {"config": "../../etc/passwd"},
        {"datasets": {"../x": 1}},
        {"datasets": {}},
        {"weights": "../evil.pth"},
        {"model": "../x"},
        {"model": {"__reduce__": "os.system"}},
    ],
)
def test_a_model_description_names_no_files(tmp_path: Path, sound: Artifact, change: dict[str, Any]) -> None:
    """It has no paths at all; what looks like one is a mistake of its form."""
    evil = republish(sound, tmp_path / "a", lambda staged: change_json(staged / "model.json", **change))
    assert refused(lambda: load_model(evil.path), tmp_path / "canary", ArtifactError)


def test_the_command_line_refuses_an_evil_artifact_with_one_line(tmp_path: Path, sound: Artifact) -> None:
    """`vitruvian predict` on a stranger's model: exit code 2, one line, nothing run and nothing written."""
    canary = tmp_path / "canary"
    content = FILES["torch file"](canary)
    republish(sound, tmp_path / "evil", lambda staged: (staged / "model.safetensors").write_bytes(content) and None)
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli", "predict", "evil", "photo.jpg"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2 and not canary.exists(), done.stderr
    [line] = done.stderr.splitlines()
    assert "model.safetensors: not a safetensors file" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil"]
