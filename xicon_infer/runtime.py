"""Device, dtype, seed, time and memory of a job. The environment is read here and nowhere else.

torch is imported inside the functions that need it, so that the command line can check its
arguments, and print a plan, without loading it.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xicon_infer.errors import BackendUnavailable
from xicon_infer.types import Progress, Stage

if TYPE_CHECKING:
    import torch

MAX_DRAWN_SEED = 2**53 - 1
"""Drawn seeds stay exact in JavaScript clients."""

REPORTED_PACKAGES = ("torch", "transformers", "tokenizers", "av", "numpy", "pillow")


def models_dirs(explicit: Path | None) -> list[Path]:
    """Returns the folders searched for weights: the given one, then XICON_MODELS_DIR.

    XICON_MODELS_DIR may name several folders, separated like PATH.
    """
    named = os.environ.get("XICON_MODELS_DIR", "").split(os.pathsep)
    return [*([explicit] if explicit else []), *(Path(part) for part in named if part)]


def cache_dir() -> Path:
    """Returns where things that can be made again are kept: XICON_CACHE_DIR or the user's."""
    if named := os.environ.get("XICON_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "xicon-infer"


def forbid_ultralytics_network() -> None:
    """Tells ultralytics, which reads it when first imported, to load, send and install nothing."""
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"


def debug_enabled() -> bool:
    """Returns True if XICON_DEBUG is set: the command line then shows tracebacks."""
    return os.environ.get("XICON_DEBUG", "") not in ("", "0")


def pick_device(requested: str) -> torch.device:
    """Returns the device for "auto", "cuda" or "cpu".

    Raises:
        BackendUnavailable: "cuda" was asked for and there is none.
    """
    import torch

    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "'device' is 'cuda' but PyTorch sees no GPU; use 'cpu' or 'auto', or install a driver",
            field="device",
        )
    return torch.device(requested)


def pick_dtype(requested: str, device: torch.device) -> torch.dtype:
    """Returns the compute dtype for "auto", "bf16", "fp16" or "fp32".

    Auto is bfloat16 on a GPU and float32 on the CPU, where half precision is slow.
    """
    import torch

    if requested == "auto":
        requested = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[requested]


def pick_seed(requested: int) -> int:
    """Returns the seed, or one drawn from the operating system's random source for -1."""
    return secrets.randbelow(MAX_DRAWN_SEED + 1) if requested < 0 else requested


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    from xicon_infer import __version__

    packages = {name: _version(name) for name in REPORTED_PACKAGES}
    return {"xicon-infer": __version__, "python": platform.python_version(), **packages}


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


class Recorder:
    """A `Progress` that measures each stage and passes everything on to another one.

    stages and warnings are filled as the job runs. Nested stages are measured too.

    Args:
        inner: where to pass everything on to.
        device: whose memory is measured; on the CPU the peak is that of the whole process so
            far, because the operating system keeps no other.
    """

    def __init__(self, inner: Progress, device: torch.device) -> None:
        self.inner = inner
        self.device = device
        self.stages: list[Stage] = []
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what runs inside; the time includes the device's work."""
        start = time.perf_counter()
        self._reset_peak()
        with self.inner.stage(name):
            yield
            peak = self._peak()
        self.stages.append(Stage(name, round(time.perf_counter() - start, 3), peak))

    def step(self, done: int, total: int, unit: str = "step") -> None:
        """Passes the count on."""
        self.inner.step(done, total, unit)

    def warn(self, message: str) -> None:
        """Keeps the message once and passes it on."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.inner.warn(message)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        # Linux counts kibibytes, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
