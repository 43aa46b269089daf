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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xicon_infer.errors import BackendUnavailable
from xicon_infer.types import Progress, Stage

if TYPE_CHECKING:
    import torch

MAX_DRAWN_SEED = 2**53 - 1
"""Drawn seeds stay exact in JavaScript clients."""

COMFYUI_VARIABLES = ("COMFYUI_PATH", "COMFYUI_DIR", "COMFYUI_HOME")
"""Each may name the folder of a ComfyUI, or its `models` folder."""

REPORTED_PACKAGES = ("torch", "transformers", "tokenizers", "av", "numpy", "pillow")


def models_dirs(explicit: Path | None) -> list[Path]:
    """Returns the folders searched for weights, the first one first.

    The given one; those of XICON_MODELS_DIR, which may name several, separated like PATH; then
    those of `usual_models_dirs` that exist. The first two stay in the list even if they do not
    exist, because somebody meant them.
    """
    usual = usual_models_dirs(os.environ, home=_home(), root=Path("/"))
    every = [*([explicit] if explicit else []), *_named_models_dirs(), *filter(_is_dir, usual)]
    return list(dict.fromkeys(every))


def usual_models_dirs(environment: Mapping[str, str], *, home: Path, root: Path) -> list[Path]:
    """Returns the folders in which people keep weights, whether they exist or not.

    `models` here, weights baked into an image, RunPod's model cache, network volumes, ComfyUI,
    and the Hugging Face cache.

    Args:
        environment: COMFYUI_PATH, COMFYUI_DIR or COMFYUI_HOME name a ComfyUI; HF_HUB_CACHE,
            HUGGINGFACE_HUB_CACHE, HF_HOME and XDG_CACHE_HOME move the Hugging Face cache.
        home: of the user.
        root: of the file system.

    Source: runpod/docs: model caching; runpod/runpod-python (its SDK names /runpod/cache, the
    documents /runpod-volume, so both are searched); huggingface/huggingface_hub: constants.py.
    """
    volumes = [root / "runpod-volume", root / "workspace"]
    comfyui = [environment[name] for name in COMFYUI_VARIABLES if environment.get(name)]
    return [
        Path("models"),
        root / "models",
        volumes[0] / "huggingface-cache" / "hub",
        root / "runpod" / "cache",
        *(volume / "models" for volume in volumes),
        *(volume / "ComfyUI" for volume in volumes),
        *(Path(path).expanduser() for path in comfyui),
        *(home / name for name in ("ComfyUI", "comfy/ComfyUI", "Documents/ComfyUI")),
        root / "ComfyUI",
        root / "opt" / "ComfyUI",
        _hub_cache(environment, home),
    ]


def download_dir(explicit: Path | None) -> Path:
    """Returns where weights are put: the given folder, else the first of XICON_MODELS_DIR.

    Without either, the `models` folder of a network volume if there is one, else `models` here.
    """
    volumes = (Path("/runpod-volume/models"), Path("/workspace/models"))
    named = [path for path in _named_models_dirs() if path.suffix not in (".yaml", ".yml")]
    given = [*([explicit] if explicit else []), *named, *filter(_is_dir, volumes)]
    return given[0] if given else Path("models")


def expand_path(text: str) -> Path:
    """Returns a path with `~` and variables replaced; unknown variables stay as they are."""
    return Path(os.path.expandvars(text)).expanduser()


def _named_models_dirs() -> list[Path]:
    parts = os.environ.get("XICON_MODELS_DIR", "").split(os.pathsep)
    return [Path(part) for part in parts if part]


def _hub_cache(environment: Mapping[str, str], home: Path) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    base = Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
    return Path(environment.get("HF_HOME") or base).expanduser() / "hub"


def _home() -> Path:
    """Returns the user's folder; a user without one, as in some containers, has none to search."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a folder that may not be looked into
        return False


def cache_dir() -> Path:
    """Returns where things that can be made again are kept: XICON_CACHE_DIR or the user's."""
    if named := os.environ.get("XICON_CACHE_DIR"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(_home() / ".cache")
    return Path(base) / "xicon-infer"


def keep_compiled_kernels() -> None:
    """Has Triton and torch.compile keep what they compile beside everything else that is kept.

    What TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR name already stays. Both are read when a
    kernel is made, so this may come after torch is imported. Where nothing can be written, both
    use folders of their own.
    """
    folders = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    for variable, name in folders.items():
        folder = cache_dir() / name
        if not os.environ.get(variable) and _can_write(folder):
            os.environ[variable] = str(folder)


def _can_write(folder: Path) -> bool:
    """Returns whether a folder is there, made if need be, and takes files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def forbid_ultralytics_network() -> None:
    """Tells ultralytics, which reads it when first imported, to load, send and install nothing."""
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"


def environment() -> dict[str, str]:
    """Returns the environment of the process, for the table of settings."""
    return dict(os.environ)


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

    stages and warnings are filled as the job runs. Nested stages are measured too. check: called at
    each step; raises what went wrong in work that runs at the same time.

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
        self.check: Callable[[], None] = lambda: None

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
        """Passes the count on, if nothing went wrong elsewhere."""
        self.check()
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
