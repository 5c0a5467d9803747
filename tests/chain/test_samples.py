"""Real images and annotations: the codec's ceiling, the whole chain, and learning a few people by heart."""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import read_artifact
from pipeline.data.annotations import read
from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import DatasetSource
from pipeline.evaluation.inference import ceiling, predict, requests_from_ground_truth
from pipeline.evaluation.score import score
from tests.chain.running import metrics, only_run, succeeded, vitruvian

CHAIN = Path(__file__).with_name("samples.yaml")


@pytest.mark.parametrize("split", ["train", "val"])
def test_perfect_heatmaps_evaluate_to_nearly_100(samples: Path, split: str) -> None:
    annotations = read(DatasetSource(name="coco", split=split), samples)
    assert score(annotations, ceiling(annotations, CodecConfig())).metrics["AP"] >= 95


def test_a_swapped_flip_pair_would_be_seen_in_the_ceiling(samples: Path) -> None:
    annotations = read(DatasetSource(name="coco", split="val"), samples)
    perfect = ceiling(annotations, CodecConfig())
    for prediction in perfect:
        prediction.keypoints[:] = prediction.keypoints[annotations.definition.flip_index]
    assert score(annotations, perfect).metrics["AP"] < 60


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_chain_runs_on_real_samples(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.yaml"
    path.write_text(CHAIN.read_text().replace("SAMPLES", str(samples)))
    for stage in ("mae", "finetune", "token", "distill", "evaluate"):
        succeeded(vitruvian("run", str(path), "--until", stage, f"workspace={tmp_path}"))
    for stage in ("mae", "finetune", "distill"):
        losses = [line["loss"] for line in metrics(only_run(tmp_path, stage, "samples"))]
        assert losses[-1] < losses[0] / 2, stage
    token = read_artifact(only_run(tmp_path, "token", "samples") / "artifact").manifest.metrics
    assert token["teacher_loss_with_token"] < token["teacher_loss_without_token"]
    table = json.loads((only_run(tmp_path, "evaluate", "samples") / "artifact" / "table.json").read_text())
    assert {row[1] for row in table["rows"]} == {"coco-train", "coco-val", "aic", "mpii", "ochuman"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_small_vit_learns_the_coco_samples_by_heart(samples: Path) -> None:
    """256x192 without augmentation; ground-truth boxes of the same people."""
    from pipeline.data.augmentation import pose_view
    from pipeline.data.geometry import instance_window
    from pipeline.data.images import decode_image, read_bytes
    from pipeline.models.config import PoseConfig
    from pipeline.models.pose import PoseModel
    from pipeline.objectives import PoseObjective

    annotations = read(DatasetSource(name="coco", split="train"), samples)
    codec = CodecConfig()
    torch.manual_seed(0)
    backbone = {"width": 192, "depth": 4, "heads": 6, "image_size": (256, 192), "patch_size": 16}
    model = PoseModel(PoseConfig(backbone=backbone, decoder={"filters": 96}), {"coco": 17})
    model.init_weights()
    views = []
    for one in annotations.instances:
        image = decode_image(read_bytes(one.image), where=one.image)
        window = instance_window(one, 192 / 256)
        views.append(pose_view(image, one.keypoints, window, (256, 192), annotations.definition, None, None))
    images = torch.stack([torch.from_numpy(view.image).permute(2, 0, 1) for view in views])
    keypoints = torch.stack([torch.from_numpy(view.keypoints) for view in views])
    visible = torch.stack([torch.from_numpy(view.visible) for view in views])
    objective = PoseObjective(model, codec, ["coco"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    requests = requests_from_ground_truth(annotations, codec.input_size)
    reached = 0.0
    epochs = 100
    for epoch in range(epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (epoch + 1) / 3) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in torch.randperm(len(images)).split(22):
            dataset = torch.zeros(len(rows), dtype=torch.int64)
            batch = {"images": images[rows], "keypoints": keypoints[rows], "visible": visible[rows], "dataset": dataset}
            loss, _ = objective({**batch, "weight": torch.ones(len(rows))})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 10 == 9 and epoch > 50:
            predictions = predict(model.eval(), annotations.definition, requests, codec, flip=False)
            reached = score(annotations, predictions).metrics["AP"]
            if reached > 90:
                break
    assert reached > 90
