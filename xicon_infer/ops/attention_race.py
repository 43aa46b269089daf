"""Which attention kernel is fastest for one shape: measured, and remembered on disk.

Kernels run in turns, on random numbers of the very shape. One that fails or does not find enough
memory leaves the race with its reason; one that is hopelessly behind after warming up is not timed
again. Results are kept by device, versions and *bucket*: lengths are rounded up to a quarter of
the power of two below them (29,757 and 32,760 to 32,768; 24,024 to 24,576; 7,917 to 8,192), within
which kernels keep their order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xicon_infer.ops.attention import Backend, attention, kernel_context
from xicon_infer.ops.attention_packages import DISTRIBUTIONS, first_line, kernel_errors

WARM_UPS = 2
ROUNDS = 5
HOPELESS = 2.0
"""Times the best; a kernel that needs more when warm is not timed again."""

FORMAT = 1
"""Of the files; raised when what is measured changes."""

_LOG = logging.getLogger(__name__)

Call = Callable[[], object]
Timer = Callable[[Call], float]
"""Runs a call and returns its seconds."""


class Shape(NamedTuple):
    """What one attention call works on: q [batch, queries, heads, head_dim], k [.., keys, ..]."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    def bucket(self) -> Shape:
        """Returns the shape with both lengths rounded up to those of its bucket."""
        return self._replace(queries=rounded_up(self.queries), keys=rounded_up(self.keys))


@dataclass(frozen=True)
class Race:
    """seconds: median by kernel, the fastest first. dropped: kernel -> why it was not timed."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def rounded_up(length: int) -> int:
    """Returns the length rounded up to a quarter of the power of two below it."""
    step = max(1, 2 ** ((length - 1).bit_length() - 3)) if length > 1 else 1
    return -(-length // step) * step


def race(
    names: Sequence[str],
    running: Callable[[str], AbstractContextManager[Call]],
    timer: Timer,
) -> Race:
    """Returns the median seconds of each kernel, timed in turns.

    Args:
        names: who takes part.
        running: gives a call of a kernel, ready to be timed while the context is open.
        timer: times one call.
    """
    timed: dict[str, list[float]] = {name: [] for name in names}
    dropped: dict[str, str] = {}
    for turn in range(WARM_UPS + ROUNDS):
        for name in [name for name in names if name not in dropped]:
            seconds = _timed(name, running, timer)
            if isinstance(seconds, str):
                dropped[name] = seconds
            else:
                timed[name] = [*timed[name], seconds] if turn > WARM_UPS else [seconds]
        if turn == WARM_UPS - 1:
            dropped |= _hopeless({n: s[0] for n, s in timed.items() if n not in dropped})
    medians = {n: statistics.median(s) for n, s in timed.items() if n not in dropped}
    return Race(dict(sorted(medians.items(), key=lambda pair: pair[1])), dropped)


def _timed(
    name: str, running: Callable[[str], AbstractContextManager[Call]], timer: Timer
) -> float | str:
    """Returns the seconds of one call, or why it failed."""
    try:
        with running(name) as call:
            return timer(call)
    except kernel_errors() as error:
        return first_line(error)


def _hopeless(warm: Mapping[str, float]) -> dict[str, str]:
    best = min(warm.values(), default=0.0)
    return {
        name: f"{1e3 * seconds:.3g} ms when warm, {seconds / best:.1f} times the best"
        for name, seconds in warm.items()
        if seconds > HOPELESS * best > 0
    }


def race_on_device(
    shape: Shape, names: Sequence[Backend], device: torch.device, dtype: torch.dtype
) -> Race:
    """Returns the race of some kernels on a GPU; its memory is given back."""
    try:
        parts = random_parts(shape, device, dtype)
    except torch.OutOfMemoryError as error:
        return Race(dropped=dict.fromkeys(names, first_line(error)))
    calls: dict[str, Backend] = {name: name for name in names}

    @contextmanager
    def running(name: str) -> Iterator[Call]:
        with kernel_context(calls[name]):
            yield lambda: attention(*parts, calls[name])

    return race(names, running, cuda_seconds)


def random_parts(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, k and v of a shape, normal numbers; the same for the same shape."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            (shape.batch, length, shape.heads, shape.head_dim),
            generator=generator,
            device=device,
            dtype=dtype,
        )
        for length in (shape.queries, shape.keys, shape.keys)
    )
    return q, k, v


def cuda_seconds(call: Call) -> float:
    """Returns the seconds that a call keeps the GPU busy."""
    event: Any = torch.cuda.Event
    before, after = event(enable_timing=True), event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def race_key(
    shape: Shape, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """Returns everything that a result depends on, as JSON: machine, versions, bucket, kernels."""
    cudnn: Any = torch.backends.cudnn
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "cudnn": cudnn.version(),
        "packages": {name: found for name in DISTRIBUTIONS if (found := _version(name))},
        "bucket": list(shape.bucket()),
        "dtype": str(dtype),
        "kernels": list(names),
    }


def remembered(key: Mapping[str, object], folder: Path | None, run: Callable[[], Race]) -> Race:
    """Returns the race that is kept under a key, or runs and keeps it.

    A file that cannot be read is told in the log and made anew; a folder that cannot be written
    only means that the next process measures again. A race in which nobody arrived is not kept.

    Args:
        key: as `race_key` gives it.
        folder: of the files, None to keep nothing.
        run: measures.
    """
    if folder is None:
        return run()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{name}.json"
    if (found := _load(path, key)) is not None:
        return found
    result = run()
    if result.seconds:
        _save(path, {"key": key, **asdict(result)})
    return result


def _load(path: Path, key: Mapping[str, object]) -> Race | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds = {str(name): float(value) for name, value in content["seconds"].items()}
        dropped = {str(name): str(reason) for name, reason in content["dropped"].items()}
        if content["key"] != key or not seconds or not set(seconds) <= set(_names(key)):
            raise ValueError("it is of something else")
        if not all(0 < value < 3600 for value in seconds.values()):
            raise ValueError("its seconds make no sense")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is measured anew, the file cannot be used: %s", path, error)
        return None
    return Race(seconds, dropped)


def _names(key: Mapping[str, object]) -> list[str]:
    names = key.get("kernels")
    return names if isinstance(names, list) else []


def _save(path: Path, content: Mapping[str, object]) -> None:
    """Writes a file at once: a reader never finds half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("attention timings cannot be kept in %s: %s", path.parent, error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
