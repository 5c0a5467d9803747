"""A finished model measured on its seed's evaluation people, and kept for paired comparisons."""

import torch

from benchmarks.machine import describe_machine
from benchmarks.mini.results import Measurement
from benchmarks.mini.tables import EVALUATED, RESAMPLES
from pipeline.artifacts import Artifact
from pipeline.data.annotations import read
from pipeline.evaluation.bootstrap import resampled_ap
from pipeline.evaluation.inference import predict, requests_from_ground_truth
from pipeline.evaluation.score import score
from pipeline.models.loading import load_pose
from pipeline.recipe import TrainingConfig


def measure(artifact: Artifact, root: str, config: TrainingConfig) -> Measurement:
    """AP with ground-truth boxes and the flip test, also on resamples of the images, which are any model's the same.

    root: the folder of raw datasets; config: of the stage that made the artifact.
    """
    model, spec = load_pose(artifact)
    annotations = read(EVALUATED, root)
    requests = requests_from_ground_truth(annotations, spec.codec.input_size)
    found = score(annotations, predict(model, annotations.definition, requests, spec.codec, flip=True))
    assert found.matches is not None and config.steps is not None
    return Measurement(
        metrics={name: round(value, 3) for name, value in found.metrics.items()},
        resampled=[round(value, 3) for value in resampled_ap(found.matches, resamples=RESAMPLES).tolist()],
        people=len(requests),
        images=len(found.matches.image_ids),
        evaluated=annotations.digest,
        steps=config.steps,
        samples=config.steps * config.global_batch_size,
        machine=describe_machine(torch.device("cpu")),
    )
