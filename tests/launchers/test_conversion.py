"""`vitruvian convert`, `split` and `export`, as a user types them, and what the stages then make of the artifact."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from launchers.cli import app
from pipeline.artifacts import read_artifact
from pipeline.errors import ConfigError, VitruvianError
from pipeline.files import read_json, sha256
from pipeline.models.formats import huggingface, mmpose
from pipeline.models.loading import load_model, load_pose
from pipeline.pose_training import initialise, require_compatible
from stages import module_of
from tests.faults.fixtures import context, publish_at
from tests.models.formats.models import CLASSIC, heatmap_error, images, outgoing_of, randomise, same, spec_of
from tests.models.test_experts import build as build_with_experts
from tests.models.test_experts import spec_of as spec_with_experts
from tests.models.test_loading import publish_model


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


def done(*words: str) -> Any:
    result = call(*words, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.output)


@pytest.fixture
def folder(elsewhere: Path) -> Path:
    """A Hugging Face folder."""
    (elsewhere / "hf").mkdir()
    huggingface.write(outgoing_of(spec_of(CLASSIC))[0], elsewhere / "hf")
    return elsewhere / "hf"


def test_weights_go_in_and_come_out_again(elsewhere: Path, folder: Path) -> None:
    said = done("convert", "hf", "--from", "huggingface", "--out", "teacher", "--licence", "Apache-2.0")
    artifact = read_artifact(elsewhere / "teacher")
    artifact.verify()
    assert (artifact.manifest.kind, artifact.manifest.licences) == ("import", ["Apache-2.0"])
    assert said["digest"] == artifact.digest and said["sha256"] == sha256(folder / "model.safetensors")
    assert artifact.manifest.config["sha256"] == said["sha256"] and artifact.manifest.config["format"] == "huggingface"
    assert "43 tensors loaded" in said["report"] and "nothing left out" in said["report"]
    _, model = outgoing_of(spec_of(CLASSIC))
    assert torch.equal(load_model("teacher")(images())["coco"], model(images())["coco"])

    out = done("export", "teacher", "--to", "mmpose", "--out", "mm")
    assert out["files"] == ["model.pth", "model.py"]
    done("convert", "mm/model.pth", "--from", "mmpose", "--out", "again", "--heads", "4", "--input", "64x48")
    assert same(dict(load_model("again").state_dict()), dict(load_model("teacher").state_dict()))
    assert done("export", "again", "--to", "huggingface", "--out", "hf2")["files"][0] == "config.json"
    assert read_json(elsewhere / "hf2" / "config.json") == read_json(folder / "config.json")

    text = call("convert", "mm/model.pth", "--from", "mmpose", "--heads", "4", "--out", "third").output
    assert "43 tensors loaded" in text and "artifact " in text
    assert "nothing left out" in text and not list(elsewhere.glob(".*"))


def test_a_checkpoint_with_code_runs_nothing_and_leaves_nothing(elsewhere: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {elsewhere / 'canary'}",)

    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Evil()}, "evil.pth")
    for format in ("mae", "vitpose", "mmpose", "timm"):
        result = call("convert", "evil.pth", "--from", format, "--out", "out")
        assert isinstance(result.exception, VitruvianError) and "evil.pth: refused" in str(result.exception)
    assert [path.name for path in elsewhere.iterdir()] == ["evil.pth"]
    torch.load("evil.pth", weights_only=False)
    assert (elsewhere / "canary").exists(), "the file was not dangerous at all"


MISTAKES = [
    (["convert", "hf", "--from", "keras", "--out", "x"], "--from: no format 'keras'; one of mae, vitpose"),
    (["convert", "hf", "--from", "huggingface", "--out", "hf"], "--out: hf is there already"),
    (["convert", "hf", "--from", "huggingface", "--out", "x", "--input", "256"], "--input: expected height x width"),
    (["convert", "hf", "--from", "huggingface", "--out", "x", "--sha256", "0" * 64], "sha256 is"),
    (["convert", "https://host/x.pth", "--from", "mae", "--out", "x"], "--sha256: a URL needs the sha256"),
    (["convert", "none", "--from", "huggingface", "--out", "x"], "this has no weights"),
    (
        ["convert", "none.pth", "--from", "vitpose", "--out", "x"],
        "none.pth: no such file; check the path of the checkpoint",
    ),
    (["convert", "hf", "--from", "huggingface", "--out", "x", "--dataset", "cocoo"], "did you mean 'coco'"),
    (["export", "hf", "--to", "onnx", "--out", "x"], "no artifact here"),
    (["export", "hf", "--to", "tflite", "--out", "x"], "--to: no format 'tflite'; one of huggingface, mmpose, onnx"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(
    elsewhere: Path, folder: Path, words: list[str], message: str
) -> None:
    result = call(*words)
    assert isinstance(result.exception, VitruvianError) and message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert [path.name for path in elsewhere.iterdir()] == ["hf"]


STAGE: dict[str, Any] = {"kind": "import", "format": "huggingface", "source": "hf", "licence": "Apache-2.0"}
MODEL = {"backbone": {"width": 48, "depth": 2, "heads": 4, "image_size": [64, 48], "drop_path": 0.1}, "decoder": {}}


def test_the_stage_makes_a_teacher_that_distillation_takes(elsewhere: Path, folder: Path) -> None:
    """Its description is the configured one; another definition of the dataset or of the model is another run."""
    found = context(elsewhere, {**STAGE, "datasets": ["coco"], "model": MODEL})
    module_of("import").run(found, found.plan.config)
    artifact = read_artifact(found.run_dir / "artifact")
    teacher, spec = load_pose(artifact)
    _, model = outgoing_of(spec_of(CLASSIC))
    assert torch.equal(teacher(images())["coco"], model(images())["coco"]) and spec.config.backbone.drop_path == 0.1
    require_compatible(spec_of(CLASSIC), spec)
    student = randomise(type(model)(spec.config, spec.keypoints), seed=3)
    initialise(student, artifact)
    assert heatmap_error(student.eval()(images())["coco"], model(images())["coco"]) == 0
    assert "changed: backbone.embeddings.position_embeddings" in (artifact.path / "card.md").read_text()
    identity = found.plan.identity["files"]
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert context(elsewhere, {**STAGE, "datasets": ["coco"], "model": MODEL}).plan.identity["files"] != identity


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {**MODEL, "mask_ratio": 0.5}}, "model.mask_ratio: unknown key"),
        ({"model": {**MODEL, "backbone": {**MODEL["backbone"], "widht": 1}}}, "did you mean 'width'"),
        (
            {"format": "vitpose", "model": {"backbone": {"size": "B"}, "decoder": {"kind": "rich"}}},
            "model.decoder.kind",
        ),
        ({"format": "timm", "model": MODEL}, "model.decoder: unknown key"),
        (
            {"model": {"backbone": {"size": "B"}}, "datasets": ["coco"]},
            "datasets name decoders, and an encoder has none",
        ),
        (
            {"format": "vitpose", "model": {"backbone": {"size": "B", "expert_width": 192}, "decoder": {}}},
            "expert_width: ViTPose\\+ comes in as the plain model of one of its datasets",
        ),
    ],
)
def test_a_section_is_checked_as_its_format_says(elsewhere: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        context(elsewhere, {**STAGE, **section})
    assert caught.value.args[0].count("\n") <= 1


def test_what_is_no_pose_model_is_not_exported(elsewhere: Path) -> None:
    publish_at(elsewhere / "raw", lambda staged: (staged / "x.txt").write_text("x") and None)
    result = call("export", "raw", "--to", "mmpose", "--out", "x")
    assert "an artifact of kind 'any' without 'model.json'" in str(result.exception)


def test_a_model_of_two_datasets_is_exported_for_one(elsewhere: Path) -> None:
    from pipeline.models.loading import save_model

    spec = spec_of(CLASSIC, ("coco", "aic"))
    _, model = outgoing_of(spec)
    publish_at(elsewhere / "both", lambda staged: save_model(staged, spec, model.state_dict()))
    assert "name one (--dataset) of aic, coco" in str(call("export", "both", "--to", "mmpose", "--out", "x").exception)
    done("export", "both", "--to", "mmpose", "--out", "x", "--dataset", "aic")
    back = mmpose.read(elsewhere / "x" / "model.pth", mmpose.Wanted(datasets=("aic",), heads=4))
    assert torch.equal(
        back.tensors["decoders.aic.final_layer.bias"], model.state_dict()["decoders.aic.final_layer.bias"]
    )


def test_split_publishes_the_plain_model_of_one_dataset(elsewhere: Path) -> None:
    model = build_with_experts()
    source = publish_model(elsewhere / "plus", spec_with_experts(model), dict(model.state_dict()))
    said = done("split", "plus/artifact", "--dataset", "mpii", "--out", "mpii")
    artifact = read_artifact(elsewhere / "mpii")
    assert artifact.digest == said["digest"] and artifact.manifest.parents["model"].digest == source.digest
    plain, spec = load_pose(artifact)
    assert spec.config.backbone.expert_width == 0 and list(spec.datasets) == ["mpii"]
    torch.testing.assert_close(plain(images())["mpii"], model(images(), ["mpii"])["mpii"], rtol=1e-6, atol=1e-6)
    assert not list(elsewhere.glob(".*"))
    for words, message in (
        (("split", "plus/artifact", "--dataset", "mpii", "--out", "mpii"), "--out: mpii is there already"),
        (
            ("split", "plus/artifact", "--dataset", "ochuman", "--out", "new"),
            "plus/artifact: no decoder for dataset 'ochuman'",
        ),
        *(
            (("export", "plus/artifact", "--to", to, "--out", "new"), "`vitruvian split`")
            for to in ("huggingface", "mmpose", "onnx")
        ),
    ):
        refused = call(*words)
        assert isinstance(refused.exception, ConfigError) and message in str(refused.exception)
    (elsewhere / "empty").mkdir()
    assert "mpii alone" in call("split", "plus/artifact", "--dataset", "mpii", "--out", "empty").output
