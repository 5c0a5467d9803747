"""The whole chain by the commands a user types, on synthetic people, at the smallest size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.artifacts import read_artifact
from tests.chain.conftest import Copy
from tests.chain.running import ROOT, TINY, environment, metrics, only_run, run_stage, succeeded, vitruvian

GOLDEN_LOSSES = {
    "mae": [1.28552, 1.12729, 0.959492, 0.979764],
    "finetune": [0.00250458, 0.00343993, 0.00334918, 0.00307686],
    "token": [0.00247479, 0.00343911, 0.00335035, 0.00309081],
    "distill": [0.00251541, 0.00353182, 0.00337015, 0.00310549],
}
"""Steps 1, 6, 11 and 16 of the tiny chain, with the pinned packages on a CPU. They change when numerics do, and only then."""

STAGES = ("data", "shards", "mae", "finetune", "token", "student_alone", "distill", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_publishes_a_sound_artifact(finished: Path, stage: str) -> None:
    artifact = read_artifact(only_run(finished, stage) / "artifact")
    artifact.verify()
    assert artifact.manifest.stage == stage
    assert artifact.manifest.licences


def test_lineage_leads_from_the_student_back_to_the_data(finished: Path) -> None:
    digests = {stage: read_artifact(only_run(finished, stage) / "artifact").digest for stage in STAGES}
    parents = read_artifact(only_run(finished, "distill") / "artifact").manifest.parents
    assert {label: parent.digest for label, parent in parents.items()} == {
        "shards": digests["shards"],
        "teacher": digests["finetune"],
        "token": digests["token"],
    }
    shards = read_artifact(only_run(finished, "shards") / "artifact").manifest
    assert shards.parents["data"].digest == digests["data"]


def test_the_autoencoder_learns(finished: Path) -> None:
    losses = [line["loss"] for line in metrics(only_run(finished, "mae"))]
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("stage", GOLDEN_LOSSES)
def test_losses_are_the_golden_ones(finished: Path, stage: str) -> None:
    losses = [line["loss"] for line in metrics(only_run(finished, stage))]
    assert losses[::5] == pytest.approx(GOLDEN_LOSSES[stage], rel=2e-3)


def test_only_the_loss_terms_of_the_two_students_differ(finished: Path) -> None:
    alone, distilled = (metrics(only_run(finished, stage)) for stage in ("student_alone", "distill"))
    assert [line["sample_checksum"] for line in alone] == [line["sample_checksum"] for line in distilled]
    assert [line["learning_rate"] for line in alone] == [line["learning_rate"] for line in distilled]
    specs = [
        json.loads((only_run(finished, stage) / "artifact" / "model.json").read_text())
        for stage in ("student_alone", "distill")
    ]
    assert [spec["config"].pop("knowledge_tokens") for spec in specs] == [0, 1]
    assert specs[0] == specs[1]


def test_the_token_changed_nothing_but_itself_and_names_its_teacher(finished: Path) -> None:
    artifact = read_artifact(only_run(finished, "token") / "artifact")
    description = json.loads((artifact.path / "model.json").read_text())
    assert description["teacher"] == read_artifact(only_run(finished, "finetune") / "artifact").digest
    assert set(load_file(artifact.path / "model.safetensors")) == {"token"}
    found = artifact.manifest.metrics
    assert found["teacher_loss_with_token"] < found["teacher_loss_without_token"]


def test_the_table_has_every_model_dataset_and_kind_of_boxes(finished: Path) -> None:
    table = json.loads((only_run(finished, "evaluate") / "artifact" / "table.json").read_text())
    seen = {tuple(row[:3]) for row in table["rows"]}
    models = ("teacher", "student_alone", "distilled")
    expected = {(model, data, "ground truth") for model in models for data in ("coco", "aic", "mpii")}
    assert seen == expected | {(model, "coco", "detector") for model in models}
    assert any(note.startswith("distilled minus student_alone on coco") for note in table["notes"])
    assert "distilled" in (finished / "stdout.txt").read_text()


def test_pictures_and_server_files_are_there(finished: Path) -> None:
    evaluate = only_run(finished, "evaluate") / "artifact"
    assert {path.name for path in (evaluate / "pictures").iterdir()} == {
        f"{model}-{data}.jpg" for model in ("teacher", "student_alone", "distilled") for data in ("coco", "aic", "mpii")
    }
    assert (evaluate / "server" / "person_keypoints_val2017_teacher_results.zip").is_file()
    assert (only_run(finished, "mae") / "artifact" / "pictures" / "reconstructions.jpg").is_file()


def test_a_second_run_skips_every_stage(finished: Path) -> None:
    done = succeeded(vitruvian("run", str(TINY), f"workspace={finished}"))
    assert len(re.findall("skipped, finished with the same fingerprint", done.stderr)) == len(STAGES)
    assert "starts" not in done.stderr


def test_a_changed_setting_starts_beside_the_old_run_and_says_what_changed(finished: Path) -> None:
    done = succeeded(vitruvian("run", str(TINY), f"workspace={finished}", "--dry-run", "stages.token.optimizer.lr=0.2"))
    assert "optimizer.lr: 0.1 -> 0.2" in done.stdout
    same = succeeded(vitruvian("run", str(TINY), f"workspace={finished}", "--dry-run", "engine.zero_stage=2"))
    assert same.stdout.count("finished with the same fingerprint") == len(STAGES)


def test_status_as_json_tells_every_stage(finished: Path) -> None:
    rows = json.loads(succeeded(vitruvian("status", str(TINY), f"workspace={finished}", "--json")).stdout)
    assert {row["stage"]: row["state"] for row in rows} == dict.fromkeys(STAGES, "done")


def test_mlflow_holds_every_metric_once_nested_under_the_pipeline(finished: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny", *STAGES}
    finetune = runs["finetune"]
    assert finetune.info.status == "FINISHED"
    assert finetune.data.tags["mlflow.parentRunId"] == runs["tiny"].info.run_id
    assert finetune.data.tags["fingerprint"].startswith(only_run(finished, "finetune").name)
    history = client.get_metric_history(finetune.info.run_id, "loss")
    recorded = metrics(only_run(finished, "finetune"))
    assert [(point.step, point.value) for point in history] == [(line["step"], line["loss"]) for line in recorded]
    names = {item.path for item in client.list_artifacts(finetune.info.run_id, "artifact")}
    assert {"artifact/model.safetensors", "artifact/manifest.json"} <= names


def test_predict_writes_keypoints_and_a_picture(finished: Path, tmp_path: Path) -> None:
    images = sorted((only_run(finished, "data") / "artifact" / "raw" / "coco" / "val2017").iterdir())[:2]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({images[0].name: [[10, 10, 60, 90], [40, 5, 50, 100]], images[1].name: []}))
    student = only_run(finished, "distill") / "artifact"
    out = tmp_path / "out"
    done = succeeded(
        vitruvian("predict", str(student), *map(str, images), "--boxes", str(boxes), "--out", str(out), "--json")
    )
    found = json.loads(done.stdout)
    assert found == json.loads((out / "keypoints.json").read_text())
    assert np.array(found["images"][images[0].name][1]["keypoints"]).shape == (17, 3)
    assert found["images"][images[1].name] == []
    assert (out / f"{images[0].stem}-keypoints.jpg").is_file()


def test_using_a_model_imports_neither_deepspeed_nor_mlflow(finished: Path) -> None:
    student = only_run(finished, "distill") / "artifact"
    program = f"""
import sys, numpy as np, torch
from pipeline.models.loading import load_model
from pipeline.predictor import Predictor
model = load_model({str(student)!r})
heatmaps = model(torch.zeros(2, 3, 64, 48))
assert {{name: tuple(value.shape) for name, value in heatmaps.items()}} == {{
    "aic": (2, 14, 32, 24), "coco": (2, 17, 32, 24), "mpii": (2, 16, 32, 24)}}
found = Predictor({str(student)!r}, "mpii")(np.zeros((90, 80, 3), np.uint8), [(0, 0, 40, 80)])
assert found.shape == (1, 16, 3) and np.isfinite(found).all()
assert not {{"deepspeed", "mlflow"}} & set(sys.modules), "heavy imports"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(26)
def test_a_token_of_another_teacher_is_refused(without: Copy, tmp_path: Path) -> None:
    workspace = without("distill")
    other = only_run(workspace, "student_alone") / "artifact"
    done = run_stage(
        1,
        "--stage",
        "distill",
        "--config",
        str(TINY),
        f"workspace={workspace}",
        f"stages.distill.inputs.teacher={other}",
    )
    assert done.returncode == 2
    assert "inputs.token was fitted on" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_stage_makes_the_data_it_lacks_and_refuses_a_missing_trained_input(tmp_path: Path) -> None:
    done = run_stage(1, "--stage", "finetune", "--config", str(TINY), f"workspace={tmp_path}")
    assert done.returncode == 2
    assert "vitruvian run" in done.stderr and "--until mae" in done.stderr
    assert read_artifact(only_run(tmp_path, "shards") / "artifact").manifest.metrics["samples_coco"] == 60
    assert "Traceback" not in done.stderr
