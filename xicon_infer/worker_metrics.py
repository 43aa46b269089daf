"""Numbers of a worker's life: kept in the process, read as a dictionary or as Prometheus text.

A serverless worker has no port to read them from; `action: health` answers with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

Labels: TypeAlias = "tuple[tuple[str, str], ...]"

SERIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "xicon_jobs_total": ("counter", "Jobs that ended, by mode and outcome."),
        "xicon_errors_total": ("counter", "Jobs that failed, by error code."),
        "xicon_warnings_total": ("counter", "Warnings in answers, by code."),
        "xicon_job_seconds_total": ("counter", "Seconds of successful jobs, by mode."),
        "xicon_stage_seconds_total": ("counter", "Seconds of jobs, by stage."),
        "xicon_frames_total": ("counter", "Frames made, by mode."),
        "xicon_output_bytes_total": ("counter", "Bytes of videos made."),
        "xicon_gpu_oom_total": ("counter", "Times that the device ran out of memory."),
        "xicon_redelivered_total": ("counter", "Answers given again to a job that came twice."),
        "xicon_job_running": ("gauge", "1 while a job runs."),
        "xicon_peak_memory_bytes": (
            "gauge",
            "Most memory of a stage of the last job.",
        ),
        "xicon_start_seconds": ("gauge", "Seconds from the start of the process to ready."),
        "xicon_start_step_seconds": ("gauge", "Seconds of each step of the start."),
        "xicon_uptime_seconds": ("gauge", "Seconds since the start."),
    }
)
"""Name -> kind and help."""


class Metrics:
    """Counts and gauges of one worker.

    last_error: code of the last job that failed, "" before the first.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.last_error = ""
        self._clock, self._start = clock, clock()
        self._values: dict[str, dict[Labels, float]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        key = _key(name, labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            series[key] = series.get(key, 0) + amount

    def put(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        key = _key(name, labels)
        with self._lock:
            self._values.setdefault(name, {})[key] = value

    def get(self, name: str, **labels: str) -> float:
        """Returns the sum of all series of a name that have the labels; 0 without any."""
        wanted = set(labels.items())
        with self._lock:
            series = self._values.get(name, {})
            return sum(value for key, value in series.items() if wanted <= set(key))

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return round(self._clock() - self._start, 3)

    def numbers(self) -> dict[str, float]:
        """Returns every series as `name{label="value"}` -> number."""
        self.put("xicon_uptime_seconds", self.uptime_s)
        with self._lock:
            return {
                f"{name}{_shown(key)}": _tidy(value)
                for name in SERIES
                for key, value in sorted(self._values.get(name, {}).items())
            }

    def prometheus_text(self) -> str:
        """Returns the numbers in the text format of Prometheus, version 0.0.4."""
        numbers = self.numbers()
        lines = []
        for name, (kind, about) in SERIES.items():
            mine = [item for item in numbers.items() if item[0].partition("{")[0] == name]
            if mine:
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                lines += [f"{series} {value:.17g}" for series, value in mine]
        return "\n".join([*lines, ""])


def _key(name: str, labels: Mapping[str, str]) -> Labels:
    if name not in SERIES:
        raise ValueError(f"{name} is no series: add it to SERIES")
    return tuple(sorted(labels.items()))


def _shown(key: Labels) -> str:
    if not key:
        return ""
    pairs = (f'{label}="{_escaped(text)}"' for label, text in key)
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _tidy(value: float) -> float:
    return int(value) if float(value).is_integer() else round(value, 3)
