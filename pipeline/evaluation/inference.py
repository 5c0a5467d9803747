"""From images and boxes to keypoints: crop, forward (and mirrored), decode, back to image pixels.

Reads the original images, never a stored crop. On several ranks each takes an equal share, so that a model whose
parameters are sharded runs the same number of forwards everywhere.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline.data.annotations import Annotations, read_detections
from pipeline.data.codec import CodecConfig, decode, flip_heatmaps
from pipeline.data.definitions import DatasetDefinition
from pipeline.data.geometry import Window, box_to_window, input_to_image, instance_window, udp_matrix, warp
from pipeline.data.images import decode_image, read_bytes
from pipeline.data.loader import Loader
from pipeline.distributed import World, gather_objects
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction
from pipeline.models.preprocessing import normalise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One person to be looked at."""

    image: str | np.ndarray
    """Path or URL, or the uint8 RGB image itself."""
    image_size: tuple[int, int] | None
    image_id: int | str
    instance_id: int | str | None
    window: Window
    box_score: float


def requests_from_ground_truth(annotations: Annotations, input_hw: tuple[int, int]) -> list[Request]:
    """A request per usable person, with the annotated box and score 1."""
    aspect = input_hw[1] / input_hw[0]
    return [
        Request(one.image, one.image_size, one.image_id, one.id, instance_window(one, aspect), 1.0)
        for one in annotations.instances
    ]


def requests_from_detections(annotations: Annotations, input_hw: tuple[int, int]) -> list[Request]:
    """A request per detector box, all scores kept. Raises DataError if the dataset has no detections file."""
    aspect = input_hw[1] / input_hw[0]
    requests = []
    for detection in read_detections(annotations):
        image = annotations.images[detection.image_id]
        size = (image.width, image.height) if image.width and image.height else None
        window = box_to_window(detection.bbox, aspect)
        requests.append(Request(image.path, size, image.id, None, window, detection.score))
    return sorted(requests, key=lambda request: str(request.image))


@torch.no_grad()
def predict(
    model: nn.Module,
    definition: DatasetDefinition,
    requests: Sequence[Request],
    codec: CodecConfig,
    *,
    flip: bool,
    batch_size: int = 64,
    workers: int = 0,
    world: World | None = None,
    decoder: str | None = None,
    max_bad_fraction: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> list[Prediction]:
    """Keypoints of every request, in their order. Collective where a world of several ranks is given.

    model: a pose model or an ensemble. decoder: the dataset whose decoder is used; the definition's own unless given
    (OCHuman: COCO's). Who is in an image that can't be read is left out, with a warning, and so counts as not found;
    raises DataError where these are more than `max_bad_fraction` of the requests. workers: processes that read and crop
    images; 0: this one does. tick is called once a batch and may
    raise, on all ranks.
    """
    world = world or World(0, 0, 1, next(model.parameters()).device)
    name = decoder or definition.name
    share = -(-len(requests) // world.size)
    mine = list(requests[world.rank * share : (world.rank + 1) * share])
    padding = share - len(mine)
    padded = mine + [requests[0]] * padding if requests else []
    loader = Loader(_Crops(padded, codec.input_size), workers, batch_size=batch_size, collate_fn=_collate)
    flip_index = torch.from_numpy(definition.flip_index)
    points: list[Tensor] = []
    faults: list[str | None] = []
    for images, unread in loader:
        tick()
        faults += unread
        pixels = normalise(images.to(world.device, non_blocking=True))
        heatmaps = model(pixels, [name])[name].float()
        if flip:
            mirrored = model(pixels.flip(-1), [name])[name].float()
            heatmaps = (heatmaps + flip_heatmaps(mirrored, flip_index)) / 2
        points.append(decode(heatmaps, codec).cpu())
    found = torch.cat(points).double().numpy()[: len(mine)] if points else np.zeros((0, definition.num_keypoints, 3))
    done = zip(mine, found, faults[: len(mine)], strict=True)
    predictions = [_to_image(request, one, codec) for request, one, fault in done if fault is None]
    # Every rank went on to here with a blank image: all of them raise, none is left waiting.
    gathered = gather_objects((predictions, [fault for fault in faults[: len(mine)] if fault is not None]))
    unread = [fault for _, part in gathered for fault in part]
    if len(unread) > max_bad_fraction * len(requests):
        counts = f"{len(unread)} of {len(requests)} people's images can't be read"
        raise DataError(f"{counts}, more than max_bad_fraction {max_bad_fraction}; the first: {unread[0]}")
    for fault in dict.fromkeys(unread) if world.is_main else ():
        logger.warning("counts as not found: %s", fault)
    return [prediction for part, _ in gathered for prediction in part]


def ceiling(annotations: Annotations, codec: CodecConfig) -> list[Prediction]:
    """Ground truth encoded and decoded without a model: what the codec alone allows on these people."""
    predictions = []
    for request, instance in zip(
        requests_from_ground_truth(annotations, codec.input_size), annotations.instances, strict=True
    ):
        heatmaps = _perfect_heatmaps(instance.keypoints, request.window, codec)
        predictions.append(_to_image(request, decode(heatmaps, codec)[0].double().numpy(), codec))
    return predictions


def _perfect_heatmaps(keypoints: np.ndarray, window: Window, codec: CodecConfig) -> Tensor:
    from pipeline.data.codec import encode
    from pipeline.data.geometry import window_to_input

    inside = torch.from_numpy(window_to_input(keypoints[None, :, :2], window, codec.input_size)).float()
    visible = torch.from_numpy(keypoints[None, :, 2] > 0)
    return encode(inside, visible, codec)[0]


def _to_image(request: Request, points: np.ndarray, codec: CodecConfig) -> Prediction:
    keypoints = points.copy()
    keypoints[:, :2] = input_to_image(points[:, :2], request.window, codec.input_size)
    return Prediction(request.image_id, request.instance_id, keypoints, request.window, request.box_score)


class _Crops(Dataset[tuple[Tensor, str | None]]):
    """Upright crops (3, H, W) uint8 of requests, and what is wrong with an image that can't be read."""

    def __init__(self, requests: Sequence[Request], input_hw: tuple[int, int]) -> None:
        self.requests, self.input_hw = requests, input_hw

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> tuple[Tensor, str | None]:
        request = self.requests[index]
        try:
            image = _read(request.image, request.image_size) if isinstance(request.image, str) else request.image
        except DataError as error:
            return torch.zeros((3, *self.input_hw), dtype=torch.uint8), str(error)
        x, y, width, height = request.window
        crop = warp(image, udp_matrix((x, y), (width, height), 0.0, self.input_hw), self.input_hw)
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), None


@lru_cache(maxsize=2)
def _read(path: str, size: tuple[int, int] | None) -> np.ndarray:
    """People of one image follow each other: it is decoded once."""
    return decode_image(read_bytes(path), where=path, size=size)


def _collate(crops: list[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str | None]]:
    return torch.stack([crop for crop, _ in crops]), [fault for _, fault in crops]
