"""Keypoints of people in an image: the model as a function. Imports neither DeepSpeed nor MLflow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.artifacts import Artifact, read_artifact
from pipeline.data.definitions import DatasetDefinition
from pipeline.data.geometry import box_to_window
from pipeline.errors import ConfigError
from pipeline.evaluation.inference import Request, predict
from pipeline.models.loading import load_pose


class Predictor:
    """A pose model with everything around it: `Predictor(artifact)(image, boxes)`."""

    def __init__(
        self,
        artifact: str | Path | Artifact,
        dataset: str | None = None,
        *,
        device: str = "cpu",
        flip: bool = True,
        border: Literal["reference", "exact"] = "reference",
    ) -> None:
        """artifact: the folder of a pose model. dataset: whose decoder; unset: COCO's where there is one, else the first.
        border: how points near the window's border are decoded (`CodecConfig.border`).

        Raises ArtifactError, or ConfigError if the model has no such decoder.
        """
        opened = artifact if isinstance(artifact, Artifact) else read_artifact(Path(artifact))
        self.model, self.spec = load_pose(opened)
        self.model.to(torch.device(device))
        name = dataset or ("coco" if "coco" in self.spec.datasets else next(iter(self.spec.datasets)))
        if name not in self.spec.datasets:
            raise ConfigError(f"the model has no decoder for {name!r}; it has {', '.join(self.spec.datasets)}")
        self.definition: DatasetDefinition = self.spec.datasets[name]
        self.codec = self.spec.codec.model_copy(update={"border": border})
        self.flip = flip

    def __call__(self, image: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """Keypoints (N, K, 3) of x, y, score in image pixels.

        image: (H, W, 3) uint8 RGB. boxes: N of x, y, width, height in pixels. Raises ConfigError for any other shape.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ConfigError(f"expected a uint8 RGB image (H, W, 3), found {image.dtype} {image.shape}")
        height, width = self.codec.input_size
        requests = []
        for index, box in enumerate(boxes):
            if len(box) != 4 or not np.isfinite(box).all() or box[2] <= 0 or box[3] <= 0:
                raise ConfigError(f"box {index}: expected x, y, width, height with a positive size, found {list(box)}")
            window = box_to_window((box[0], box[1], box[2], box[3]), width / height)
            requests.append(Request(image, None, 0, index, window, 1.0))
        if not requests:
            return np.zeros((0, self.definition.num_keypoints, 3))
        predictions = predict(self.model, self.definition, requests, self.codec, flip=self.flip)
        return np.stack([prediction.keypoints for prediction in predictions])
