"""The device that a program computes on, and how much memory its host has left."""

from pathlib import Path

import torch

from .config import Config
from .errors import InputError


def use_device(config: Config) -> None:
    """Make the config's device the current one. InputError if it is a GPU that is not there."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device is {config.device!r}, but torch finds no CUDA GPU; give --device cpu"
        )
    if ":" in config.device:  # graphs are captured, and waited for, on the current device
        if int(config.device.split(":")[1]) >= torch.cuda.device_count():
            raise InputError(
                f"device is {config.device!r}, but there are {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(config.device)


def available_memory() -> int:
    """Bytes of memory that the host can still give this process; 0 where that can't be told."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        return 0
    group = Path("/sys/fs/cgroup")  # a container may allow less than the machine has
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free
