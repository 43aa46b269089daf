"""What the GPU benchmarks share: where a run took place, the state of the card, and the clock.

python -m benchmarks.machine        # prints this machine's block
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pose_render import commit, processor
from benchmarks.vae import synchronize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "flash-attn",
    "flash-attn-3",
    "xformers",
    "numpy",
    "transformers",
)
LEAST_CLOCK = 0.9
"""A turn whose clock fell below this share of the first turn's is not counted."""

_NUMBER = re.compile(r"[0-9.]+")
# Name in nvidia-smi -> name in the results.
_QUERY = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "utilization.gpu": "utilization_percent",
}


def environment(module: str, device: str) -> dict[str, Any]:
    """Returns what is needed to repeat a run: command, commit, machine, versions.

    Args:
        module: as it is called, "benchmarks.dit".
        device: "cpu" or "cuda".
    """
    cuda = device.startswith("cuda")
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit(),
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "capability": list(torch.cuda.get_device_capability()) if cuda else None,
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
            "driver": _smi("driver_version") if cuda else None,
            "cpu": processor(),
            "load_average": round(os.getloadavg()[0], 1),
        },
        "card": card_state() if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda if cuda else None,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            **{name: found for name in PACKAGES if (found := installed(name))},
        },
    }


def installed(package: str) -> str | None:
    """Returns the version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def card_state() -> dict[str, float] | None:
    """Returns clocks, power and temperature of the first card; None without `nvidia-smi`."""
    text = _smi(",".join(_QUERY))
    return None if text is None else parse_state(text)


def parse_state(text: str) -> dict[str, float]:
    """Returns the numbers of one line of `nvidia-smi`; what a card does not tell is left out."""
    words = dict(zip(_QUERY.values(), map(str.strip, text.split(",")), strict=True))
    return {name: float(word) for name, word in words.items() if _NUMBER.fullmatch(word)}


def _smi(query: str) -> str | None:
    """Returns the first line that `nvidia-smi` prints for a query, None if it cannot."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:  # a figure without clocks is better than none
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Returns the seconds of one call: between CUDA events, or wall time on the CPU."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def median_seconds(
    call: Callable[[], object], device: str, *, warm_ups: int = 3, rounds: int = 10
) -> float:
    """Returns the median seconds of several calls, after some that are not counted."""
    for _ in range(warm_ups):
        call()
    synchronize(device)
    return statistics.median(seconds_of(call, device) for _ in range(rounds))


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Returns median, least and most of timed calls, and how many there are."""
    return {
        "median_s": round(statistics.median(seconds), 6),
        "min_s": round(min(seconds), 6),
        "max_s": round(max(seconds), 6),
        "timed": len(seconds),
    }


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Returns |value - exact| / |exact|, both as vectors, in float32."""
    exact = exact.float()
    return ((value.float() - exact).norm() / exact.norm()).item()


def write(report: dict[str, Any], path: Path) -> Path:
    """Writes a report as JSON and returns its path; a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


if __name__ == "__main__":
    here = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(environment("benchmarks.machine", here), indent=1))
