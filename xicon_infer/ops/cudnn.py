"""What is special about cuDNN and the 3-D convolutions of the VAE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# torch 2.9 and newer send half-precision 3-D convolutions to a kernel that is 10 to 20 times
# slower and needs several times the memory, unless cuDNN is at least 9.15 (pytorch/pytorch issue
# 166122).
_FIRST_SLOW_TORCH = (2, 9)
_LEAST_CUDNN = 91500


def conv3d_trap(torch_version: str, cudnn_version: int) -> str:
    """Returns why 3-D convolutions in half precision would be slow or wrong here, or "".

    Args:
        torch_version: as "2.9.1+cu130".
        cudnn_version: as 91500 for 9.15.
    """
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version < _FIRST_SLOW_TORCH or cudnn_version >= _LEAST_CUDNN:
        return ""
    return (
        f"torch {torch_version} with cuDNN {cudnn_version} decodes video 10 to 20 times slower; "
        f"install cuDNN {_LEAST_CUDNN} or newer"
    )


def trap_here(device_type: str) -> str:
    """Returns `conv3d_trap` of this process, "" where nothing runs on a GPU.

    Args:
        device_type: where the VAE runs, as "cuda".
    """
    import torch

    if device_type != "cuda" or torch.version.hip is not None:
        return ""
    found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return conv3d_trap(torch.__version__, found or 0)


@contextmanager
def searching(on: bool) -> Iterator[None]:
    """Has cuDNN time its kernels at the first call of every shape inside, if `on`.

    It pays where the same shapes come often; each one costs the first call some time and memory.
    """
    import torch

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
