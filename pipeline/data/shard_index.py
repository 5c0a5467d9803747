"""What lies in a shard: the description of a sample, and the index that says where its bytes are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy
from typing_extensions import TypedDict

from pipeline.errors import DataError

SCHEMA_VERSION = 1
KEY_LENGTH = 80
COLUMNS = ("jpg_offset", "jpg_size", "json_offset", "json_size", "sha256", "key")
_ARRAYS = (*COLUMNS, "dataset")
_LARGEST_MEMBER = 1 << 30


class CropPlace(TypedDict):
    """Where a crop lies: crop pixels are (image pixels - (x, y)) * (scale_x, scale_y)."""

    x: float
    y: float
    scale_x: float
    scale_y: float


class SampleMeta(TypedDict):
    """A sample's `key.json`. Lengths and points are in crop pixels unless said otherwise."""

    dataset: str
    split: str
    id: int | str
    image_id: int | str
    keypoints: list[tuple[float, float, float]]
    bbox: tuple[float, float, float, float]
    window: tuple[float, float, float, float] | None
    crop: CropPlace
    image_sha256: str
    image_size: tuple[int, int]
    max_input: tuple[int, int]
    mode: Literal["person", "image"]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What the index of one shard of n samples says."""

    datasets: list[str]
    """Names, sorted; `dataset` points into them."""
    jpg_offset: np.ndarray
    """(n,) int64, bytes from the start of the tar."""
    jpg_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    dataset: np.ndarray
    """(n,) int16."""
    sha256: np.ndarray
    """(n, 2, 32) uint8: of the jpg, of the json."""
    key: np.ndarray
    """(n, KEY_LENGTH) uint8, ASCII padded with zeros."""

    def __len__(self) -> int:
        return len(self.jpg_offset)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        # One key only: safetensors writes several in a random order, and the same shard must make the same bytes.
        about = {"schema_version": SCHEMA_VERSION, "datasets": self.datasets}
        return safetensors.numpy.save(arrays, {"index": json.dumps(about)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "ShardIndex":
        """The content of an index file. Raises DataError naming `where` if it is damaged or of another version."""
        try:
            arrays = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["index"])
            if about["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {about['schema_version']}, this program reads {SCHEMA_VERSION}")
            index = cls(datasets=about["datasets"], **{name: arrays[name] for name in _ARRAYS})
            index._check()
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise DataError(f"{where}: no valid shard index: {error}; make the shards anew") from None
        return index

    def _check(self) -> None:
        n = len(self)
        expected = {name: ((n,), np.int64) for name in COLUMNS[:4]}
        expected |= {"dataset": ((n,), np.int16), "sha256": ((n, 2, 32), np.uint8), "key": ((n, KEY_LENGTH), np.uint8)}
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}")
        if n and not (self.dataset.min() >= 0 and self.dataset.max() < len(self.datasets)):
            raise ValueError(f"dataset numbers outside of {self.datasets}")
        for kind in ("jpg", "json"):
            offset, size = getattr(self, f"{kind}_offset"), getattr(self, f"{kind}_size")
            if n and (offset.min() < 0 or size.min() <= 0 or size.max() > _LARGEST_MEMBER):
                raise ValueError(f"impossible places of the {kind} members")


def index_path(shard: str | Path) -> str:
    """The index beside a shard: `shard-000000.index.safetensors`."""
    return str(shard).removesuffix(".tar") + ".index.safetensors"
