"""Which stage runs, is skipped or resumes, and why. Imports no torch: deciding to skip is quick.

A stage's fingerprint is the digest of: the part of its config that changes the result, the seed and the precision, the
digests of its inputs, and its kind's version. It names the run directory, so the same command always finds its run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import MANIFEST, Artifact, read_artifact
from pipeline.config import PipelineConfig, StageConfig
from pipeline.data.definitions import DatasetSource, load_definition, resolve
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.files import digest_of, read_json, sha256, write_json
from pipeline.strict import fingerprint_view

State = Literal["done", "resume", "start", "waiting"]


@dataclass(frozen=True)
class Input:
    """What a reference of a stage leads to."""

    reference: str
    path: Path | None
    """The artifact's folder, or the folder of raw data; None while the stage that makes it has not finished."""
    digest: str | None
    """None for what is not there yet."""
    artifact: Artifact | None = None
    lacks: str | None = None
    """What is missing of raw data that no stage makes, in words."""


@dataclass(frozen=True)
class StagePlan:
    """What the same command does next for one stage."""

    name: str
    config: StageConfig
    state: State
    reason: str
    inputs: dict[str, Input] = field(default_factory=dict)
    fingerprint: str | None = None
    run_dir: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the fingerprint was made of, flat: the parameters of a tracked run."""
        return {key.removeprefix("config."): value for key, value in _flatten(self.identity)}

    @property
    def datasets(self) -> list[dict[str, str]]:
        """Name, digest and place of each input, as tracked data sets."""
        return [
            {"name": f"{label}: {source.reference}", "digest": source.digest or "", "source": str(source.path)}
            for label, source in self.inputs.items()
        ]

    @property
    def artifact(self) -> Artifact:
        """Of a stage that is done."""
        assert self.state == "done" and self.run_dir is not None
        return read_artifact(self.run_dir / "artifact")


def order(pipeline: PipelineConfig) -> list[str]:
    """Stage names, parents first, otherwise as written. Raises ConfigError for a cycle."""
    done: list[str] = []
    visiting: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in visiting:
            raise ConfigError(
                f"stages read each other in a circle: {' -> '.join([*visiting[visiting.index(name) :], name])}"
            )
        visiting.append(name)
        for parent in parents(pipeline, name):
            visit(parent)
        visiting.pop()
        done.append(name)

    for name in pipeline.stages:
        visit(name)
    return done


def parents(pipeline: PipelineConfig, name: str) -> list[str]:
    """The stages of this pipeline that a stage reads."""
    return [reference for reference in pipeline.stages[name].references().values() if reference in pipeline.stages]


def ancestors(pipeline: PipelineConfig, name: str) -> list[str]:
    """All stages that must be done before this one, parents first."""
    needed: set[str] = set()
    queue = parents(pipeline, name)
    while queue:
        parent = queue.pop()
        if parent not in needed:
            needed.add(parent)
            queue += parents(pipeline, parent)
    return [stage for stage in order(pipeline) if stage in needed]


def plan(pipeline: PipelineConfig, only: list[str] | None = None, *, fresh: bool = False) -> dict[str, StagePlan]:
    """The state of each stage (of `only` and its ancestors), parents first.

    fresh: the stages of `only` start over, whatever their run directories hold, be it a damaged artifact.
    Raises ConfigError for a cycle, ArtifactError for a finished stage whose artifact is damaged.
    """
    wanted = order(pipeline)
    if only is not None:
        needed = {*only, *(parent for name in only for parent in ancestors(pipeline, name))}
        wanted = [name for name in wanted if name in needed]
    plans: dict[str, StagePlan] = {}
    for name in wanted:
        plans[name] = _plan_stage(pipeline, name, plans, fresh and name in (only or pipeline.stages))
    return plans


def _plan_stage(pipeline: PipelineConfig, name: str, plans: dict[str, StagePlan], fresh: bool) -> StagePlan:
    config = pipeline.stages[name]
    inputs = {
        label: _input(pipeline, config, label, reference, plans) for label, reference in config.references().items()
    }
    definitions = {source.name: digest_of(_definition(source)) for source in _sources(config)}
    missing = [_awaited(source) for source in inputs.values() if source.digest is None]
    if missing:
        return StagePlan(name, config, "waiting", f"for {', '.join(dict.fromkeys(missing))}", inputs)
    identity = {
        "kind": config.kind,
        "version": type(config).version,
        "config": fingerprint_view(config),
        "seed": pipeline.seed,
        "precision": pipeline.engine.precision if type(config).distributed else None,
        "definitions": definitions,
        "files": {path: _file_digest(path) for path in config.files() if Path(path).is_file()},
        "inputs": {label: source.digest for label, source in inputs.items()},
    }
    fingerprint = digest_of(identity)
    run_dir = pipeline.workspace.absolute() / pipeline.name / name / fingerprint[:12]
    state, reason = ("start", "asked for with --fresh") if fresh else _state(run_dir)
    if state == "start" and not fresh:
        reason += _what_changed(run_dir, identity)
    return StagePlan(name, config, state, reason, inputs, fingerprint, run_dir, identity)


def _state(run_dir: Path) -> tuple[State, str]:
    if (run_dir / "artifact" / MANIFEST).is_file():
        try:
            read_artifact(run_dir / "artifact")
        except ArtifactError as error:
            raise ArtifactError(f"{error} (the stage had finished)") from None
        return "done", "finished with the same fingerprint"
    points = resume_points(run_dir)
    if points:
        return "resume", f"resume point of step {step_of(points[-1])}"
    if (run_dir / "work").is_dir():
        return "resume", "partly done"
    return "start", "never ran"


def resume_points(run_dir: Path) -> list[Path]:
    """Folders of saved resume points, oldest first; not yet verified."""
    found = (path for path in (run_dir / "resume").glob("step-*") if path.is_dir())
    return sorted((path for path in found if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(point: Path) -> int:
    """The step that a resume point's folder name says."""
    return int(point.name.removeprefix("step-"))


def require_raw_data(stage: StagePlan) -> None:
    """Raises DataError if a stage waits for raw data that no stage makes: what is missing, and where it belongs."""
    for label, source in stage.inputs.items():
        if source.lacks:
            raise DataError(f"stages.{stage.name}.inputs.{label}: {source.lacks}")


def _awaited(source: Input) -> str:
    if mlflow_run(source.reference):
        return f"{source.reference} (fetched when the stage starts)"
    if source.lacks:
        return f"raw data at {source.reference.removeprefix('./').rstrip('/')}/ (see docs/datasets.md)"
    return source.reference


def _input(
    pipeline: PipelineConfig, config: StageConfig, label: str, reference: str, plans: dict[str, StagePlan]
) -> Input:
    if reference in plans:
        parent = plans[reference]
        if parent.state != "done":
            return Input(reference, None, None)
        artifact = parent.artifact
        return Input(reference, artifact.path, artifact.digest, artifact)
    run_id = mlflow_run(reference)
    path = fetched(pipeline, run_id) / "artifact" if run_id else Path(reference).expanduser().absolute()
    if run_id and not path.is_dir():
        return Input(reference, None, None, lacks=f"MLflow run {run_id} was not fetched yet")
    if (path / MANIFEST).is_file():
        artifact = read_artifact(path)
        return Input(reference, path, artifact.digest, artifact)
    sources = _sources(config)
    if label == "data" and sources:
        return _raw_data(reference, path, sources)
    raise ArtifactError(
        f"stage kind {config.kind!r}: {reference!r} is neither an artifact ({MANIFEST}) nor a folder of raw data"
    )


def mlflow_run(reference: str) -> str | None:
    """The run that a reference such as `mlflow:RUN_ID` names; None for any other."""
    if not reference.startswith("mlflow:"):
        return None
    if not re.fullmatch("mlflow:[0-9a-f]{32}", reference):
        raise ConfigError(f"{reference!r}: expected mlflow: and the 32 characters of a run's id")
    return reference.removeprefix("mlflow:")


def fetched(pipeline: PipelineConfig, run_id: str) -> Path:
    """Where the artifact of an MLflow run is kept once it was downloaded."""
    return pipeline.workspace.absolute() / "fetched" / run_id


def _raw_data(reference: str, path: Path, sources: list[DatasetSource]) -> Input:
    """Raw data of the user's, which may not lie there yet: that is for `run` to refuse, not for a plan."""
    remote = "://" in reference
    if not remote and not path.is_dir():
        wanted = ", ".join(dict.fromkeys(f"{source.name} ({source.split})" for source in sources))
        lacks = f"no folder {path}, where the raw data of {wanted} belongs; docs/datasets.md says how it lies there"
        return Input(reference, None, None, lacks=lacks)
    try:
        return Input(reference, path, _digest_of_raw_data(reference if remote else str(path), sources))
    except DataError as error:
        return Input(reference, None, None, lacks=str(error))


def _sources(config: StageConfig) -> list[DatasetSource]:
    """The datasets that a stage reads."""
    return getattr(config, "sources", list)()


def _definition(source: DatasetSource) -> dict[str, Any]:
    return fingerprint_view(load_definition(source.name))


def _digest_of_raw_data(root: str, sources: list[DatasetSource]) -> str:
    """Of the annotation files that a stage reads; images are checked as they are read. A URL stands for what it names."""
    parts = []
    for source in sources:
        files = resolve(source, root)
        named = {"annotations": files.annotations, "detections": files.detections, "truth": files.truth}
        digests = {label: path if "://" in path else _file_digest(path) for label, path in named.items() if path}
        parts.append([source.split, digests])
    return digest_of(parts)


def _file_digest(path: str) -> str:
    """sha256 of a file; a plan that is made again does not read an unchanged one again."""
    stat = Path(path).stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256_of(path: str, size: int, modified: int) -> str:
    return sha256(Path(path))


def _what_changed(run_dir: Path, identity: dict[str, Any]) -> str:
    """In words, against the newest other run of this stage."""
    others = sorted(run_dir.parent.glob("*/identity.json"), key=lambda path: path.stat().st_mtime)
    if not others:
        return ""
    before = dict(_flatten(read_json(others[-1])))
    now = dict(_flatten(identity))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    changes = [f"{key.removeprefix('config.')}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in keys]
    return f"; changed since {others[-1].parent.name}: {', '.join(changes[:6])}" if changes else ""


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def record_identity(stage: StagePlan) -> None:
    """Writes what the fingerprint was made of into the run directory, for people and for `_what_changed`."""
    assert stage.run_dir is not None
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(stage.run_dir / "identity.json", stage.identity)
