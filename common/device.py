"""The device that a program computes on, and how much memory its host has left."""

from pathlib import Path

import torch

from .config import Config
from .errors import InputError


def use_device(config: Config) -> None:
    """Make the config's device the current one. InputError if it is a GPU that is not there."""
    kind, _, index = config.device.partition(":")
    if kind == "cuda":
        if int(index or 0) >= torch.cuda.device_count():
            reason = "torch finds no CUDA GPU of this number"
            raise InputError(f"device is {config.device!r}, but {reason}; give --device cpu")
        if index:  # graphs are captured, and waited for, on the current device
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
