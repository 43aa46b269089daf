"""What a worker makes sure of before it takes a job: the same checks that `doctor` shows.

`run_checks` looks at the machine through `Probes`, cheapest first, and returns one result each; it
raises nothing and loads no model. What a GPU is needed for is left out where there is none: the
one result that says so is enough. PyTorch is imported by the probes that need it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

from xicon_infer.checks_gpu import conv3d_trap as conv3d_trap
from xicon_infer.checks_gpu import gpu_checks
from xicon_infer.checks_gpu import provider_trap as provider_trap
from xicon_infer.checks_machine import machine_checks
from xicon_infer.checks_probes import REAL
from xicon_infer.checks_probes import Probes as Probes
from xicon_infer.checks_types import Check, MemoryRequest, Outcome
from xicon_infer.checks_types import CheckNeeds as CheckNeeds
from xicon_infer.checks_types import CheckResult as CheckResult
from xicon_infer.checks_weights import WEIGHTS, weights_checks
from xicon_infer.errors import BackendUnavailable, XiconError
from xicon_infer.job_profiles import PRESETS
from xicon_infer.request_field import DANCING, PIPELINES
from xicon_infer.request_job import KERNELS, MEMORY
from xicon_infer.settings import Settings
from xicon_infer.settings_table import MODES

TINY = "tiny"
POSE_SET = "pose/default"

_ERRORS = (
    XiconError,
    OSError,
    RuntimeError,
    ImportError,
    ValueError,
    TypeError,
    AttributeError,
    subprocess.SubprocessError,
)
"""What a look at a broken machine raises; a check then fails, it does not end the others."""


def run_checks(
    needs: CheckNeeds, *, probes: Probes = REAL, clock: Callable[[], float] = time.perf_counter
) -> list[CheckResult]:
    """Returns the results, in the order of the checks.

    Args:
        needs: what the machine must be able to do.
        probes: how the machine is looked at.
        clock: gives seconds.
    """
    checks = chain(machine_checks(needs, probes), gpu_checks(needs, probes), weights_checks(needs))
    return [_timed(name, check, clock) for name, check in checks]


def ready_modes(needs: CheckNeeds, results: Sequence[CheckResult]) -> tuple[str, ...]:
    """Returns the modes whose weights are all there.

    Args:
        needs: as given to `run_checks`.
        results: as it returned them.
    """
    good = {result.name for result in results if result.state == "ok"}
    return tuple(mode for mode in needs.modes if f"{WEIGHTS} {mode}" in good)


def failures(results: Sequence[CheckResult]) -> str:
    """Returns one sentence per failed check, with what to do; "" if a worker may start."""
    return " ".join(
        f"{result.name}: {result.text}.{f' To do: {result.fix}.' if result.fix else ''}"
        for result in results
        if result.state == "fail"
    )


def require(results: Sequence[CheckResult]) -> None:
    """Does nothing if a worker may start.

    Raises:
        BackendUnavailable: a check failed; the message names all that did, and what to do.
    """
    if text := failures(results):
        raise BackendUnavailable(text, code="NOT_READY")


def needs_of(
    settings: Settings,
    search_dirs: Sequence[Path],
    *,
    bucket: Callable[[], None] | None = None,
    gpu: bool | None = None,
) -> CheckNeeds:
    """Returns what a worker with these settings needs.

    With all modes on offer, which is the default, one complete mode is enough.

    Args:
        settings: of the worker.
        search_dirs: folders with weights.
        bucket: raises what is wrong with the storage; None where there is none, or nothing shall
            be tried.
        gpu: whether a GPU is needed; None for yes unless the weights are the tiny ones.
    """
    modes = {mode: sets_of(mode, settings.preset_for(mode)) for mode in settings.modes}
    return CheckNeeds(
        modes=modes,
        search_dirs=tuple(search_dirs),
        any_mode=set(settings.modes) == set(MODES),
        gpu=settings.preset != TINY if gpu is None else gpu,
        memory=cast("MemoryRequest", MEMORY[settings.memory]),
        attention=KERNELS.get(settings.attention, ()),
        tmp=settings.tmp,
        verify=settings.verify_weights,
        bucket=bucket,
        default_video=settings.default_video,
    )


def sets_of(mode: str, preset: str | None) -> tuple[str, ...]:
    """Returns the sets of weights of a mode, as "scail/fp8"; none for tiny weights.

    Args:
        mode: one of `MODES`.
        preset: the one to use; the first of the mode if None, or if it has no such preset.
    """
    pipeline = PIPELINES[mode]
    if pipeline == "pose":
        return (POSE_SET,)
    if preset == TINY:
        return ()
    known = PRESETS[pipeline]
    name = f"{pipeline}/{preset if preset in known else known[0]}"
    return (name, POSE_SET) if mode in DANCING else (name,)


def _timed(name: str, check: Check, clock: Callable[[], float]) -> CheckResult:
    start = clock()
    try:
        outcome = check()
    except _ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        outcome = Outcome("fail", f"cannot be checked: {reason}")
    return CheckResult(name, outcome.state, outcome.text, round(clock() - start, 3), outcome.fix)
