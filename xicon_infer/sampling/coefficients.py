"""The numbers of the solvers: each step as a weighted sum, worked out on the host in float64.

A step is x' = sample x + velocity v + sum_k estimates_k m_k + noise e, where m_0 = x - s v is the
clean latents estimated in this step, m_1 in the step before, and so on. This module has no
tensors; `xicon_infer.sampling.solvers` applies the sums.

Notation: s and s' are the sigmas before and after the step, a = 1 - s, and the log-SNR is
l = ln(a / s), with h = l' - l. Sigmas arrive rounded to float32, as in the references: close to
1 that rounding decides a = 1 - s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

INTEGRATION_POINTS = 200
"""Points of the rectangle rule in ER-SDE."""


@dataclass(frozen=True)
class Update:
    """One weighted sum.

    sigma: s. sample, velocity, noise: weights of x, v and a standard normal. estimates: weights
    of the clean estimates m_0, m_1, ... (empty: none is needed).
    """

    sigma: float
    sample: float
    velocity: float = 0.0
    estimates: tuple[float, ...] = ()
    noise: float = 0.0


@dataclass(frozen=True)
class UniPCUpdate:
    """The two sums of a UniPC step; m = x - s v is the clean estimate at the uncorrected x.

    corrector: weights of (corrected x of the step before, m, m 1 step ago, m 2 steps ago); None
    in the first step. predictor: weights of (corrected x, m, m 1 step ago). sigma: s.
    """

    corrector: tuple[float, float, float, float] | None
    predictor: tuple[float, float, float]
    sigma: float


@dataclass(frozen=True)
class StableUpdate:
    """One step of SA-ODE: x' = x + dt (blend u + (1 - blend) mean of the last three velocities).

    velocities: Adams-Bashforth weights of v, newest first; w is the sum of the weighted v.
    keep: u = keep u_before + (1 - keep) w.
    """

    velocities: tuple[float, ...]
    keep: float
    dt: float
    blend: float


def log_snr(sigma: float) -> float:
    """Returns ln((1 - sigma) / sigma): minus infinity at 1, infinity at 0."""
    if sigma <= 0.0:
        return math.inf
    if sigma >= 1.0:
        return -math.inf
    return math.log((1.0 - sigma) / sigma)


def euler_updates(sigmas: Sequence[float]) -> list[Update]:
    """Returns x' = x + (s' - s) v for every step."""
    return [Update(now, 1.0, after - now) for now, after in pairwise(sigmas)]


def lcm_updates(sigmas: Sequence[float]) -> list[Update]:
    """Returns x' = (1 - s') m_0 + s' noise: estimate the clean latents, noise them again.

    Source: huggingface/diffusers: schedulers/scheduling_flow_match_lcm.py. In sigmas it is also
    the step of rCM (rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/fm_rcm.py).
    """
    pairs = pairwise(sigmas)
    return [Update(now, 0.0, estimates=(1 - after,), noise=after) for now, after in pairs]


def dpm_updates(sigmas: Sequence[float], *, stochastic: bool) -> list[Update]:
    """Returns DPM-Solver++(2M) by the midpoint rule, or its SDE variant.

    The first step is of first order, and so is the last, whatever its sigma.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/fm_solvers.py;
    arXiv:2211.01095.
    """
    levels = [log_snr(sigma) for sigma in sigmas]
    last = len(sigmas) - 2
    updates = []
    for i in range(last + 1):
        now, after = sigmas[i], sigmas[i + 1]
        h = levels[i + 1] - levels[i]
        gain = -(1 - after) * math.expm1(-2 * h if stochastic else -h)
        second = 0.5 * h / (levels[i] - levels[i - 1]) if 0 < i < last else 0.0
        updates.append(
            Update(
                now,
                sample=after / now * (math.exp(-h) if stochastic else 1.0),
                estimates=(gain * (1 + second), -gain * second),
                noise=after * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0,
            )
        )
    return updates


def unipc_updates(sigmas: Sequence[float]) -> list[UniPCUpdate]:
    """Returns UniPC of order 2 with B(h) = e^h - 1 (bh2), predicting clean latents.

    The first and the last predictor are of order 1; each corrector has the order of the
    predictor before it.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/fm_solvers_unipc.py;
    arXiv:2302.04867, algorithms 5 and 6.
    """
    levels = [log_snr(sigma) for sigma in sigmas]
    last = len(sigmas) - 2
    updates = []
    for i in range(last + 1):
        after = 1 - sigmas[i + 1]
        h = levels[i + 1] - levels[i]
        growth = after * math.expm1(-h)
        ratio = (levels[i - 1] - levels[i]) / h if 0 < i < last else math.inf
        older = growth * 0.5 / ratio
        predictor = (sigmas[i + 1] / sigmas[i], older - growth, -older)
        corrector = _unipc_corrector(sigmas, levels, i) if i else None
        updates.append(UniPCUpdate(corrector, predictor, sigmas[i]))
    return updates


def _unipc_corrector(
    sigmas: Sequence[float], levels: Sequence[float], i: int
) -> tuple[float, float, float, float]:
    h = levels[i] - levels[i - 1]
    growth = (1 - sigmas[i]) * math.expm1(-h)
    older, newest = 0.0, 0.5
    if i > 1:
        # The two rows of the order-2 system, solved by hand: rho_1 + rho_2 = b_1 and
        # r rho_1 + rho_2 = b_2. An infinite r (the first sigma is 1) gives rho_1 / r = 0.
        ratio = (levels[i - 2] - levels[i - 1]) / h
        phi_2 = math.expm1(-h) / -h - 1
        phi_3 = phi_2 / -h - 0.5
        first, second = phi_2 / math.expm1(-h), 2 * phi_3 / math.expm1(-h)
        weight = (second - first) / (ratio - 1)
        older, newest = weight / ratio, first - weight
    kept = sigmas[i] / sigmas[i - 1]
    return kept, -growth * newest, growth * (older + newest - 1), -growth * older


def res_multistep_updates(sigmas: Sequence[float]) -> list[Update]:
    """Returns RES of order 2 in ln sigma; an Euler step first, and last if it ends at 0.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/flowmatch_res_multistep.py.
    """
    updates = []
    for i, (now, after) in enumerate(pairwise(sigmas)):
        if i == 0 or after == 0.0:
            # Weight 0, not an empty tuple: the next step needs this estimate.
            updates.append(Update(now, 1.0, after - now, estimates=(0.0,)))
            continue
        h = math.log(now / after)
        ratio = math.log(now / sigmas[i - 1]) / h
        phi_1 = math.expm1(-h) / -h
        phi_2 = (phi_1 - 1) / -h
        estimates = (h * (phi_1 - phi_2 / ratio), h * phi_2 / ratio)
        updates.append(Update(now, math.exp(-h), estimates=estimates))
    return updates


def er_sde_updates(sigmas: Sequence[float]) -> list[Update]:
    """Returns ER-SDE-Solver-3: orders 1, 2, then 3; a last step to 0 gives the clean estimate.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/ersde_scheduler.py;
    arXiv:2309.06169, with sigma for the noise-to-signal ratio as that file has it.
    """
    updates = []
    for i, (now, after) in enumerate(pairwise(sigmas)):
        if after == 0.0:
            updates.append(Update(now, 0.0, estimates=(1.0,)))
            continue
        ratio = _er_noise_scale(after) / _er_noise_scale(now)
        estimates = [1 - ratio, 0.0, 0.0]
        order_2, order_3 = _er_integrals(now, after)
        if i >= 1:
            gap = now - sigmas[i - 1]
            # Difference of the two last slopes, over half the distance they span.
            bend = order_3 / ((now - sigmas[i - 2]) / 2) if i >= 2 else 0.0
            estimates[0] += (order_2 + bend) / gap
            estimates[1] -= (order_2 + bend) / gap
        if i >= 2:
            older_gap = sigmas[i - 1] - sigmas[i - 2]
            estimates[1] -= bend / older_gap
            estimates[2] += bend / older_gap
        noise = math.sqrt(max(0.0, after**2 - (now * ratio) ** 2))
        updates.append(Update(now, ratio, estimates=tuple(estimates), noise=noise))
    return updates


def _er_noise_scale(sigma: float) -> float:
    return sigma * (math.exp(sigma**0.3) + 10.0)


def _er_integrals(now: float, after: float) -> tuple[float, float]:
    """Returns the weights of the first and second derivative of the clean estimate."""
    dt = after - now
    width = -dt / INTEGRATION_POINTS
    points = [after + index * width for index in range(INTEGRATION_POINTS)]
    zeroth = sum(1 / _er_noise_scale(point) for point in points) * width
    first = sum((point - now) / _er_noise_scale(point) for point in points) * width
    scale = _er_noise_scale(after)
    return dt + zeroth * scale, dt**2 / 2 + first * scale


def stable_updates(sigmas: Sequence[float], total_steps: int) -> list[StableUpdate]:
    """Returns SA-ODE "stable": Adams-Bashforth on the velocity, damped near the end.

    With at most 8 steps in the whole table it is plain Adams-Bashforth of order 2.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: wanvideo/schedulers/fm_sa_ode.py.
    """
    converged, settled = 0.15, 0.05  # sigmas below which to smooth, and to average
    damped = total_steps > 8
    updates = []
    for i, (now, after) in enumerate(pairwise(sigmas)):
        smooth = damped and now < converged
        third_order = damped and converged < now <= 0.7
        order = min(3 if third_order else 2, i + 1)
        average = damped and now < settled and i >= 2
        updates.append(
            StableUpdate(
                velocities=_ADAMS_BASHFORTH[order],
                keep=0.8 if smooth and i > 0 else 0.0,
                dt=(after - now) * (0.5 + 0.5 * now / converged if smooth else 1.0),
                blend=now / settled if average else 1.0,
            )
        )
    return updates


_ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.5, -0.5),
    3: (23 / 12, -16 / 12, 5 / 12),
}
