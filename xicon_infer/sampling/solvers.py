"""Solvers: from the latents before a step and the model's velocity to the latents after it.

All numbers are worked out once on the host when the solver is made, most of them in
`xicon_infer.sampling.coefficients`. A step is two to eleven weighted additions of tensors:
nothing is read back from the device, nothing is copied to it, and the latents stay float32.

Why own code and not the schedulers of diffusers: their import takes longer than that of torch
itself, four of the solvers do not exist there and the others need their tables overwritten, and
their steps work out every coefficient anew from small tensors (20 steps of dpm++: 41 operations
a step, here 4). The tests hold these solvers to the diffusers classes;
`benchmarks/solvers_vs_diffusers.py` measures both.

Differs from the references: a step is addressed by its index, not looked up by its timestep, so
two steps with the same whole timestep are two steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from xicon_infer.sampling.coefficients import (
    StableUpdate,
    UniPCUpdate,
    Update,
    dpm_updates,
    er_sde_updates,
    euler_updates,
    lcm_updates,
    res_multistep_updates,
    stable_updates,
    unipc_updates,
)
from xicon_infer.sampling.schedule import Schedule
from xicon_infer.types import Float32Array

DEIS_DISTINCT_LAST = 15
"""From this many steps on, DEIS keeps its second order in the last step."""


class Solver(Protocol):
    """What steps the latents of one run, first step first.

    draws_noise: True if every step is given a standard normal of the latents' shape. The last
    one has weight 0 where the run ends at sigma 0. It is drawn all the same, as in the reference
    (but for er_sde and rcm, which skip it there; nothing is drawn after it).
    """

    draws_noise: bool

    def step(self, latents: Tensor, velocity: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Returns the latents after step `index`.

        Args:
            latents: any shape, float32, before the step; not changed.
            velocity: the same shape, the model's prediction (noise minus clean latents).
            index: 0 to n - 1, each once and in order; 0 starts over.
            noise: the same shape, standard normal, float32; None if `draws_noise` is False.
        """


def make_solver(schedule: Schedule) -> Solver:
    """Returns the solver of a schedule, ready for step 0."""
    sigmas = [float(sigma) for sigma in schedule.sigmas]
    name = schedule.name.partition("/")[0]
    if name == "unipc":
        return UniPCSolver(unipc_updates(sigmas))
    if name == "sa_ode_stable":
        return StableSolver(stable_updates(sigmas, schedule.total_steps))
    if name in ("dpm++", "dpm++_sde"):
        stochastic = name == "dpm++_sde"
        return LinearSolver(dpm_updates(sigmas, stochastic=stochastic), draws_noise=stochastic)
    if name in ("lcm", "rcm"):
        return LinearSolver(lcm_updates(sigmas), draws_noise=True)
    if name == "er_sde":
        return LinearSolver(er_sde_updates(sigmas), draws_noise=True)
    if name == "deis":
        return DeisSolver(schedule.sigmas)
    if name == "res_multistep":
        return LinearSolver(res_multistep_updates(sigmas))
    return LinearSolver(euler_updates(sigmas))


class LinearSolver:
    """A solver whose step is one weighted sum.

    Args:
        updates: the sums, one per step.
        draws_noise: see `Solver`.
    """

    def __init__(self, updates: list[Update], *, draws_noise: bool = False) -> None:
        self.draws_noise = draws_noise
        self._updates = updates
        self._depth = max(len(update.estimates) for update in updates)
        self._estimates: list[Tensor] = []
        self._next = 0

    def step(self, latents: Tensor, velocity: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Returns the latents after step `index`; see `Solver.step`."""
        self._next = _check_order(index, self._next)
        update = self._updates[index]
        velocity = velocity.to(latents.dtype)
        terms = [(update.sample, latents), (update.velocity, velocity)]
        if update.estimates:
            estimate = latents.add(velocity, alpha=-update.sigma)
            self._estimates = [estimate, *self._estimates][: self._depth]
            terms += zip(update.estimates, self._estimates, strict=False)
        if update.noise != 0.0:
            if noise is None:
                raise ValueError("this solver draws noise: pass a standard normal in every step")
            terms.append((update.noise, noise))
        return _weighted_sum(terms)


class UniPCSolver:
    """UniPC of order 2: correct the latents with the new prediction, then predict.

    Args:
        updates: the two sums of each step.
    """

    draws_noise = False

    def __init__(self, updates: list[UniPCUpdate]) -> None:
        self._updates = updates
        self._history: list[Tensor] = []
        self._corrected: Tensor | None = None
        self._next = 0

    def step(self, latents: Tensor, velocity: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Returns the latents after step `index`; see `Solver.step`. The noise is not used."""
        self._next = _check_order(index, self._next)
        update = self._updates[index]
        estimate = latents.add(velocity.to(latents.dtype), alpha=-update.sigma)
        self._history = [estimate, *self._history][:3]
        if update.corrector is not None:
            assert self._corrected is not None  # steps come in order
            values = [self._corrected, *self._history]
            latents = _weighted_sum(zip(update.corrector, values, strict=False))
        self._corrected = latents
        return _weighted_sum(zip(update.predictor, [latents, *self._history], strict=False))


class StableSolver:
    """SA-ODE "stable": multistep velocity, smoothed and averaged as sigma gets small.

    Args:
        updates: the numbers of each step.
    """

    draws_noise = False

    def __init__(self, updates: list[StableUpdate]) -> None:
        self._updates = updates
        self._velocities: list[Tensor] = []
        self._smoothed: Tensor | None = None
        self._next = 0

    def step(self, latents: Tensor, velocity: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Returns the latents after step `index`; see `Solver.step`. The noise is not used."""
        self._next = _check_order(index, self._next)
        update = self._updates[index]
        self._velocities = [velocity.to(latents.dtype), *self._velocities][:3]
        direction = _weighted_sum(zip(update.velocities, self._velocities, strict=False))
        if update.keep:
            assert self._smoothed is not None  # steps come in order
            direction = direction.lerp_(self._smoothed, update.keep)
        self._smoothed = direction
        after = latents.add(direction, alpha=update.dt * update.blend)
        if update.blend != 1.0:
            share = update.dt * (1 - update.blend) / len(self._velocities)
            for earlier in self._velocities:
                after.add_(earlier, alpha=share)
        return after


class DeisSolver:
    """DEIS of order 2 in log-rho.

    The first step subtracts two numbers up to a thousand times larger than their difference, in
    float32. On paper it is an Euler step, and one weighted sum would be more exact; but then
    results differ from the reference by 1e-4. So its order of operations is kept.

    Args:
        sigmas: float32 [n + 1], on the host.

    Source: huggingface/diffusers: schedulers/scheduling_deis_multistep.py; arXiv:2204.13902.
    """

    draws_noise = False

    def __init__(self, sigmas: Float32Array) -> None:
        self._sigmas = torch.tensor(sigmas, dtype=torch.float32)
        steps = len(sigmas) - 1
        self._firsts = {0, steps - 1} if steps < DEIS_DISTINCT_LAST else {0}
        self._levels = [(float(sigma), float(1 - sigma)) for sigma in self._sigmas]
        self._weights = [self._step_weights(index) for index in range(steps)]
        self._previous: Tensor | None = None
        self._next = 0

    def step(self, latents: Tensor, velocity: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Returns the latents after step `index`; see `Solver.step`. The noise is not used."""
        self._next = _check_order(index, self._next)
        sigma, alpha = self._levels[index]
        clean = latents - velocity.to(latents.dtype) * sigma
        estimate = (latents - clean * alpha) / sigma
        scale, sample, newest, older = self._weights[index]
        if index in self._firsts:
            after = latents * sample + estimate * newest
        else:
            assert self._previous is not None  # steps come in order
            earlier = self._previous * older
            after = (latents / sample + estimate * newest + earlier) * scale
        self._previous = estimate
        return after

    def _step_weights(self, index: int) -> tuple[float, float, float, float]:
        """Returns factor, latents' weight (order 2: divisor), and two noise estimates' weights."""
        now, after = self._sigmas[index], self._sigmas[index + 1]
        if index in self._firsts:
            h = (torch.log(1 - after) - torch.log(after)) - (torch.log(1 - now) - torch.log(now))
            gain = after * (torch.exp(h) - 1.0)
            return 1.0, float((1 - after) / (1 - now)), -float(gain), 0.0
        end, start = after / (1 - after), now / (1 - now)
        before = self._sigmas[index - 1] / (1 - self._sigmas[index - 1])
        newest = _log_integral(end, start, before) - _log_integral(start, start, before)
        older = _log_integral(end, before, start) - _log_integral(start, before, start)
        return float(1 - after), float(1 - now), float(newest), float(older)


def _log_integral(t: Tensor, one: Tensor, zero: Tensor) -> Tensor:
    """Returns the antiderivative in t of (ln t - ln zero) / (ln one - ln zero)."""
    return t * (-zero.log() + t.log() - 1) / (one.log() - zero.log())


def _weighted_sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Returns the sum as a new tensor; terms of weight 0 are not read."""
    (weight, tensor), *rest = [term for term in terms if term[0] != 0.0]
    total = tensor * weight
    for weight, tensor in rest:
        total.add_(tensor, alpha=weight)
    return total


def _check_order(index: int, expected: int) -> int:
    """Returns the next index. Step 0 gives weight to no history, so it may come at any time."""
    if index not in (0, expected):
        raise ValueError(f"steps must come in order: expected {expected}, got {index}")
    return index + 1
