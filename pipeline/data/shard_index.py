"""What lies in a shard: the description of a sample, and the index that says where its bytes are."""

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import ConfigDict
from typing_extensions import TypedDict

from pipeline.errors import DataError

SCHEMA_VERSION = 1
KEY_LENGTH = 80
COLUMNS = ("jpg_offset", "jpg_size", "json_offset", "json_size", "sha256", "key")
_ARRAYS = (*COLUMNS, "dataset")
_LARGEST_MEMBER = 1 << 28
_LARGEST_SHARD = 1 << 44
_LARGEST_GAP = 4096
"""Bytes of headers and padding between the two members of a sample, which lie next to each other."""


class CropPlace(TypedDict):
    """Where a crop lies: crop pixels are (image pixels - (x, y)) * (scale_x, scale_y)."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]

    x: float
    y: float
    scale_x: float
    scale_y: float


class SampleMeta(TypedDict):
    """A sample's `key.json`. Lengths and points are in crop pixels unless said otherwise."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]

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


_KEY_BYTES = np.frombuffer(f"\0-_{string.ascii_letters}{string.digits}".encode(), np.uint8)


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
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{where}: no valid shard index: {reason}; make the shards anew") from None
        return index

    def _check(self) -> None:
        n = len(self)
        names = self.datasets
        if (
            not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
            or len({*names}) < len(names)
        ):
            raise ValueError(f"datasets: expected different names, found {str(names)[:60]}")
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
            if n and (
                offset.min() < 0 or offset.max() > _LARGEST_SHARD or size.min() <= 0 or size.max() > _LARGEST_MEMBER
            ):
                raise ValueError(f"impossible places of the {kind} members")
        self._check_places()
        if not np.isin(self.key, _KEY_BYTES).all():
            raise ValueError("keys: expected letters, digits, '_' and '-'")

    def _check_places(self) -> None:
        """Raises ValueError for members that overlap, and for a sample whose two members lie apart."""
        starts = np.stack([self.jpg_offset, self.json_offset], axis=1)
        ends = starts + np.stack([self.jpg_size, self.json_size], axis=1)
        gaps = starts.max(axis=1, initial=0) - ends.min(axis=1, initial=np.iinfo(np.int64).max)
        if len(self) and not ((gaps >= 0) & (gaps <= _LARGEST_GAP)).all():
            raise ValueError(f"the members of sample {int(np.argmax((gaps < 0) | (gaps > _LARGEST_GAP)))} lie apart")
        order = np.argsort(starts.ravel(), kind="stable")
        if (ends.ravel()[order][:-1] > starts.ravel()[order][1:]).any():
            raise ValueError("members that overlap")


def index_path(shard: str | Path) -> str:
    """The index beside a shard: `shard-000000.index.safetensors`."""
    return str(shard).removesuffix(".tar") + ".index.safetensors"
