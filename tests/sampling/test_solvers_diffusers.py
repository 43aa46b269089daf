"""Our solvers against the diffusers classes, with our tables put in their place."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.solvers import make_solver

# diffusers itself hands tensors to numpy functions.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:__array_(_|wrap__) (implementation|must):DeprecationWarning"
)

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def library_scheduler(name, shift):
    solver, _, variant = name.partition("/")
    beta = {"use_beta_sigmas": True} if variant == "beta" else {}
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift, **beta)
    if solver == "lcm":
        return FlowMatchLCMScheduler(shift=shift, **beta)
    if solver == "unipc":
        return UniPCMultistepScheduler(**FLOW, flow_shift=shift)
    if solver == "deis":
        return DEISMultistepScheduler(**FLOW, flow_shift=shift)
    kind = "sde-dpmsolver++" if solver == "dpm++_sde" else "dpmsolver++"
    return DPMSolverMultistepScheduler(**FLOW, flow_shift=shift, algorithm_type=kind)


def worst_difference(name, steps, shift, overwrite=True):
    """Returns the largest relative difference of the latents after any step."""
    schedule, library = make_schedule(name, steps, shift), library_scheduler(name, shift)
    library.set_timesteps(steps)
    if overwrite:
        library.sigmas = torch.tensor(schedule.sigmas)
        library.timesteps = torch.tensor(schedule.timesteps)
        if name.partition("/")[0] in ("unipc", "dpm++", "dpm++_sde", "deis"):
            library.timesteps = library.timesteps.long()
    library.set_begin_index(0)
    solver = make_solver(schedule)
    generator = torch.Generator().manual_seed(5)
    theirs = ours = torch.randn(1, 2, 2, 2, 3, generator=generator)
    # lcm and dpm draw from the generator themselves: an equal one gives us the same numbers.
    their_stream, our_stream = (torch.Generator().manual_seed(9) for _ in range(2))
    worst = 0.0
    for index, timestep in enumerate(library.timesteps):
        seconds = float(timestep) / 1000
        their_velocity, our_velocity = (
            0.8 * x + 0.3 * seconds + 0.1 * torch.sin(x) for x in (theirs, ours)
        )
        options = {"generator": their_stream} if solver.draws_noise else {}
        theirs = library.step(their_velocity, timestep, theirs, **options, return_dict=False)[0]
        noise = torch.randn(ours.shape, generator=our_stream) if solver.draws_noise else None
        ours = solver.step(ours, our_velocity, index, noise)
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


NAMES = ["euler", "lcm", "unipc", "dpm++", "dpm++_sde", "deis", "unipc/beta", "dpm++/official"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 5.0), (6, 5.0), (20, 3.0), (50, 7.0)])
def test_latents_equal_those_of_diffusers(name, steps, shift):
    assert worst_difference(name, steps, shift) <= (1e-4 if name == "dpm++_sde" else 1e-5)


@given(st.sampled_from(NAMES), st.integers(1, 30), st.floats(0.8, 12.0))
@settings(max_examples=30, deadline=None)
def test_latents_equal_those_of_diffusers_for_any_table(name, steps, shift):
    assert worst_difference(name, steps, shift) <= (1e-4 if name == "dpm++_sde" else 1e-5)


@pytest.mark.parametrize("name", ["euler", "lcm", "euler/beta", "lcm/beta"])
def test_diffusers_makes_the_same_table_itself(name):
    assert worst_difference(name, 6, 5.0, overwrite=False) <= 1e-6


@pytest.mark.parametrize("name", ["unipc", "dpm++", "dpm++_sde"])
def test_diffusers_makes_another_table_for_the_multistep_solvers(name):
    """Why the tables are our own: as constructed, the library ends more than 1e-4 away."""
    assert worst_difference(name, 6, 5.0, overwrite=False) > 1e-4
