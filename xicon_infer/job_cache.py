"""The options of the step cache: a part of the table of options, and what does not go together.

The caches are `xicon_infer.sampling.step_cache`; their defaults are here, so that a job is refused
before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from xicon_infer.errors import InvalidRequest
from xicon_infer.job_field import Field, choice_of
from xicon_infer.types import FEWEST_CACHED_STEPS, STEP_CACHES

USUAL_STARTS: Mapping[str, int] = MappingProxyType({"teacache": 1, "magcache": 1, "easycache": 10})
"""Method -> the first step in which it works, if nothing is said."""

_CACHE_HELP = (
    f"skip steps that change little; from {FEWEST_CACHED_STEPS} steps on; long videos need "
    "--context-schedule static_standard"
)
_THRESHOLD_HELP = (
    "how much may change before a step is computed; auto: teacache 0.3 (0.08 with 1.3b), "
    "magcache 0.02, easycache 0.015"
)
_START_HELP = "first step that may be skipped, from 0; auto: easycache 10, else 1"

STEP_CACHE: tuple[Field, ...] = (
    choice_of("step_cache", "sampling", _CACHE_HELP, *STEP_CACHES),
    Field(
        "step_cache_threshold", "number", "sampling", _THRESHOLD_HELP, "auto", 0, 1, also=("auto",)
    ),
    Field("step_cache_start", "integer", "sampling", _START_HELP, "auto", 0, 99, also=("auto",)),
    Field(
        "step_cache_end", "integer", "sampling", "last such step; -1: all", -1, 0, 99, also=(-1,)
    ),
)


def first_cached(method: str, start: int | None) -> int:
    """Returns the first step in which a cache works."""
    return USUAL_STARTS.get(method, 0) if start is None else start


def refuse_cache(
    method: str, span: tuple[int | None, int], num_steps: int, guidance_batching: str
) -> None:
    """Refuses a cache in a run that it does not suit.

    Args:
        method: of `STEP_CACHES`; "none" suits every run.
        span: first step in which it works, None for the usual one, and last, -1 for the run's.
        num_steps: of the run.
        guidance_batching: as the option of that name.

    Raises:
        InvalidRequest: naming the option to change.
    """
    if method == "none":
        return
    if num_steps < FEWEST_CACHED_STEPS:
        raise InvalidRequest(
            f"'step_cache' {method} needs at least {FEWEST_CACHED_STEPS} steps, got {num_steps}: "
            "neighbouring steps of so few differ too much to reuse one; use none, or more steps "
            "(profile quality)",
            field="step_cache",
            code="OUT_OF_RANGE",
        )
    if method == "easycache" and guidance_batching == "batched":
        raise InvalidRequest(
            "'guidance_batching' batched does not go with 'step_cache' easycache, which decides "
            "for each branch alone; use sequential or auto",
            field="guidance_batching",
            code="INVALID_CHOICE",
        )
    first, last = first_cached(method, span[0]), num_steps - 1 if span[1] == -1 else span[1]
    if first > min(last, num_steps - 1):
        raise InvalidRequest(
            f"'step_cache_start' {first} is behind the last cached step, "
            f"{min(last, num_steps - 1)} of steps 0 to {num_steps - 1} ('step_cache_end' "
            f"{span[1]}); use a smaller start",
            field="step_cache_start",
            code="OUT_OF_RANGE",
        )
