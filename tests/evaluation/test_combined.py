"""Ensembles and averages, against means by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.data.annotations import read
from pipeline.data.codec import decode, flip_heatmaps
from pipeline.data.definitions import DatasetSource
from pipeline.errors import ConfigError
from pipeline.evaluation.inference import predict, requests_from_ground_truth
from pipeline.evaluation.model_set import ModelSet
from pipeline.models.loading import load_pose, save_model
from pipeline.models.pose import PoseModel
from stages import module_of
from tests.faults.fixtures import context, pose_spec, publish_at, publish_pose, raw_coco

CPU = torch.device("cpu")


def random_model(final: Path, seed: int, **backbone: Any) -> Artifact:
    """Every tensor random, batch norm's statistics included."""
    spec = pose_spec(**backbone)
    torch.manual_seed(seed)
    model = PoseModel(spec.config, spec.keypoints)
    model.init_weights()
    state = {
        name: torch.rand_like(value) if value.is_floating_point() else value + seed
        for name, value in model.state_dict().items()
    }
    return publish_at(final, lambda staged: save_model(staged, spec, state))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("models")
    return {name: random_model(folder / name, seed) for seed, name in enumerate("abc", start=1)}


def heatmaps_by_hand(model: PoseModel, images: torch.Tensor, flip_index: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        plain, mirrored = model(images)["coco"], model(images.flip(-1))["coco"]
    return (plain + flip_heatmaps(mirrored, flip_index)) / 2


def test_an_ensemble_decodes_the_mean_of_its_models_own_flip_tests(
    artifacts: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelSet(artifacts, {}, {"all": ["a", "b", "c"]}, CPU)
    annotations = read(DatasetSource(name="coco"), str(raw_coco(tmp_path)))
    spec = models.spec("all")
    requests = requests_from_ground_truth(annotations, spec.codec.input_size)
    seen: list[torch.Tensor] = []
    from pipeline.evaluation import inference

    monkeypatch.setattr(inference, "decode", lambda maps, codec: seen.append(maps) or decode(maps, codec))
    pixels: list[torch.Tensor] = []
    models.model("a").register_forward_pre_hook(lambda module, inputs: pixels.append(inputs[0]))
    found = predict(models.model("all"), annotations.definition, requests, spec.codec, flip=True)
    assert len(found) == len(requests) == 4 and len(pixels) == 2
    flip_index = torch.from_numpy(annotations.definition.flip_index)
    singles = [heatmaps_by_hand(load_pose(artifact)[0], pixels[0], flip_index) for artifact in artifacts.values()]
    torch.testing.assert_close(seen[0], torch.stack(singles).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[0], singles[0], rtol=1e-3)


def test_an_average_has_the_mean_of_every_tensor_and_can_join_an_ensemble(artifacts: dict[str, Artifact]) -> None:
    models = ModelSet(artifacts, {"mean": ["a", "b"]}, {"both": ["mean", "c"]}, CPU)
    states = [load_pose(artifacts[name])[0].state_dict() for name in "ab"]
    average = models.model("mean").state_dict()
    assert any("running_var" in name for name in average)
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)
        else:
            assert value == max(state[name] for state in states) == 2
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        both = models.model("both")(images, ["coco"])["coco"]
        parts = [models.model(name)(images, ["coco"])["coco"] for name in ("mean", "c")]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
    assert models.names == ["a", "b", "c", "mean", "both"]


def test_models_that_do_not_go_together_are_refused_before_any_weight_is_read(
    artifacts: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deeper = publish_pose(tmp_path / "deeper", pose_spec(depth=3))
    larger = publish_pose(tmp_path / "larger", pose_spec(image_size=[96, 64]))
    spec = pose_spec()
    keypoints = list(spec.datasets["coco"].keypoints)
    renamed = spec.datasets["coco"].model_copy(update={"keypoints": (keypoints[1], keypoints[0], *keypoints[2:])})
    swapped = publish_pose(tmp_path / "swapped", spec.model_copy(update={"datasets": {"coco": renamed}}))
    other = publish_pose(tmp_path / "other", spec.model_copy(update={"datasets": {"aic": spec.datasets["coco"]}}))
    given = {"a": artifacts["a"], "deeper": deeper, "larger": larger, "swapped": swapped, "other": other}
    monkeypatch.setattr("pipeline.models.loading.load_file", lambda path: pytest.fail("weights were read"))
    for kind, member, said in (
        ("averages", "deeper", "averages.x: a and deeper differ in architecture; only"),
        ("averages", "other", "averages.x: a and other differ in decoders; only"),
        ("averages", "larger", "averages.x: a and larger differ in architecture, codec; only"),
        ("averages", "swapped", "averages.x: a and swapped have different keypoints of 'coco'"),
        ("ensembles", "larger", r"ensembles.x: a and larger have different codecs: input_size \(64, 48\) against"),
        ("ensembles", "swapped", "ensembles.x: a and swapped have different keypoints of 'coco'"),
        ("ensembles", "other", "ensembles.x: a, other have no decoder in common"),
    ):
        combined = {"averages": {}, "ensembles": {}, kind: {"x": ["a", member]}}
        with pytest.raises(ConfigError, match=said):
            ModelSet(given, **combined, device=CPU)
    ModelSet(given, {}, {"x": ["a", "deeper"]}, CPU)


def test_the_stage_gives_them_rows_notes_and_comparisons(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    stage = {
        "kind": "evaluate",
        "inputs": {"data": str(raw_coco(tmp_path / "raw")), "models": {n: str(artifacts[n].path) for n in "ab"}},
        "datasets": [{"name": "coco", "split": "train"}],
        "averages": {"mean": ["a", "b"]},
        "ensembles": {"both": ["a", "mean"]},
        "compare": [["both", "mean"]],
        "border": "exact",
        "bootstrap": 10,
        "pictures": 0,
    }
    running = context(tmp_path, stage)
    module_of("evaluate").run(running, running.plan.config)
    table = json.loads((running.run_dir / "artifact" / "table.json").read_text())
    assert [row[0] for row in table["rows"]] == ["a", "b", "mean", "both"]
    assert "mean: mean weights of a, b" in table["notes"] and "both: mean heatmaps of a, mean" in table["notes"]
    assert any(note.startswith("both minus mean on coco") for note in table["notes"])
    metrics = json.loads((running.run_dir / "artifact" / "manifest.json").read_text())["metrics"]
    assert np.isfinite([metrics["both/coco/ground_truth/AP"], metrics["both-minus-mean/coco/ground_truth/AP"]]).all()
