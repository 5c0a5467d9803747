"""What a measurement was made on, in words."""

import os
import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> str:
    """The GPU, or the CPU with the threads that torch uses, and torch's version."""
    version = f"torch {torch.__version__.partition('+')[0]}"
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, {version}"
    threads = torch.get_num_threads()
    return f"{_cpu()} ({os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}), {version}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
