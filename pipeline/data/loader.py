"""From shards to batches: uint8 images and keypoints, in an order that resumes anywhere.

A batch is a dict:

    images     (b, 3, H, W) uint8       dataset   (b,) int64, index into the shards' `datasets`
    keypoints  (b, K, 2) float32        weight    (b,) float32, 0 for a sample that could not be read
    visible    (b, K) float32           position  (b,) int64, in the global order
    noise      (b, patches) float32     ids       list of str; bad: list of str, what is wrong with which sample

Pose views give keypoints and visible, in input pixels and padded to the largest K of all datasets; the MAE view gives
noise, whose order is the mask.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data.augmentation import PoseAugmentation, mae_view, pose_view
from pipeline.data.definitions import DatasetDefinition
from pipeline.data.geometry import box_to_window
from pipeline.data.images import decode_stored
from pipeline.data.order import PURPOSE_VIEW, Order, positions
from pipeline.data.shard_index import SampleMeta
from pipeline.data.shards import Sample, ShardSet
from pipeline.errors import ConfigError, DataError, VitruvianError
from pipeline.processes import end_with_parent
from pipeline.remote import reason

logger = logging.getLogger(__name__)

Item = dict[str, Any]
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class View(Protocol):
    """What a stage sees of a stored sample."""

    def require(self, shards: ShardSet) -> None:
        """Raises ConfigError if the view can't show these shards."""

    def __call__(self, image: np.ndarray, meta: SampleMeta, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one sample; `images` is (H, W, 3) uint8."""

    def blank(self) -> dict[str, np.ndarray]:
        """The arrays of a sample that could not be read."""


class PoseView:
    """Augmented person crops with keypoints, for training a pose model."""

    def __init__(
        self,
        input_hw: tuple[int, int],
        definitions: Mapping[str, DatasetDefinition],
        augmentation: PoseAugmentation | None,
    ) -> None:
        """`definitions` by dataset name; without `augmentation` the upright window."""
        self.input_hw, self.definitions, self.augmentation = input_hw, dict(definitions), augmentation
        self._most = max((definition.num_keypoints for definition in definitions.values()), default=0)

    def require(self, shards: ShardSet) -> None:
        """Raises ConfigError if a dataset in the shards has no definition here."""
        unknown = [name for name in shards.datasets if name not in self.definitions]
        if unknown:
            raise ConfigError(f"{shards.base} holds {unknown[0]!r}, of which there is no definition")

    def __call__(self, image: np.ndarray, meta: SampleMeta, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `pose_view`. A prescribed window is not jittered: its dataset was never trained so."""
        definition = self.definitions[meta["dataset"]]
        keypoints = np.asarray(meta["keypoints"], np.float64).reshape(-1, 3)
        if len(keypoints) != definition.num_keypoints:
            expected = f"{definition.name} has {definition.num_keypoints}"
            raise DataError(f"sample {meta['id']} has {len(keypoints)} keypoints, {expected}; make the shards anew")
        window, bbox = meta["window"], None
        if window is None:
            window, bbox = box_to_window(meta["bbox"], self.input_hw[1] / self.input_hw[0]), meta["bbox"]
        sample = pose_view(image, keypoints, window, self.input_hw, definition, self.augmentation, rng, bbox=bbox)
        arrays = self.blank()
        arrays["images"] = sample.image
        arrays["keypoints"][: len(keypoints)] = sample.keypoints
        arrays["visible"][: len(keypoints)] = sample.visible
        return arrays

    def blank(self) -> dict[str, np.ndarray]:
        """A black image without visible keypoints."""
        return {
            "images": np.zeros((*self.input_hw, 3), np.uint8),
            "keypoints": np.zeros((self._most, 2), np.float32),
            "visible": np.zeros(self._most, np.float32),
        }


class MaeView:
    """Random resized crops of people, or of whole images, with the noise that orders the patches for the mask."""

    def __init__(
        self,
        size: tuple[int, int],
        num_patches: int,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
    ) -> None:
        self.size, self.num_patches, self.scale, self.flip = size, num_patches, scale, flip

    def require(self, shards: ShardSet) -> None:
        """Any shards will do."""

    def __call__(self, image: np.ndarray, meta: SampleMeta, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `mae_view`."""
        noise = rng.random(self.num_patches, np.float32)
        window = None
        if meta["mode"] == "person":
            window = meta["window"] or box_to_window(meta["bbox"], self.size[1] / self.size[0])
        return {"images": mae_view(image, window, self.size, rng, scale=self.scale, flip=self.flip), "noise": noise}

    def blank(self) -> dict[str, np.ndarray]:
        """A black image."""
        return {"images": np.zeros((*self.size, 3), np.uint8), "noise": np.zeros(self.num_patches, np.float32)}


class TrainSet(Dataset[Item]):
    """The endless sequence of samples: item p is the sample at position p of the order, seen through the view."""

    def __init__(self, shards: ShardSet, order: Order, view: View, seed: int) -> None:
        """`seed` of what is random in the view. Raises ConfigError if the view can't show the shards."""
        view.require(shards)
        assert order.epoch_length == len(shards), "the order is of other shards"
        self.shards, self.order, self.view, self.seed = shards, order, view, seed

    def generator(self, position: int) -> np.random.Generator:
        """The generator of everything random about the sample at a position, whichever process computes it."""
        epoch = position // self.order.epoch_length
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch, position, PURPOSE_VIEW]))

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, wanted: Sequence[int]) -> list[Item]:
        """The samples of a micro-batch; a remote store is asked for all of them at once."""
        indices = [self.order.sample(position)[1] for position in wanted]
        found = self.shards.read_many(indices)
        return [self._item(*one) for one in zip(wanted, indices, found, strict=True)]

    def _item(self, position: int, index: int, found: Sample | DataError) -> Item:
        item: Item = {"position": position, "dataset": int(self.shards.dataset_of[index]), "weight": 1.0, "bad": None}
        item["id"] = self.shards.key(index)
        try:
            if isinstance(found, DataError):
                raise found
            image = decode_stored(found.jpg, where=f"sample {found.key}")
            return item | self.view(image, found.meta, self.generator(position))
        except DataError as error:
            return item | self.view.blank() | {"weight": 0.0, "bad": str(error)}
        except Exception as error:
            raise RuntimeError(
                f"sample {item['id']} at position {position}: {type(error).__name__}: {error}"
            ) from error


def make_loader(
    dataset: TrainSet,
    *,
    start_step: int,
    steps: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
) -> DataLoader[Item]:
    """Batches of this rank, one per micro-step, of the steps start_step ... start_step + steps - 1.

    `workers` processes prepare them ahead; with 0 this process does. Raises ConfigError if global_batch is not
    micro_batch x world_size x accumulation.
    """
    if micro_batch * world_size * accumulation != global_batch:
        found = f"{micro_batch} samples x {world_size} ranks x {accumulation} micro-steps"
        raise ConfigError(f"global_batch_size {global_batch} is not {found}")
    division = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
    return Loader(
        dataset,
        workers,
        batch_sampler=_MicroSteps(start_step, steps, accumulation, division),
        collate_fn=collate,
        generator=torch.Generator(),  # else starting to load would draw from the global generator
    )


def collate(items: Sequence[Item]) -> Item:
    """Items of `TrainSet` as one batch."""
    arrays = [name for name, value in items[0].items() if isinstance(value, np.ndarray)]
    batch: Item = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in arrays}
    batch["images"] = batch["images"].permute(0, 3, 1, 2).contiguous()
    batch["dataset"] = torch.tensor([item["dataset"] for item in items], dtype=torch.int64)
    batch["weight"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
    batch["position"] = torch.tensor([item["position"] for item in items], dtype=torch.int64)
    batch["ids"] = [item["id"] for item in items]
    batch["bad"] = [item["bad"] for item in items if item["bad"] is not None]
    return batch


class _MicroSteps(Sampler[list[int]]):
    def __init__(self, start_step: int, steps: int, accumulation: int, division: dict[str, int]) -> None:
        self.steps, self.accumulation, self.division = range(start_step, start_step + steps), accumulation, division

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro_step in range(self.accumulation):
                yield list(positions(step, micro_step, **self.division))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation


class Loader(DataLoader[Any]):
    """Loads by processes of its own, which it starts with the stop signals blocked; without `workers` here.

    A scheduler signals every process of a job; the workers must outlive it, or the step that is being finished and the
    resume point that is being saved lose their data. Blocking, unlike ignoring, loses no signal of this process, and
    covers the workers' start-up.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, **options: Any) -> None:
        if workers:
            options |= {"multiprocessing_context": _context(), "worker_init_fn": _start_worker, "prefetch_factor": 4}
        super().__init__(dataset, num_workers=workers, pin_memory=torch.cuda.is_initialized(), **options)

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        others = set(multiprocessing.active_children())
        with _blocked(_STOP_SIGNALS):
            batches = super().__iter__()
        _workers.update(set(multiprocessing.active_children()) - others)
        return _with_plain_errors(batches)


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    for worker in _workers:
        worker.kill()  # Python would send them SIGTERM, which they ignore, and wait for ever


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches. An error of the user's that a worker raised is as it was there: PyTorch puts its traceback into it.

    The workers end with the batches, or with the error. Raises VitruvianError where a worker died.
    """
    try:
        yield from batches
    except VitruvianError as error:
        kind, error.__traceback__ = type(error), None  # whose frames hold the workers
        raise kind(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        # PyTorch has no class of its own for it; a worker that dies while it hands a batch over breaks the pipe.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise VitruvianError(
            f"rank {os.environ.get('RANK', '0')}: a data loading process died, killed for want of memory perhaps "
            f"({reason(error)}); fewer runtime.workers need less; the same command goes on from the last resume point"
        ) from None
    finally:
        del batches


@contextlib.contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    resource_tracker.ensure_running()  # if it starts inside the block, it lifts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context() -> Any:
    """A fork server: workers never inherit this process's threads, locks or CUDA state, and torch is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "cv2", "torch", "pipeline.data.loader"])
    return context


def _start_worker(_: int) -> None:
    end_with_parent()
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
