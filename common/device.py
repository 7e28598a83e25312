"""The device that a program computes on, and the available memory of the host."""

from pathlib import Path

import torch

from .config import Config
from .errors import InputError


def use_device(config: Config) -> None:
    """Make the config's device the current one. InputError if it is a GPU that does not exist."""
    kind, _, index = config.device.partition(":")
    if kind == "cuda":
        if int(index or 0) >= torch.cuda.device_count():
            reason = "torch finds no such CUDA GPU"
            raise InputError(f"device is {config.device!r}, but {reason}; use --device cpu")
        if index:  # CUDA graphs and synchronisation use the current device
            torch.cuda.set_device(config.device)


def available_memory() -> int:
    """Bytes of host memory available to this process; 0 if unknown."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        return 0
    group = Path("/sys/fs/cgroup")  # a container may have a lower limit than the machine
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free
