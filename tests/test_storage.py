"""Storage: a remote folder is whole or absent, nothing of it is trusted, and a run goes on from it."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from launchers import storage as launchers_storage
from launchers.storage import fetch_stored, take_over
from pipeline import graph
from pipeline.artifacts import publish, read_artifact
from pipeline.checkpoint import ResumePoints, load_state
from pipeline.config import PipelineConfig, StorageConfig
from pipeline.config_file import load_pipeline
from pipeline.distributed import World
from pipeline.errors import ArtifactError, CheckpointError, ConfigError, StorageError
from pipeline.files import read_json, write_json
from pipeline.graph import StagePlan, resume_points
from pipeline.run_storage import RunStorage
from pipeline.storage import MANIFEST, DamagedError, Store
from stages import KINDS

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remote.time.sleep", lambda seconds: None)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """The folder behind the URL, to look at and to damage."""
    return tmp_path / "bucket"


@pytest.fixture
def store(remote: Path) -> Store:
    return Store(f"file://{remote}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "folder")


def filled(folder: Path, text: str = "text") -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fails(monkeypatch: pytest.MonkeyPatch, method: str, when: Callable[..., bool], error: Exception) -> list[Any]:
    """Lets a method of the backend fail; gives the list of its calls."""
    real, calls = getattr(LocalFileSystem, method), []

    def failing(self: Any, *given: Any, **options: Any) -> Any:
        calls.append(given)
        if when(*given):
            raise error
        return real(self, *given, **options)

    monkeypatch.setattr(LocalFileSystem, method, failing)
    return calls


# Folders


def test_a_folder_comes_back_as_it_was(store: Store, folder: Path, tmp_path: Path) -> None:
    assert not store.download("x/y", tmp_path / "back")
    store.upload(folder, "x/y", {})
    assert store.download("x/y", tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    assert store.folders("x") == {"y": True} and store.folders("nowhere") == {}


def test_it_comes_back_from_a_store_without_folders_too(folder: Path, tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}/runs")
    assert store.folders("") == {} and store.manifest("x") is None
    store.upload(folder, "x", {})
    store.move("x", "x.old-1")
    assert store.folders("") == {"x.old-1": True}
    assert store.download("x.old-1", tmp_path / "back") and content(tmp_path / "back") == content(folder)
    store.remove("x.old-1")
    assert store.folders("") == {}


def test_the_manifest_comes_last_and_goes_first(
    store: Store, folder: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    for method, place in (("put_file", 1), ("pipe_file", 0)):
        real = getattr(LocalFileSystem, method)

        def noting(self: Any, *given: Any, real: Any = real, place: int = place, **options: Any) -> Any:
            written.append(Path(given[place]).name)
            return real(self, *given, **options)

        monkeypatch.setattr(LocalFileSystem, method, noting)
    store.upload(folder, "x", {})
    assert written[-1] == MANIFEST and sorted(written[1:-1]) == ["a.txt", "b.bin"]
    removed = fails(monkeypatch, "rm", lambda path, **_: not path.endswith(MANIFEST), OSError("cut off"))
    with pytest.raises(StorageError, match="cut off"):
        store.remove("x")
    assert removed[0][0].endswith(f"x/{MANIFEST}")
    assert (remote / "x" / "a.txt").exists() and store.manifest("x") is None


def test_an_upload_that_was_cut_off_is_ignored_and_goes_on_where_it_was(
    store: Store, folder: Path, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails(patch, "put_file", lambda source, target, **_: source.endswith("b.bin"), OSError("reset"))
        with pytest.raises(StorageError, match=r"x/deep/b\.bin: reset"):
            store.upload(folder, "x", {})
    assert (remote / "x" / "a.txt").exists()
    assert store.manifest("x") is None and not store.download("x", tmp_path / "back")
    assert store.folders("") == {"x": False}
    sent = fails(monkeypatch, "put_file", lambda *_: False, OSError())
    store.upload(folder, "x", {})
    assert [Path(source).name for source, _ in sent] == ["b.bin"]
    store.upload(folder, "x", {})
    assert len(sent) == 1, "what is there is not sent again"
    assert store.download("x", tmp_path / "back") and content(tmp_path / "back") == content(folder)


def test_files_of_another_upload_are_not_taken_for_this_one(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails(patch, "put_file", lambda source, target, **_: source.endswith("b.bin"), OSError("reset"))
        with pytest.raises(StorageError):
            store.upload(folder, "x", {})
    other = filled(tmp_path / "other", "TEXT")  # of the same size
    store.upload(other, "x", {})
    assert store.download("x", tmp_path / "back") and content(tmp_path / "back") == content(other)


def test_a_passing_failure_is_tried_again_and_a_refusal_is_not(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outage = iter([True, True])
    with monkeypatch.context() as patch:
        fails(patch, "put_file", lambda *_: next(outage, False), OSError("reset by peer"))
        store.upload(folder, "x", {})
    assert store.manifest("x") is not None and "reset by peer; trying again" in caplog.text
    asked = fails(monkeypatch, "put_file", lambda *_: True, PermissionError("no"))
    with pytest.raises(StorageError, match="no"):
        store.upload(folder, "y", {})
    assert len(asked) <= 2, "each file once"


def test_a_file_that_arrived_short_is_not_published(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalFileSystem.put_file

    def short(self: Any, source: str, target: str, **options: Any) -> None:
        real(self, source, target, **options)
        if target.endswith("b.bin"):
            Path(target).write_bytes(b"half")

    monkeypatch.setattr(LocalFileSystem, "put_file", short)
    with pytest.raises(StorageError, match="4 bytes arrived of 256"):
        store.upload(folder, "x", {})
    assert store.manifest("x") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "empty manifest"])
def test_a_damaged_remote_folder_is_never_used(
    store: Store, folder: Path, remote: Path, tmp_path: Path, damage: str
) -> None:
    store.upload(folder, "x", {})
    file, manifest = remote / "x" / "deep" / "b.bin", remote / "x" / MANIFEST
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        manifest.write_text("[]" if damage == "manifest" else "")
    with pytest.raises(DamagedError, match=r"b\.bin|not a manifest"):
        store.download("x", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "folder"], "nothing is left of it"
    store.remove("x")
    store.upload(folder, "x", {})
    assert store.download("x", tmp_path / "back")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "deep/../../evil", "..\\evil", "./a.txt", "", ".", "a\0b"])
def test_a_manifest_that_names_a_file_outside_is_refused(
    store: Store, folder: Path, remote: Path, tmp_path: Path, name: str
) -> None:
    store.upload(folder, "x", {})
    manifest = json.loads((remote / "x" / MANIFEST).read_text())
    manifest["files"] = {name: manifest["files"]["a.txt"]}
    (remote / "x" / MANIFEST).write_text(json.dumps(manifest))
    (remote / "evil").write_text("text")
    before = content(tmp_path)
    with pytest.raises(DamagedError, match="names a file outside"):
        store.download("x", tmp_path / "inner" / "back")
    assert content(tmp_path) == before


def test_a_newer_schema_is_refused(store: Store, folder: Path, remote: Path, tmp_path: Path) -> None:
    store.upload(folder, "x", {})
    manifest = json.loads((remote / "x" / MANIFEST).read_text())
    (remote / "x" / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 2}))
    with pytest.raises(StorageError, match="newer version"):
        store.download("x", tmp_path / "back")


def test_what_can_not_be_a_storage_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        Store("nosuch://bucket")
    with pytest.raises(ConfigError, match=r"storage\.url: .*expected a URL such as"):
        load_pipeline("demo", ["storage.url=/a/folder"], KINDS)
    with pytest.raises(ConfigError, match=r"storage\.url: .*environment variables"):
        load_pipeline("demo", ["storage.url=sftp://me:secret@host/x"], KINDS)
    assert StorageConfig(url="abfs://box@account.example/x/").url == "abfs://box@account.example/x"


# Runs


@pytest.fixture
def machine(tmp_path: Path, remote: Path) -> Callable[..., tuple[PipelineConfig, StagePlan]]:
    """A machine: a workspace with the shards; machines share the storage and nothing else."""
    shards = tmp_path / "shards"
    publish_at(shards, "shards")

    def make(name: str, *overrides: str) -> tuple[PipelineConfig, StagePlan]:
        where = [f"workspace={tmp_path / name}", f"storage.url=file://{remote}", f"stages.mae.inputs.shards={shards}"]
        pipeline = load_pipeline("demo", [*where, "tracking.uri=null", *overrides], KINDS)
        stage = graph.plan(pipeline, ["mae"])["mae"]
        if stage.state != "done":
            graph.record_identity(stage)
        return pipeline, stage

    return make


def publish_at(final: Path, kind: str, fingerprint: str = "f" * 64, weights: bytes = b"weights") -> None:
    staged = final.with_name(f".{final.name}")
    (staged / "pictures").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(weights)
    (staged / "pictures" / "a.jpg").write_bytes(b"picture")
    fields: dict[str, Any] = {"config": {}, "parents": {}, "metrics": {}, "licences": []}
    publish(staged, final, pipeline="demo", stage=kind, kind=kind, fingerprint=fingerprint, **fields)


def save(storage: RunStorage | None, run_dir: Path, *steps: int) -> None:
    """Saves resume points and waits for each upload."""
    points = ResumePoints(run_dir, ALONE, storage)
    for step in steps:
        (run_dir / "metrics.jsonl").write_text(f"until {step}\n")
        points.save(step, {"w": torch.full((4,), float(step))}, {"mean": torch.zeros(2)}, {"hooks": {}})
        if storage is not None:
            storage.stop()


def of(pipeline: PipelineConfig, stage: StagePlan) -> RunStorage:
    found = RunStorage.of(pipeline, stage)
    assert found is not None
    return found


def steps(run_dir: Path) -> list[str]:
    return [path.name.removeprefix("step-0000") for path in resume_points(run_dir)]


def test_the_storage_is_not_in_the_fingerprint(machine: Any) -> None:
    _, here = machine("a")
    _, there = machine("a", "storage.url=null", "storage.cache_gb=2")
    assert here.fingerprint == there.fingerprint
    assert RunStorage.of(*machine("a", "storage.url=null")) is None


def test_points_are_copied_two_are_kept_and_leftovers_go(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    storage = of(pipeline, stage)
    save(storage, stage.run_dir, 5, 10)
    folder = remote / "demo" / "mae" / stage.run_dir.name / "resume"
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "state.json").write_text("cut off")
    shutil.copytree(folder / "step-00000010", folder / "step-00000020")  # as after falling back from step 20
    save(storage, stage.run_dir, 15)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000015"]
    assert content(folder / "step-00000015").keys() == {
        *("buffers-00000.safetensors", "weights-00000.safetensors", "state.json", "manifest.json", MANIFEST),
        "run/metrics.jsonl",
    }
    assert not list((stage.run_dir / ".sent").iterdir())


def test_another_machine_goes_on_from_the_newest(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5, 10)
    pipeline, elsewhere = machine("b")
    taken = take_over(pipeline, elsewhere, of(pipeline, elsewhere))
    assert taken.state == "resume" and "resume point of step 10, fetched from file://" in taken.reason
    assert "fetched the resume point of step 10" in caplog.text
    point = ResumePoints(elsewhere.run_dir, ALONE).newest()
    assert point is not None and load_state(point)["step"] == 10
    assert content(point) == content(stage.run_dir / "resume" / "step-00000010")
    assert (elsewhere.run_dir / "metrics.jsonl").read_text() == "until 10\n"
    assert not (elsewhere.run_dir / ".fetched").exists()


def test_a_machine_that_is_further_on_stays_there(machine: Any) -> None:
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5)
    save(None, stage.run_dir, 10)
    assert take_over(pipeline, stage, of(pipeline, stage)) is stage
    assert steps(stage.run_dir) == ["0005", "0010"]
    assert (stage.run_dir / "metrics.jsonl").read_text() == "until 10\n"


def test_a_damaged_remote_point_falls_back_loudly(machine: Any, remote: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5, 10)
    flip(remote / "demo" / "mae" / stage.run_dir.name / "resume" / "step-00000010" / "weights-00000.safetensors")
    pipeline, elsewhere = machine("b")
    storage = of(pipeline, elsewhere)
    assert take_over(pipeline, elsewhere, storage).state == "resume"
    assert steps(elsewhere.run_dir) == ["0005"]
    loud = " ".join(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "step 10 is damaged" in loud and "weights-00000.safetensors: does not match" in loud
    assert "FALLING BACK to the resume point of step 5" in loud
    save(storage, elsewhere.run_dir, 10)
    assert of(*machine("c")).restore_newer() is not None, "the damaged one was replaced"


def test_where_every_remote_point_is_damaged_nothing_starts(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5, 10)
    for path in remote.rglob("state.json"):
        flip(path)
    pipeline, elsewhere = machine("b")
    with pytest.raises(CheckpointError, match=r"no resume point can be read .*step-00000010.*step-00000005.*--fresh"):
        take_over(pipeline, elsewhere, of(pipeline, elsewhere))


def test_an_upload_of_a_point_that_was_cut_off_is_left_out(
    machine: Any, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5, 10)
    (remote / "demo" / "mae" / stage.run_dir.name / "resume" / "step-00000010" / MANIFEST).unlink()
    pipeline, elsewhere = machine("b")
    assert "step 5," in take_over(pipeline, elsewhere, of(pipeline, elsewhere)).reason
    assert "step-00000010: an upload that was cut off" in caplog.text


def test_a_point_damaged_here_is_taken_from_the_storage(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, stage = machine("a")
    storage = of(pipeline, stage)
    save(storage, stage.run_dir, 5, 10)
    whole = content(stage.run_dir / "resume" / "step-00000010")
    flip(stage.run_dir / "resume" / "step-00000010" / "weights-00000.safetensors")
    (stage.run_dir / "metrics.jsonl").write_text("until 12\n")
    point = ResumePoints(stage.run_dir, ALONE, storage).newest()
    assert point is not None and point.name == "step-00000010" and content(point) == whole
    assert (stage.run_dir / "metrics.jsonl").read_text() == "until 12\n", "this run's own metrics stay"
    assert "does not match its digest; taken from the storage" in caplog.text


def test_a_hostile_point_brings_nothing_but_what_belongs_to_a_run(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    save(of(pipeline, stage), stage.run_dir, 5)
    place = remote / "demo" / "mae" / stage.run_dir.name / "resume" / "step-00000005"
    hostile = filled(stage.run_dir.parent / "hostile" / "step-00000005")
    shutil.copytree(place, hostile, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    filled(hostile / "run" / "artifact")
    (hostile / "run" / "status.json").write_text("{}")
    store = Store(f"file://{place.parent}")
    store.remove(place.name)
    store.upload(hostile, place.name, {})
    pipeline, elsewhere = machine("b")
    assert of(pipeline, elsewhere).restore_newer() is not None
    assert sorted(path.name for path in elsewhere.run_dir.iterdir()) == [*("identity.json", "metrics.jsonl", "resume")]


def test_training_does_not_wait_for_an_upload_and_an_overtaken_point_is_not_sent(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, sent = threading.Event(), []

    def slow(self: Store, folder: Path, place: str, known: Any) -> None:
        assert go_on.wait(20)
        assert (folder / "weights-00000.safetensors").is_file(), "pruned here, but not in what is sent"
        sent.append(folder.name)

    monkeypatch.setattr(Store, "upload", slow)
    pipeline, stage = machine("a")
    storage = of(pipeline, stage)
    points = ResumePoints(stage.run_dir, ALONE, storage)
    for step in (5, 10, 15, 20):
        points.save(step, {"w": torch.zeros(4)}, {}, {"hooks": {}})
    assert sent == [] and steps(stage.run_dir) == ["0015", "0020"]
    go_on.set()
    storage.stop()
    assert sent == ["step-00000005", "step-00000020"]


def test_an_outage_is_a_warning_and_the_next_save_tries_again(
    machine: Any, remote: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, stage = machine("a")
    storage = of(pipeline, stage)
    with monkeypatch.context() as patch:
        fails(patch, "put_file", lambda *_: True, OSError("connection refused"))
        save(storage, stage.run_dir, 5)
    assert "step 5 was not copied" in caplog.text and "connection refused" in caplog.text
    assert "has no copy of the resume point of step 5" in caplog.text
    caplog.clear()
    save(storage, stage.run_dir, 10)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert [path.parent.name for path in remote.rglob(MANIFEST)] == ["step-00000010"]


def test_a_storage_out_of_reach_stops_what_never_ran_here_and_not_what_did(
    machine: Any, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote.write_text("a file where the folder should be")
    pipeline, stage = machine("a")
    with pytest.raises(StorageError, match=r"nothing of this stage is on this machine.*storage\.url=null"):
        take_over(pipeline, stage, of(pipeline, stage))
    save(None, stage.run_dir, 5)
    pipeline, stage = machine("a")
    assert take_over(pipeline, stage, of(pipeline, stage)) is stage and stage.state == "resume"
    assert "going on with what is on this machine" in caplog.text


# Artifacts


def test_an_artifact_is_uploaded_once_and_found_by_another_machine(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    storage = of(pipeline, stage)
    assert not storage.has_artifact()
    storage.upload_artifact()
    assert storage.has_artifact() and not of(*machine("a", f"storage.url=file://{remote}2")).has_artifact()
    pipeline, elsewhere = machine("b")
    assert fetch_stored(pipeline, elsewhere)
    assert content(elsewhere.run_dir / "artifact") == content(stage.run_dir / "artifact")
    assert of(pipeline, elsewhere).has_artifact()
    assert graph.plan(pipeline, ["mae"])["mae"].state == "done"
    pipeline, third = machine("c")
    taken = take_over(pipeline, third, of(pipeline, third))
    assert taken.state == "done" and taken.artifact.digest == read_artifact(stage.run_dir / "artifact").digest


def test_an_artifact_that_could_not_be_sent_is_sent_later(
    machine: Any, remote: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, stage = machine("a")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    storage = of(pipeline, stage)
    with monkeypatch.context() as patch:
        fails(patch, "put_file", lambda source, _: source.endswith("a.jpg"), OSError("connection refused"))
        storage.upload_artifact()
    assert "the same command sends it later" in caplog.text and not storage.has_artifact()
    assert not fetch_stored(*machine("b"))
    sent = fails(monkeypatch, "put_file", lambda *_: False, OSError())
    storage.upload_artifact()
    assert storage.has_artifact() and "model.safetensors" not in [Path(source).name for source, _ in sent]


def test_another_artifact_of_the_same_fingerprint_is_left_as_it_is(
    machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        pipeline, stage = machine(name)
        publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint, name.encode())
        of(pipeline, stage).upload_artifact()
    assert "holds another artifact of this fingerprint" in caplog.text and not of(pipeline, stage).has_artifact()
    pipeline, elsewhere = machine("c")
    assert fetch_stored(pipeline, elsewhere)
    assert (elsewhere.run_dir / "artifact" / "model.safetensors").read_bytes() == b"a"


def test_a_damaged_or_foreign_artifact_is_not_taken(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    of(pipeline, stage).upload_artifact()
    place = remote / "demo" / "mae" / stage.run_dir.name / "artifact"
    flip(place / "model.safetensors")
    pipeline, elsewhere = machine("b")
    with pytest.raises(StorageError, match=r"model\.safetensors: does not match its digest.*--fresh"):
        take_over(pipeline, elsewhere, of(pipeline, elsewhere))
    assert not fetch_stored(pipeline, elsewhere) and not (elsewhere.run_dir / "artifact").exists()
    shutil.rmtree(place)
    publish_at(remote.parent / "foreign", "mae", "0" * 64)
    Store(f"file://{place.parent}").upload(remote.parent / "foreign", "artifact", {})
    with pytest.raises(StorageError, match="of another run"):
        take_over(pipeline, elsewhere, of(pipeline, elsewhere))
    assert not (elsewhere.run_dir / "artifact").exists()


def test_two_answers_for_one_fingerprint_are_an_error(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, stage = machine("a")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    of(pipeline, stage).upload_artifact()
    digest = read_artifact(stage.run_dir / "artifact").digest
    pipeline, elsewhere = machine("b", "tracking.uri=http://127.0.0.1:9")
    monkeypatch.setattr(launchers_storage, "published_digest", lambda *_: "0" * 64)
    with pytest.raises(ArtifactError, match=f"two artifacts of one fingerprint: digest {digest[:12]} .* 000000000000"):
        fetch_stored(pipeline, elsewhere)
    assert not (elsewhere.run_dir / "artifact").exists()
    monkeypatch.setattr(launchers_storage, "published_digest", lambda *_: digest)
    assert fetch_stored(pipeline, elsewhere)


def test_the_digest_that_mlflow_has_is_found(machine: Any, tmp_path: Path) -> None:
    from pipeline.tracking.download import published_digest
    from pipeline.tracking.tracker import sync

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    pipeline, stage = machine("a", f"tracking.uri={uri}")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    sync(pipeline, stage.run_dir, "mae", {"fingerprint": stage.fingerprint}, {}, [])
    assert published_digest(uri, stage.fingerprint) == read_artifact(stage.run_dir / "artifact").digest
    assert published_digest(uri, "0" * 64) is None


def test_fresh_moves_the_remote_run_aside(machine: Any, remote: Path) -> None:
    pipeline, stage = machine("a")
    storage = of(pipeline, stage)
    storage.set_aside()
    for number in (1, 2):
        storage.begin()
        save(storage, stage.run_dir, 5, 10)
        storage.set_aside()
        name = stage.run_dir.name
        assert sorted(path.name for path in (remote / "demo" / "mae").iterdir())[-1] == f"{name}.old-{number}"
        shutil.rmtree(stage.run_dir / "resume")
        assert storage.restore_newer() is None
    old = Store(f"file://{remote}/demo/mae/{stage.run_dir.name}.old-1")
    assert old.download("resume/step-00000010", stage.run_dir / "looked-at")


def test_a_finished_stage_whose_upload_is_missing_is_not_skipped_in_silence(machine: Any) -> None:
    pipeline, stage = machine("a")
    publish_at(stage.run_dir / "artifact", "mae", stage.fingerprint)
    write_json(stage.run_dir / "storage.json", {"url": of(pipeline, stage).url, "digest": "0" * 64})
    assert not of(pipeline, stage).has_artifact()
    of(pipeline, stage).upload_artifact()
    assert read_json(stage.run_dir / "storage.json")["digest"] == read_artifact(stage.run_dir / "artifact").digest
