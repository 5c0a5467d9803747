"""Batch-norm statistics, which differ by rank: averaged for what is published, copied back for what goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError


def average_buffers(shares: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Averages running statistics, weighted by the `samples_seen` buffer of the decoder they belong to.

    Counters are summed over nothing: the largest is kept. Without any samples the first share's statistics stay.
    """
    averaged = dict(shares[0])
    for name, first in shares[0].items():
        if not first.is_floating_point():
            averaged[name] = torch.stack([share[name] for share in shares]).amax(0)
            continue
        owners = [
            key
            for key in shares[0]
            if key.endswith("samples_seen") and name.startswith(key.removesuffix("samples_seen"))
        ]
        if not owners:
            continue
        seen = torch.stack([share[owners[0]].double() for share in shares])
        if seen.sum() > 0:
            weights = (seen / seen.sum()).view(-1, *[1] * first.dim())
            averaged[name] = (torch.stack([share[name].double() for share in shares]) * weights).sum(0).to(first.dtype)
    return averaged


def load_buffers_into(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Copies buffers by name, in place. Raises CheckpointError if a name is missing on either side."""
    own = dict(module.named_buffers())
    if own.keys() != buffers.keys():
        raise CheckpointError(f"buffers differ: {', '.join(sorted(own.keys() ^ buffers.keys())[:5])}")
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(buffers[name])
