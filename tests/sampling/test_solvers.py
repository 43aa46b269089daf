"""Solvers: laws, sensitivity, and values taken from the reference where no golden has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.sampling.schedule import make_schedule, step_limits
from xicon_infer.sampling.solvers import make_solver
from xicon_infer.types import SCHEDULERS

STOCHASTIC = {"dpm++_sde", "dpm++_sde/beta", "lcm", "lcm/beta", "er_sde", "rcm"}
START = torch.tensor([0.5, -1.0, 0.25, 2.0]).reshape(1, 1, 1, 1, 4)


def model(latents, timestep):
    return 0.8 * latents + 0.3 * (timestep / 1000) - 0.1 * torch.cos(2 * latents)


def noise(step):
    return torch.sin(torch.arange(4.0) * 3 + step + 1).reshape(1, 1, 1, 1, 4)


def run(name, steps, shift, start_step=0, end_step=-1, velocity=model, start=START):
    schedule = make_schedule(name, steps, shift, start_step=start_step, end_step=end_step)
    solver = make_solver(schedule)
    latents, trail = start * schedule.initial_scale, []
    for index, timestep in enumerate(schedule.timesteps):
        predicted = velocity(latents, float(timestep))
        given_noise = noise(index) if solver.draws_noise else None
        latents = solver.step(latents, predicted, index, given_noise)
        trail.append(latents)
    return trail


# What ComfyUI-WanVideoWrapper ef95cfa computes (wanvideo/schedulers/, CPU, float32) for `model`,
# `noise` and `START`: the latents after the last step. The goldens have none of these cases.
REFERENCE = {
    ("er_sde", 6, 5.0, 0, -1): [0.0910412, -0.4902105, 0.0179416, 0.6098337],
    ("er_sde", 8, 3.0, 2, 6): [0.3687511, -0.8873609, 0.2324752, 1.2136526],
    ("rcm", 4, 5.0, 0, -1): [-0.0017261, -0.2569838, 0.077601, -0.3545216],
    ("longcat_distill_euler", 5, 5.0, 0, -1): [0.1050355, -0.5353409, 0.0218302, 0.5493592],
    ("sa_ode_stable", 14, 3.0, 0, -1): [0.1898532, -0.541397, 0.0856179, 0.772738],
    ("sa_ode_stable", 12, 5.0, 2, 9): [0.2678385, -0.7553053, 0.112438, 1.1803501],
    ("res_multistep", 16, 3.0, 0, -1): [0.1943946, -0.5322977, 0.0904698, 0.7740312],
    ("deis", 16, 8.0, 0, -1): [0.2038631, -0.5318192, 0.097457, 0.7991747],
    ("dpm++_sde", 6, 5.0, 1, 4): [0.5640033, -0.8556482, 0.7036198, -0.6696488],
    ("unipc", 8, 5.0, 2, 6): [0.3382077, -0.8505193, 0.151823, 1.4556446],
}


@pytest.mark.parametrize("case", REFERENCE, ids=str)
def test_latents_equal_those_of_the_reference(case):
    final = run(*case)[-1].flatten()
    torch.testing.assert_close(final, torch.tensor(REFERENCE[case]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_model_is_followed_to_its_clean_latents(name):
    """If the velocity always points at the same clean latents, every sampler ends there."""
    clean = torch.tensor([0.3, -0.2, 1.0, 0.0]).reshape(1, 1, 1, 1, 4)
    steps = min(6, step_limits(name)[1])

    def velocity(latents, timestep):
        return (latents - clean) / (timestep / 1000)

    final = run(name, steps, 5.0, velocity=velocity)[-1]
    # Whole timesteps are cut: they differ from 1000 sigma by up to 1, and so does the aim.
    torch.testing.assert_close(final, clean, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_stochastic_samplers_draw_noise(name):
    steps = step_limits(name)[0] if name in ("flowmatch_distill", "lightx2v_distill") else 4
    assert make_solver(make_schedule(name, steps, 5.0)).draws_noise == (name in STOCHASTIC)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_noise_is_needed_and_used(name):
    solver = make_solver(make_schedule(name, 4, 5.0))
    with pytest.raises(ValueError, match="draws noise"):
        solver.step(START, START, 0, None)
    first, second = (solver.step(START, START, 0, noise(i)) for i in range(2))
    assert not torch.equal(first, second)


def test_samplers_give_different_results():
    names = [name for name in SCHEDULERS if step_limits(name)[1] >= 4]
    finals = {name: run(name, 4, 5.0)[-1] for name in names}
    same = {frozenset(("euler/official", "lightx2v_distill"))}
    for one in names:
        for other in names:
            if one < other and frozenset((one, other)) not in same:
                assert not torch.allclose(finals[one], finals[other], atol=1e-6), (one, other)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inputs_are_not_changed_and_latents_stay_float32(name):
    schedule = make_schedule(name, min(4, step_limits(name)[1]), 5.0)
    solver = make_solver(schedule)
    latents = START.clone()
    for index in range(schedule.num_steps):
        velocity, drawn = model(latents, 500.0).bfloat16(), noise(index)
        copies = [tensor.clone() for tensor in (latents, velocity, drawn)]
        after = solver.step(latents, velocity, index, drawn)
        assert after.dtype == torch.float32
        for tensor, copy in zip((latents, velocity, drawn), copies, strict=True):
            assert torch.equal(tensor, copy)
        latents = after


@pytest.mark.parametrize("name", ["dpm++_sde", "unipc", "deis", "sa_ode_stable", "er_sde"])
def test_steps_come_in_order_and_step_zero_starts_over(name):
    schedule = make_schedule(name, 6, 5.0)
    solver = make_solver(schedule)

    def three_steps():
        latents = START
        for index in range(3):
            latents = solver.step(latents, model(latents, 500.0), index, noise(index))
        return latents

    first = three_steps()
    with pytest.raises(ValueError, match="expected 3, got 4"):
        solver.step(START, START, 4, noise(0))
    assert torch.equal(three_steps(), first)


@given(st.sampled_from(SCHEDULERS), st.integers(1, 40), st.floats(0.5, 20.0))
@settings(max_examples=60, deadline=None)
def test_every_table_gives_finite_latents(name, steps, shift):
    low, high = step_limits(name)
    trail = run(name, max(low, min(high, steps)), shift)
    assert all(latents.isfinite().all() for latents in trail)


def test_a_first_sigma_of_one_is_no_division_by_zero():
    for name in ("dpm++/official", "unipc/official"):
        for steps in (1, 2, 6):
            assert run(name, steps, 100.0)[-1].isfinite().all()
