"""Who else runs: rank, world, device, and the few collectives that the machinery needs.

Every function that communicates says that it is collective: all ranks must call it, in the same order.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import RuntimeConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes, logs and tracks."""
        return self.rank == 0


def world_from_environment(runtime: RuntimeConfig) -> World:
    """Reads the launcher's RANK, LOCAL_RANK and WORLD_SIZE; a plain `python` is a world of one.

    Sets the CPU threads of this process and the device. Not collective. Raises ConfigError if CUDA was asked for and
    there is none.
    """
    rank = int(os.environ.setdefault("RANK", "0"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    size = int(os.environ.setdefault("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and runtime.device != "cpu"
    if runtime.device == "cuda" and not cuda:
        raise ConfigError("runtime.device: cuda was asked for, but torch finds no CUDA device; use runtime.device=cpu")
    torch.set_num_threads(runtime.threads or cores_of_rank(size))
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and warns
    # Moments of tiny gradients are denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"local rank {local_rank}, but {torch.cuda.device_count()} GPUs: start fewer processes")
        torch.cuda.set_device(local_rank)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return World(rank, local_rank, size, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


def local_world_size(world_size: int) -> int:
    """Ranks on this machine: torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_of_rank(world_size: int) -> int:
    """A rank's share of the cores; under Slurm, which may bind each process to cores of its own, all of those."""
    own = cores()
    bound = own < int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))
    return own if bound else max(1, own // local_world_size(world_size))


def loader_workers(asked: int | None, world: World, *, on_cpu: int) -> int:
    """Data loading processes of this rank: what was asked for; else beside a GPU the cores shared out, at most 8.

    on_cpu: how many where the model needs the cores itself. One process prepares thousands of training samples a second.
    """
    if asked is not None:
        return asked
    return min(8, cores_of_rank(world.size)) if world.device.type == "cuda" else on_cpu


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The compute precision of a run, for forwards outside the engine: a teacher, an evaluation."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def rendezvous_alone() -> None:
    """Lets a plain `python` form a process group of one, on a free loopback port."""
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("several ranks, but MASTER_ADDR is not set: use a launcher, or set it and MASTER_PORT")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


def barrier() -> None:
    """Collective. Waits for all ranks; alone it does nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Collective. Rank 0's value on every rank: file-system facts are decided once."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Collective. Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Collective. Element-wise sum of a few numbers, in one reduction."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


def leave_process_group() -> None:
    """Collective. Waits for all ranks and ends the group, where there is one."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
