"""The noise levels of a sampling run: sigmas, and the timesteps the model is given.

Every sampler is a name from `xicon_infer.types.SCHEDULERS`. A plain name is the table of
ComfyUI-WanVideoWrapper; "/beta" respaces it by a Beta(0.6, 0.6) quantile; "/official" is the
table of the model's own repository. The arithmetic follows each reference down to its mix of
float32 and float64, because some timesteps are cut to whole numbers.

This module needs numpy only. The quantile is computed here instead of with scipy.stats, whose
import alone takes about a second.

A reader may wonder about the grids: the wrapper shifts the ends of its grid once and the whole
grid again ("double shift"), so that its last sigma is larger than in the official tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest
from xicon_infer.types import SCHEDULERS, Float32Array

Levels = npt.NDArray[np.floating[Any]]
"""Sigmas without the final one, in the precision the reference computes them in."""

TRAIN_STEPS = 1000
MAX_STEPS = 1000
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
"""Above 100 the first sigma of the doubly shifted tables rounds to 1, where log-SNR is infinite."""

STEP_LIMITS: dict[str, tuple[int, int]] = {
    "flowmatch_distill": (4, 4),
    "lightx2v_distill": (4, 4),
    "flowmatch_causvid": (1, 9),
    "rcm": (1, 4),
    "longcat_distill_euler": (1, 50),
}
"""Fewest and most steps of the samplers that do not take 1 to MAX_STEPS."""

FIXED_TABLES: tuple[str, ...] = ("flowmatch_causvid", "rcm")
"""Samplers whose table does not depend on the shift."""

INTEGER_TIMESTEPS: tuple[str, ...] = ("unipc", "dpm++", "dpm++_sde", "deis")
"""Samplers that hand the model whole timesteps, cut and not rounded."""

CAUSVID_TIMESTEPS: tuple[int, ...] = (999, 934, 862, 756, 603, 410, 250, 140, 74)
RCM_ANGLES: tuple[float, ...] = (math.atan(120.0), 1.5, 1.4, 1.0)
"""TrigFlow angles of rCM: x = cos(angle) clean + sin(angle) noise. The first is sigma_max 120."""

DEIS_LAST_SIGMA = 1e-6
RES_LAST_GRID_SIGMA = 0.003 / 1.002
BETA_EXPONENT = 0.6


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels one run goes through.

    name: as asked for. sigmas: float32 [n + 1], 1 (noise) to 0 (clean), strictly falling.
    timesteps: float64 [n], 0 to 1000, the values the model is given. start_step: index of the
    first level in the whole table. total_steps: length of the whole table. initial_scale: factor
    on the initial noise (1 but for rcm).
    """

    name: str
    sigmas: Float32Array
    timesteps: npt.NDArray[np.float64]
    start_step: int
    total_steps: int
    initial_scale: float = 1.0

    @property
    def num_steps(self) -> int:
        """Returns n, the steps of this run."""
        return len(self.timesteps)


def make_schedule(
    scheduler: str,
    num_inference_steps: int,
    shift: float,
    *,
    start_step: int = 0,
    end_step: int = -1,
) -> Schedule:
    """Returns the levels of a sampler, or the part [start_step, end_step) of them.

    Args:
        scheduler: a name from `SCHEDULERS`.
        num_inference_steps: steps of the whole table, within `step_limits`.
        shift: 0.01 to 100; larger stays longer at high noise. `FIXED_TABLES` ignore it.
        start_step: first step to run, 0 to num_inference_steps - 1.
        end_step: step to stop before, or -1 for all.

    Raises:
        InvalidRequest: an unknown name, or a number that the sampler cannot use.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/__init__.py; the official
    tables Wan-Video/Wan2.1: wan/image2video.py and zai-org/SCAIL:
    sgm/modules/diffusionmodules/sampling.py. Differs from the wrapper: more steps than a fixed
    table has are refused, not cut; rcm is expressed in sigmas (see `_rcm_levels`).
    """
    low, high = step_limits(scheduler)
    if not low <= num_inference_steps <= high:
        raise _wrong_steps(scheduler, num_inference_steps, low, high)
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise InvalidRequest(
            f"'shift' must be between {MIN_SHIFT} and {MAX_SHIFT:g}, got {shift}; 5 is usual",
            field="shift",
            code="OUT_OF_RANGE",
        )
    end = num_inference_steps if end_step == -1 else end_step
    if not 0 <= start_step < end <= num_inference_steps:
        raise InvalidRequest(
            f"'start_step' and 'end_step' must satisfy 0 <= start_step < end_step <= "
            f"{num_inference_steps} (-1 = all steps), got {start_step} and {end_step}",
            field="start_step",
            code="OUT_OF_RANGE",
        )
    name, _, variant = scheduler.partition("/")
    # The shift of exactly 1 can round up in float32.
    levels = np.minimum(_levels(name, variant, num_inference_steps, shift), 1)
    last = DEIS_LAST_SIGMA if name == "deis" else 0.0
    sigmas = np.append(levels, last).astype(np.float32)
    if not bool((np.diff(sigmas) < 0).all()):
        raise InvalidRequest(
            f"'shift' {shift} leaves two of {num_inference_steps} steps of {scheduler} at the same "
            "noise level; use fewer steps or a shift closer to 1",
            field="shift",
            code="OUT_OF_RANGE",
        )
    sigmas = sigmas[start_step : end + 1]
    timesteps = _timesteps(name, levels)[start_step:end]
    rescaled = name == "rcm" and start_step == 0
    return Schedule(
        name=scheduler,
        sigmas=sigmas,
        timesteps=timesteps,
        start_step=start_step,
        total_steps=num_inference_steps,
        initial_scale=math.hypot(float(levels[0]), 1 - float(levels[0])) if rescaled else 1.0,
    )


def step_limits(scheduler: str) -> tuple[int, int]:
    """Returns the fewest and the most steps a sampler takes.

    Raises:
        InvalidRequest: the name is unknown.
    """
    if scheduler not in SCHEDULERS:
        raise InvalidRequest(
            f"'scheduler' must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}",
            field="scheduler",
            code="INVALID_CHOICE",
        )
    return STEP_LIMITS.get(scheduler, (1, MAX_STEPS))


def _wrong_steps(scheduler: str, steps: int, low: int, high: int) -> InvalidRequest:
    allowed = f"{low}" if low == high else f"between {low} and {high}"
    advice = "; use euler/official for another count" if scheduler == "lightx2v_distill" else ""
    return InvalidRequest(
        f"'num_inference_steps' must be {allowed} for {scheduler}, got {steps}{advice}",
        field="num_inference_steps",
        code="OUT_OF_RANGE",
    )


def _timesteps(name: str, levels: Levels) -> npt.NDArray[np.float64]:
    """Returns the model's timesteps, float64 [n]: 1000 sigma, whole where the reference cuts."""
    if name in INTEGER_TIMESTEPS:
        return np.trunc(levels.astype(np.float64) * TRAIN_STEPS)
    if name == "flowmatch_causvid":
        return np.array(CAUSVID_TIMESTEPS[: len(levels)], np.float64)
    return (levels.astype(np.float32) * TRAIN_STEPS).astype(np.float64)


def _levels(name: str, variant: str, steps: int, shift: float) -> Levels:
    if name in INTEGER_TIMESTEPS:
        levels = _shifted(_log_snr_grid(name, variant, steps, shift), shift)
    elif name in ("euler", "lcm") and variant != "official":
        levels = _euler_levels(steps, shift)
    elif name in ("euler", "lightx2v_distill"):
        levels = _shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    elif name == "flowmatch_distill":
        levels = _distill_levels(shift)
    elif name == "flowmatch_causvid":
        levels = np.array(CAUSVID_TIMESTEPS[:steps], np.float32) / TRAIN_STEPS
    elif name in ("res_multistep", "er_sde"):
        levels = _training_grid_levels(steps, shift)
    elif name == "sa_ode_stable":
        levels = _stable_levels(steps, shift)
    elif name == "longcat_distill_euler":
        levels = _longcat_levels(steps, shift)
    else:
        levels = _rcm_levels(steps)
    return _beta_spaced(levels) if variant == "beta" else levels


def _shifted(sigmas: Levels, shift: float) -> Levels:
    """Returns S(s) = shift s / (1 + (shift - 1) s), in the precision of the input."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _log_snr_grid(name: str, variant: str, steps: int, shift: float) -> Levels:
    """Returns the unshifted grid of the multistep solvers, float64 [n].

    Source: wanvideo/schedulers/fm_solvers.py, fm_solvers_unipc.py (the wrapper shifts the top),
    wan/utils/fm_solvers.py (official dpm++ starts at exactly 1),
    huggingface/diffusers: schedulers/scheduling_deis_multistep.py.
    """
    if name == "deis":
        return 1 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:0:-1]
    top = np.array([1 - 1 / TRAIN_STEPS], np.float32)
    if variant != "official":
        top = _shifted(top, shift)
    elif name == "dpm++":
        top = np.ones_like(top)
    return np.linspace(float(top[0]), 0.0, steps + 1)[:-1]


def _euler_levels(steps: int, shift: float) -> Levels:
    """Returns the levels between 1 and S(0.001), shifted again.

    Source: huggingface/diffusers: schedulers/scheduling_flow_match_euler_discrete.py.
    """
    ends = _shifted(np.array([TRAIN_STEPS, 1], np.float32) / TRAIN_STEPS, shift)
    first, last = float(ends[0]), float(ends[1])
    grid = np.linspace(first * TRAIN_STEPS, last * TRAIN_STEPS, steps) / TRAIN_STEPS
    return _shifted(grid, shift)


def _distill_levels(shift: float) -> Levels:
    """Returns the four levels of the step-distilled models.

    The first is S(0.999), not 1: the reference counts from the end of a list of 1000.
    Source: wanvideo/schedulers/__init__.py (flowmatch_distill).
    """
    timesteps = _shifted(np.array([0.999, 0.75, 0.5, 0.25], np.float32), shift) * TRAIN_STEPS
    return timesteps / TRAIN_STEPS


def _training_grid_levels(steps: int, shift: float) -> Levels:
    """Returns every (1000 / steps)-th level of the training grid, float32, shifted once.

    Source: wanvideo/schedulers/flowmatch_res_multistep.py, ersde_scheduler.py.
    """
    grid = _linspace32(1.0, RES_LAST_GRID_SIGMA, TRAIN_STEPS)
    picked = [round(step * (TRAIN_STEPS / steps)) for step in range(steps)]
    return _shifted(grid[picked], shift)


def _stable_levels(steps: int, shift: float) -> Levels:
    """Returns a straight (up to ten steps) or cosine grid, float32, shifted once.

    Source: wanvideo/schedulers/fm_sa_ode.py.
    """
    ramp = _linspace32(0.0, 1.0, steps + 1)[:-1]
    if steps <= 10:
        return _shifted(1 - ramp, shift)
    angles = (np.pi * ramp).astype(np.float64)
    return _shifted(0.5 * (1 + np.cos(angles).astype(np.float32)), shift)


def _linspace32(first: float, last: float, count: int) -> Levels:
    """Returns `count` even steps, float32, rounded as torch.linspace rounds them.

    It counts with a float32 step from the nearer end, and rounds each sum once.
    """
    width = float(np.float32((last - first) / (count - 1)))
    index = np.arange(count)
    steps = np.where(index < count // 2, first + width * index, last - width * index[::-1])
    return steps.astype(np.float32)


def _longcat_levels(steps: int, shift: float) -> Levels:
    """Returns levels picked from a grid of 50, float32, shifted once.

    Source: wanvideo/schedulers/__init__.py (longcat_distill_euler).
    """
    picked = [50 * step // steps for step in range(steps)]
    return _shifted(np.array([1 - index / 50 for index in picked], np.float32), shift)


def _rcm_levels(steps: int) -> Levels:
    """Returns the levels of rCM as sigmas, float64: sin / (sin + cos) of its angles.

    Differs from the reference: its state is cos(a) clean + sin(a) noise, divided by sin + cos
    before each model call, with timestep 1000 sin / (sin + cos). Keeping the divided state makes
    it an ordinary flow-matching state; only the initial noise carries the division
    (`Schedule.initial_scale`).
    Source: wanvideo/schedulers/fm_rcm.py; nodes_sampler.py (predict_with_cfg).
    """
    angles = np.array(RCM_ANGLES[:steps], np.float32).astype(np.float64)
    return np.sin(angles) / (np.sin(angles) + np.cos(angles))


def _beta_spaced(levels: Levels) -> Levels:
    """Returns levels between the same ends, spaced by the quantiles of Beta(0.6, 0.6).

    Source: "Beta Sampling is All You Need", arXiv:2407.12173; wanvideo/schedulers/fm_solvers.py.
    """
    low, high = float(levels[-1]), float(levels[0])
    return low + (high - low) * _beta_quantile(1 - np.linspace(0, 1, len(levels)))


def _beta_quantile(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the inverse of the regularised incomplete beta function I_x(a, a), a = 0.6.

    The density is symmetric, so only the lower half is inverted: there the power series
    x^a sum_k (1-a)_k / k! x^k / (a + k) / B(a, a) converges at least like 2^-k, and 60 halvings
    of the interval reach the last bit.
    Source: NIST DLMF 8.17.7.
    """
    a = BETA_EXPONENT
    coefficients = [1 / a]
    product = 1.0
    for k in range(1, 60):
        product *= (k - a) / k
        coefficients.append(product / (a + k))
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    target = np.minimum(probability, 1 - probability)
    low, high = np.zeros_like(target), np.full_like(target, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = scale * middle**a * np.polyval(coefficients[::-1], middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(probability <= 0.5, low, 1 - low)
