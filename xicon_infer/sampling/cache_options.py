"""What a step cache is asked to do. This module needs neither torch nor numpy.

The caches themselves are in `xicon_infer.sampling.step_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from xicon_infer.errors import InvalidRequest
from xicon_infer.job_cache import first_cached, refuse_cache
from xicon_infer.types import STEP_CACHES

SMALL_VARIANT = "1_3B"
"""The variant of the small model, whose time embedding moves less from step to step."""

_THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {"none": 0.0, "teacache": 0.3, "magcache": 0.02, "easycache": 0.015}
)
_SMALL_TEACACHE = 0.08

KEPT_TENSORS: Mapping[str, int] = MappingProxyType(
    {"none": 0, "teacache": 1, "magcache": 1, "easycache": 2}
)
"""Method -> tensors as large as the predicted tokens that it keeps for every branch."""


@dataclass(frozen=True)
class CacheOptions:
    """Which steps may be skipped, and when.

    method: of `STEP_CACHES`; "none" computes every step. threshold: how much may change before a
    step is computed, 0 to 1; None for the usual one of the method. start, end: first and last
    step in which it works, both included; None for the usual start, -1 for the last step.
    variant: whose calibration is used, a key of `cache_tables.MAGCACHE_RATIOS`.

    Raises:
        InvalidRequest: a value that cannot be used.
    """

    method: str = "none"
    threshold: float | None = None
    start: int | None = None
    end: int = -1
    variant: str = "14B"

    def __post_init__(self) -> None:
        if self.method not in STEP_CACHES:
            raise InvalidRequest(
                f"'step_cache' must be one of {', '.join(STEP_CACHES)}, got {self.method!r}",
                field="step_cache",
                code="INVALID_CHOICE",
            )
        if not 0 <= self.used_threshold <= 1:
            raise InvalidRequest(
                f"'step_cache_threshold' must be between 0 and 1, got {self.threshold}",
                field="step_cache_threshold",
                code="OUT_OF_RANGE",
            )
        if self.end < -1 or self.used_start < 0:
            raise InvalidRequest(
                "'step_cache_start' and 'step_cache_end' must be 0 or more (-1 = the last step), "
                f"got {self.start} and {self.end}",
                field="step_cache_start",
                code="OUT_OF_RANGE",
            )

    @property
    def used_threshold(self) -> float:
        """Returns the threshold, or the usual one of the method."""
        if self.threshold is not None:
            return self.threshold
        small = self.method == "teacache" and self.variant == SMALL_VARIANT
        return _SMALL_TEACACHE if small else _THRESHOLDS[self.method]

    @property
    def used_start(self) -> int:
        """Returns the first step in which the cache works."""
        return first_cached(self.method, self.start)

    @property
    def active(self) -> bool:
        """Returns True if steps may be skipped."""
        return self.method != "none"

    def check(self, num_steps: int, guidance_batching: str) -> None:
        """Refuses a cache in a run that it does not suit, as `refuse_cache` does."""
        refuse_cache(self.method, (self.start, self.end), num_steps, guidance_batching)


def variant_of(pipeline: str, weights: str) -> str:
    """Returns whose calibration suits the weights of a pipeline.

    SCAIL and SteadyDancer have none of their own and take that of text to video, as the wrapper,
    which goes by the name of the file, takes it for them.

    Args:
        pipeline: as "wan_i2v".
        weights: name of the preset or of the file.
    """
    if "1.3b" in weights.lower():
        return SMALL_VARIANT
    if pipeline != "wan_i2v":
        return "14B"
    large = "720" in weights or "flf2v" in weights.lower()
    return "i2v_720" if large else "i2v_480"
