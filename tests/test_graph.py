"""Which stage runs, and why: order, fingerprints, states; and that planning stays quick."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import graph
from pipeline.artifacts import publish
from pipeline.config import PipelineConfig
from pipeline.config_file import load_pipeline
from pipeline.data.definitions import load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import read_json
from pipeline.graph import StagePlan
from stages import KINDS

MAE: dict[str, Any] = {
    "kind": "mae",
    "inputs": {"shards": "shards"},
    "model": {"backbone": {"size": "micro", "image_size": [32, 32], "patch_size": 8}, "decoder_width": 32},
    "steps": 10,
    "global_batch_size": 8,
    "optimizer": {"lr": 0.001},
}
STAGES: dict[str, Any] = {
    "last": {**MAE, "inputs": {"shards": "shards", "init": "mae"}},
    "mae": MAE,
    "shards": {"kind": "shards", "inputs": {"data": "data"}, "datasets": ["coco"]},
    "data": {"kind": "synthetic"},
}


def pipeline(folder: Path, *overrides: str, stages: dict[str, Any] | None = None) -> PipelineConfig:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", "stages": stages or STAGES}))
    return load_pipeline(path, [f"workspace={folder / 'workspace'}", *overrides], KINDS)


def publish_at(final: Path, content: bytes = b"x") -> None:
    staged = final.with_name("." + final.name)
    staged.mkdir(parents=True)
    (staged / "payload").write_bytes(content)
    publish(
        staged,
        final,
        pipeline="trial",
        stage="any",
        kind="any",
        fingerprint="f",
        config={},
        parents={},
        metrics={},
        licences=[],
    )


def finish(plan: StagePlan, content: bytes = b"x") -> None:
    assert plan.run_dir is not None
    graph.record_identity(plan)
    publish_at(plan.run_dir / "artifact", content)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A raw COCO folder with one person."""
    root = tmp_path / "raw"
    (root / "coco" / "annotations").mkdir(parents=True)
    (root / "coco" / "train2017").mkdir()
    (root / "coco" / "train2017" / "1.jpg").write_bytes(b"never read")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 10, "height": 10}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "keypoints": [1] * 51}],
        "categories": [{"id": 1, "name": "person"}],
    }
    (root / "coco" / "annotations" / "person_keypoints_train2017.json").write_text(json.dumps(content))
    return root


def shards_of(folder: Path, root: Path, *overrides: str) -> StagePlan:
    stages = {"shards": {"kind": "shards", "inputs": {"data": str(root)}, "datasets": ["coco"]}}
    return graph.plan(pipeline(folder, *overrides, stages=stages))["shards"]


def test_parents_come_first_and_otherwise_as_written(tmp_path: Path) -> None:
    assert graph.order(pipeline(tmp_path)) == ["data", "shards", "mae", "last"]
    free = {name: {"kind": "synthetic"} for name in ("c", "a", "b")}
    (tmp_path / "free").mkdir()
    path = tmp_path / "free" / "p.yaml"
    path.write_text(yaml.safe_dump({"name": "free", "stages": free}, sort_keys=False))
    assert graph.order(load_pipeline(path, [], KINDS)) == ["c", "a", "b"]


def test_ancestors_are_all_that_must_be_done_before(tmp_path: Path) -> None:
    config = pipeline(tmp_path)
    assert graph.ancestors(config, "last") == ["data", "shards", "mae"]
    assert graph.ancestors(config, "data") == []
    assert graph.parents(config, "last") == ["shards", "mae"]


def test_a_circle_of_stages_is_named(tmp_path: Path) -> None:
    config = pipeline(tmp_path, "stages.mae.inputs.init=last")
    with pytest.raises(ConfigError, match=r"in a circle: (last -> mae -> last|mae -> last -> mae)"):
        graph.plan(config)
    with pytest.raises(ConfigError, match="shards -> shards"):
        graph.order(pipeline(tmp_path, "stages.shards.inputs.data=shards"))


def test_stages_start_wait_resume_and_are_done(tmp_path: Path) -> None:
    config = pipeline(tmp_path)
    plans = graph.plan(config)
    assert [(name, plan.state) for name, plan in plans.items()] == [
        ("data", "start"),
        ("shards", "waiting"),
        ("mae", "waiting"),
        ("last", "waiting"),
    ]
    assert plans["data"].reason == "never ran" and plans["last"].reason == "for shards, mae"
    assert plans["mae"].run_dir is None and plans["mae"].fingerprint is None
    finish(plans["data"])
    plans = graph.plan(config)
    assert plans["data"].state == "done" and plans["shards"].state == "start"
    assert plans["shards"].run_dir == tmp_path / "workspace" / "trial" / "shards" / plans["shards"].fingerprint[:12]
    (plans["shards"].run_dir / "work").mkdir(parents=True)
    assert graph.plan(config)["shards"].state == "resume"
    finish(plans["shards"])
    mae = graph.plan(config)["mae"]
    assert mae.state == "start" and mae.inputs["shards"].artifact is not None
    for step in ("step-00000009", "step-00000010", ".step-00000011"):
        (mae.run_dir / "resume" / step).mkdir(parents=True)
    mae = graph.plan(config)["mae"]
    assert (mae.state, mae.reason) == ("resume", "resume point of step 10")


def test_only_the_asked_stage_and_its_ancestors_are_planned(tmp_path: Path) -> None:
    assert list(graph.plan(pipeline(tmp_path), ["shards"])) == ["data", "shards"]


def test_a_copy_that_somebody_made_of_a_resume_point_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("step-00000003", "step-00000003.bak", "step-x", "step-"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    (tmp_path / "resume" / "step-00000004").write_text("a file")
    assert [path.name for path in graph.resume_points(tmp_path)] == ["step-00000003"]


def ready(tmp_path: Path, *overrides: str, shards: bytes = b"x") -> StagePlan:
    """The plan of a training stage whose input is an artifact by path."""
    where = tmp_path / f"shards-{shards.decode()}"
    if not where.exists():
        publish_at(where, shards)
    stages = {"mae": {**MAE, "inputs": {"shards": str(where)}}}
    return graph.plan(pipeline(tmp_path, *overrides, stages=stages))["mae"]


@pytest.mark.parametrize("override", ["stages.mae.steps=11", "seed=1", "engine.precision=bf16", "stages.mae.flip=0.1"])
def test_what_changes_the_result_changes_the_fingerprint(tmp_path: Path, override: str) -> None:
    assert ready(tmp_path, override).fingerprint != ready(tmp_path).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "runtime.workers=3",
        "runtime.processes=2",
        "runtime.micro_batch_size=2",
        "engine.zero_stage=3",
        "tracking.log_every=1",
        "tracking.uri=null",
        "stages.mae.save_every=2",
        "stages.mae.description=words",
        "description=words",
    ],
)
def test_what_only_changes_the_way_there_keeps_the_fingerprint(tmp_path: Path, override: str) -> None:
    assert ready(tmp_path, override).fingerprint == ready(tmp_path).fingerprint


def test_another_workspace_keeps_the_fingerprint(tmp_path: Path) -> None:
    moved = ready(tmp_path, f"workspace={tmp_path / 'elsewhere'}")
    assert moved.fingerprint == ready(tmp_path).fingerprint
    assert moved.run_dir == tmp_path / "elsewhere" / "trial" / "mae" / moved.fingerprint[:12]


def test_an_input_counts_by_its_digest_and_not_by_its_place(tmp_path: Path) -> None:
    before = ready(tmp_path)
    assert ready(tmp_path, shards=b"y").fingerprint != before.fingerprint
    (tmp_path / "shards-x").rename(tmp_path / "moved")
    moved = ready(tmp_path, f"stages.mae.inputs.shards={tmp_path / 'moved'}")
    assert moved.fingerprint == before.fingerprint


def test_precision_does_not_touch_stages_that_do_not_train(tmp_path: Path) -> None:
    plain, bf16 = (graph.plan(pipeline(tmp_path, f"engine.precision={p}"))["data"] for p in ("float32", "bf16"))
    assert plain.fingerprint == bf16.fingerprint


def test_the_version_of_a_kind_is_part_of_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ready(tmp_path).fingerprint
    monkeypatch.setattr(KINDS["mae"], "version", 99)
    assert ready(tmp_path).fingerprint != before


def test_a_stage_that_starts_beside_an_old_run_says_what_changed(tmp_path: Path) -> None:
    graph.record_identity(ready(tmp_path))
    assert ready(tmp_path).reason == "never ran"
    changed = ready(tmp_path, "stages.mae.optimizer.lr=0.5", "seed=4")
    assert changed.state == "start"
    old = ready(tmp_path).fingerprint[:12]
    assert changed.reason == f"never ran; changed since {old}: optimizer.lr: 0.001 -> 0.5, seed: 0 -> 4"


def test_the_identity_is_recorded_and_flattens_to_parameters(tmp_path: Path) -> None:
    plan = ready(tmp_path)
    graph.record_identity(plan)
    assert read_json(plan.run_dir / "identity.json") == json.loads(json.dumps(plan.identity))
    assert plan.parameters["optimizer.lr"] == 0.001 and plan.parameters["seed"] == 0
    assert plan.datasets[0]["name"].startswith("shards: ") and len(plan.datasets[0]["digest"]) == 64


def test_raw_data_counts_by_its_annotations(tmp_path: Path, coco: Path) -> None:
    before = shards_of(tmp_path, coco)
    assert before.state == "start"
    (coco / "coco" / "train2017" / "2.jpg").write_bytes(b"an image more")
    assert shards_of(tmp_path, coco).fingerprint == before.fingerprint
    coco.rename(tmp_path / "moved")
    assert shards_of(tmp_path, tmp_path / "moved").fingerprint == before.fingerprint
    annotations = tmp_path / "moved" / "coco" / "annotations" / "person_keypoints_train2017.json"
    annotations.write_text(annotations.read_text().replace("[0, 0, 5, 5]", "[0, 0, 5, 6]"))
    assert shards_of(tmp_path, tmp_path / "moved").fingerprint != before.fingerprint


def test_raw_data_behind_another_url_is_other_data(tmp_path: Path, coco: Path) -> None:
    def fingerprint(root: Path) -> str | None:
        stages = {"shards": {"kind": "shards", "inputs": {"data": f"file://{root}"}, "datasets": ["coco"]}}
        return graph.plan(pipeline(tmp_path, stages=stages))["shards"].fingerprint

    (tmp_path / "other").symlink_to(coco)
    assert fingerprint(coco) == fingerprint(coco) is not None
    assert fingerprint(coco) != fingerprint(tmp_path / "other")


def test_a_changed_dataset_definition_changes_the_stages_that_read_it(tmp_path: Path) -> None:
    content = load_definition("coco").model_dump(mode="json")
    own = tmp_path / "own.yaml"
    publish_at(tmp_path / "data")
    stages = {"shards": {"kind": "shards", "inputs": {"data": str(tmp_path / "data")}, "datasets": [str(own)]}}

    def fingerprint(flip_pairs: list[list[str]]) -> str | None:
        own.write_text(yaml.safe_dump({**content, "flip_pairs": flip_pairs}))
        return graph.plan(pipeline(tmp_path, stages=stages))["shards"].fingerprint

    assert fingerprint([]) == fingerprint([]) is not None
    assert fingerprint(content["flip_pairs"]) != fingerprint([])


def test_an_unknown_dataset_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'coco'"):
        graph.plan(pipeline(tmp_path, "stages.shards.datasets=[cocoo]"))


def test_an_input_that_is_neither_artifact_nor_raw_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    stages = {"mae": {**MAE, "inputs": {"shards": str(tmp_path / "empty")}}}
    with pytest.raises(ArtifactError, match="neither an artifact"):
        graph.plan(pipeline(tmp_path, stages=stages))


def test_a_damaged_artifact_of_a_finished_stage_stops_the_plan_unless_it_is_made_afresh(tmp_path: Path) -> None:
    plan = ready(tmp_path)
    finish(plan)
    assert ready(tmp_path).state == "done"
    (plan.run_dir / "artifact" / "payload").unlink()
    with pytest.raises(ArtifactError, match="payload: missing .*the stage had finished"):
        ready(tmp_path)
    config = pipeline(tmp_path, stages={"mae": {**MAE, "inputs": {"shards": str(tmp_path / "shards-x")}}})
    fresh = graph.plan(config, ["mae"], fresh=True)["mae"]
    assert fresh.state == "start" and fresh.run_dir == plan.run_dir


def test_fresh_does_not_start_the_ancestors_over(tmp_path: Path) -> None:
    config = pipeline(tmp_path)
    finish(graph.plan(config)["data"])
    plans = graph.plan(config, ["shards"], fresh=True)
    assert plans["data"].state == "done" and plans["shards"].reason == "asked for with --fresh"


def test_planning_imports_no_torch_no_mlflow_and_no_deepspeed(tmp_path: Path) -> None:
    config = pipeline(tmp_path)
    finish(graph.plan(config)["data"])
    code = f"""
        import sys
        import launchers.cli, launchers.run_stage
        from pipeline import graph
        from pipeline.config_file import load_pipeline
        from stages import KINDS
        demo = load_pipeline("demo", ["workspace={tmp_path / "none"}"], KINDS)
        assert len(graph.plan(demo)) == 8
        mine = load_pipeline({str(tmp_path / "pipeline.yaml")!r}, ["workspace={tmp_path / "workspace"}"], KINDS)
        assert graph.plan(mine)["data"].state == "done"
        print([name for name in ("torch", "mlflow", "deepspeed") if name in sys.modules])
    """
    root = Path(graph.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
