"""The order of samples: a pure function of the seed, the position and the shards' index.

Training is one endless sequence of positions 0, 1, 2, ...; step s of a global batch of G samples is the positions from
s G to s G + G - 1, on any number of ranks and workers. To resume is to start at another position.
"""

from collections.abc import Mapping

import numpy as np

from pipeline.errors import ConfigError

PURPOSE_ORDER, PURPOSE_VIEW = 0, 1
_KEPT_EPOCHS = 2


class Order:
    """Which sample stands at a position.

    Without weights an epoch is every sample once, the union of the datasets in natural proportion. With weights it is
    as many samples, each drawn with replacement: a dataset by its weight, then one of its samples.

    `block` is for reading from far away: samples come from `buffer` runs of `block` neighbours at a time. Each dataset
    walks through the blocks in one common random order and shuffles within its buffer, and which dataset is next is
    drawn without replacement from all labels of the epoch, so batches are mixed however the shards were filled.
    """

    def __init__(
        self,
        datasets: np.ndarray,
        seed: int,
        weights: Mapping[int, float] | None = None,
        *,
        block: int | None = None,
        buffer: int = 16,
    ) -> None:
        """`datasets` (N,): each sample's dataset number. `weights` by that number; those left out have 0.

        Raises ConfigError for weights that are negative, all 0, or of a dataset without samples.
        """
        self._datasets = np.asarray(datasets)
        if not len(self._datasets):
            raise ConfigError("there is no sample to train on: the shards are empty")
        if buffer < 4 or (block is not None and block < 1):
            raise ConfigError(f"block {block} and buffer {buffer}: expected at least 1 and 4")
        self._seed, self._block, self._buffer = seed, block, buffer
        self._shares = None if weights is None else self._normalised(weights)
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch."""
        return len(self._datasets)

    def sample(self, position: int) -> tuple[int, int]:
        """The epoch that a position lies in and the index of its sample."""
        epoch, offset = divmod(position, self.epoch_length)
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._draw(epoch)
        return epoch, int(self._epochs[epoch][offset])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def _normalised(self, weights: Mapping[int, float]) -> dict[int, float]:
        total = sum(weights.values())
        for dataset, weight in weights.items():
            if not (0 <= weight < float("inf")):
                raise ConfigError(f"weight of dataset {dataset}: expected a number from 0 on, found {weight}")
            if weight and not (self._datasets == dataset).any():
                raise ConfigError(f"dataset {dataset} has weight {weight}, but the shards hold no sample of it")
        if not total > 0:
            raise ConfigError(f"weights {dict(weights)}: at least one must be above 0")
        return {dataset: weight / total for dataset, weight in sorted(weights.items()) if weight}

    def _draw(self, epoch: int) -> np.ndarray:
        """The samples of an epoch (N,), in order."""
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, epoch, 0, PURPOSE_ORDER]))
        count = self.epoch_length
        if self._shares is None:
            labels = rng.permutation(self._datasets) if self._block else None
        else:
            labels = rng.choice(list(self._shares), size=count, p=list(self._shares.values()))
        if labels is None:
            return rng.permutation(count)
        order = np.empty(count, np.int64)
        blocks = rng.permutation(-(-count // self._block)) if self._block else None
        for dataset in np.unique(labels):
            places = np.flatnonzero(labels == dataset)
            order[places] = self._stream(int(dataset), len(places), blocks, rng)
        return order

    def _stream(self, dataset: int, length: int, blocks: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        """`length` samples of one dataset, in its own order."""
        members = np.flatnonzero(self._datasets == dataset)
        drawn = members if self._shares is None else members[rng.integers(0, len(members), length)]
        if blocks is None or self._block is None:
            return drawn
        turn = np.empty(len(blocks), np.int64)
        turn[blocks] = np.arange(len(blocks))
        in_buffer = turn[drawn // self._block] // self._buffer
        return drawn[np.lexsort((rng.random(length), in_buffer))]


def positions(step: int, micro_step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The positions that a rank works on in one micro-step.

    Micro-step a of a step is the next world_size x micro_batch positions, rank r's part of it the r-th micro_batch of
    these. So all ranks and micro-steps together cover the same positions in any division. Raises ConfigError where
    the batch can't be divided.
    """
    accumulation = global_batch // (micro_batch * world_size)
    if accumulation * micro_batch * world_size != global_batch:
        sizes = f"{world_size} ranks x {micro_batch} samples"
        raise ConfigError(f"global_batch_size {global_batch} can't be divided into micro-steps of {sizes}")
    assert 0 <= micro_step < accumulation and 0 <= rank < world_size
    start = step * global_batch + (micro_step * world_size + rank) * micro_batch
    return range(start, start + micro_batch)
