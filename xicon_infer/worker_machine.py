"""What the worker looks at: the device's memory, the disk, and what an error means for them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xicon_infer.worker_refresh import Usage

_CUDA_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "device-side assert")


def device_facts() -> dict[str, Any]:
    """Returns name, total and free memory of the GPU; None each without one.

    torch is looked at only if it is loaded already: a health request loads nothing.
    """
    torch = sys.modules.get("torch")
    nothing = {"gpu": None, "vram_total_bytes": None, "vram_free_bytes": None}
    if torch is None or not torch.cuda.is_available():
        return nothing
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return {"gpu": name, "vram_total_bytes": int(total), "vram_free_bytes": int(free)}


def usage(folder: Path) -> Callable[[], Usage]:
    """Returns a function that looks at the machine; the disk is that of the folder."""

    def look() -> Usage:
        torch = sys.modules.get("torch")
        cuda = torch is not None and torch.cuda.is_available()
        allocated = int(torch.cuda.memory_allocated()) if torch is not None and cuda else 0
        return Usage(allocated, free_disk(folder))

    return look


def free_disk(folder: Path) -> int:
    """Returns the free bytes of the disk that a folder, or its nearest parent, is on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_device_error(error: BaseException) -> bool:
    """Returns True for an error after which CUDA cannot be used in this process any more."""
    if type(error).__name__ == "AcceleratorError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in _CUDA_WORDS)
