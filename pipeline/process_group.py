"""Joining the peers: DeepSpeed's process group, and what it leaves on a machine when it is not looked after."""

import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root

from pipeline.distributed import World, rendezvous_alone
from pipeline.errors import ConfigError


def start_process_group(world: World, patience: float | None = None) -> None:
    """Collective. Joins the peers: nccl on GPUs, gloo on CPUs.

    patience: seconds that a rank may keep the others waiting in a collective; the heartbeat says more, so it is first.
    Raises ConfigError if the ranks can't meet.
    """
    rendezvous_alone()
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=2 * patience + 60 if patience else 7 * 86400)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_extensions_folder()))
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = "the port is taken" if "EADDRINUSE" in str(error) else " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the ranks can't meet at {where}: {reason}; give the launcher another --master_port"
        ) from None
    if backend == "gloo":
        dist.barrier()  # each rank has opened every other's
        for segment in shared_memory(world.rank):
            segment.unlink(missing_ok=True)


def shared_memory(rank: int) -> list[Path]:
    """The segment through which this rank reduces with the others of its machine, while it has a name.

    DeepSpeed makes one of 69 MB for each rank on a CPU and never removes it. Without its name it goes with the last
    process that holds it, also when that is killed.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"))


def _extensions_folder() -> Path:
    """Where what DeepSpeed compiles for this environment lies, below torch's own folder: environments that share that
    one compile it anew in turns, a minute each time."""
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    return Path(get_default_build_root()) / f"vitruvian-{environment}"
