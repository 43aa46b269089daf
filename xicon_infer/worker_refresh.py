"""When a worker asks the platform for a fresh one: never for a fault of the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GROWN_BYTES = 2**30
"""Device memory above that after the first job of the same networks, which is then a leak."""
LEAST_DISK_BYTES = 2 * 10**9
INTERNAL_IN_A_ROW = 3
_ALWAYS = "REFRESH_WORKER is set"
ALWAYS_FRESH = ("GPU_ERROR",)
"""Codes after which the CUDA context is lost."""


@dataclass(frozen=True)
class Usage:
    """What the machine has after a job: allocated device memory and free disk, in bytes."""

    allocated_bytes: int
    free_disk_bytes: int


class RefreshPolicy:
    """Decides after each job.

    Args:
        always: ask after every job (REFRESH_WORKER).
        max_jobs: ask after that many; 0 for never.
        usage: looks at the machine.
    """

    def __init__(self, *, always: bool, max_jobs: int, usage: Callable[[], Usage]) -> None:
        self._always, self._max_jobs, self._usage = always, max_jobs, usage
        self._baselines: dict[tuple[str, ...], int] = {}
        self._jobs = 0
        self._internal = 0

    def settle(self, loaded: tuple[str, ...]) -> None:
        """Takes what is allocated now, after the warm-up, as the baseline of these networks."""
        self._baselines[loaded] = self._usage().allocated_bytes

    def after_job(self, code: str, loaded: tuple[str, ...], *, worked: bool = True) -> str:
        """Returns why a fresh worker is needed, "" if it is not.

        Args:
            code: of the error, "" for a success.
            loaded: names the networks that stay loaded; each set has a baseline of its own.
            worked: False for a request that was answered without the device.
        """
        if not worked and code != "INTERNAL":
            return _ALWAYS if self._always else ""
        self._jobs += 1
        self._internal = self._internal + 1 if code == "INTERNAL" else 0
        usage = self._usage()
        if not code and loaded:
            self._baselines.setdefault(loaded, usage.allocated_bytes)
        baseline = self._baselines.get(loaded, usage.allocated_bytes)
        reasons = {
            _ALWAYS: self._always,
            "the CUDA context is lost": code in ALWAYS_FRESH,
            "device memory grew": usage.allocated_bytes > baseline + GROWN_BYTES,
            "XICON_MAX_JOBS is reached": 0 < self._max_jobs <= self._jobs,
            "the disk is full": usage.free_disk_bytes < LEAST_DISK_BYTES,
            "internal errors repeat": self._internal >= INTERNAL_IN_A_ROW,
        }
        return next((reason for reason, true in reasons.items() if true), "")
