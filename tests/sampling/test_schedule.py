"""Sigma tables: laws that hold for every sampler, limits, slicing, the quantile, imports."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.schedule import (
    FIXED_TABLES,
    INTEGER_TIMESTEPS,
    _beta_quantile,
    make_schedule,
    step_limits,
)
from xicon_infer.types import SCHEDULERS


@st.composite
def requests(draw):
    name = draw(st.sampled_from(SCHEDULERS))
    low, high = step_limits(name)
    return name, draw(st.integers(low, min(high, 60))), draw(st.floats(0.5, 20.0))


@given(requests())
@settings(max_examples=150, deadline=None)
def test_sigmas_fall_strictly_to_zero(request_):
    name, steps, shift = request_
    schedule = make_schedule(name, steps, shift)
    assert schedule.sigmas.dtype == np.float32
    assert len(schedule.sigmas) == schedule.num_steps + 1 == steps + 1
    assert (np.diff(schedule.sigmas) < 0).all()
    assert 0.5 < schedule.sigmas[0] <= 1.0 or shift < 1
    assert schedule.sigmas[-1] == (np.float32(1e-6) if name == "deis" else 0.0)


@given(requests())
@settings(max_examples=80, deadline=None)
def test_timesteps_are_thousand_sigma(request_):
    schedule = make_schedule(*request_)
    whole = schedule.name.partition("/")[0] in INTEGER_TIMESTEPS
    expected = 1000 * schedule.sigmas[:-1].astype(np.float64)
    if whole:
        assert (schedule.timesteps == np.trunc(schedule.timesteps)).all()
    difference = expected - schedule.timesteps
    assert (difference > -1e-3).all()
    assert (difference < (1 + 1e-3 if whole else 1e-3)).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_shift_changes_the_table_unless_it_is_fixed(name):
    steps = min(4, step_limits(name)[1])
    before, after = (make_schedule(name, steps, shift) for shift in (3.0, 5.0))
    assert np.array_equal(before.sigmas, after.sigmas) == (name in FIXED_TABLES)


def test_the_names_give_different_tables():
    tables = {name: make_schedule(name, 4, 5.0).sigmas.tobytes() for name in SCHEDULERS}
    twins = {
        "dpm++_sde": {"dpm++", "unipc"},
        "dpm++_sde/beta": {"dpm++/beta", "unipc/beta"},
        "euler": {"lcm"},
        "euler/beta": {"lcm/beta"},
        # Official grids of 4 steps: the step-distilled list is the even grid.
        "euler/official": {"dpm++/official", "lightx2v_distill", "sa_ode_stable"},
        "res_multistep": {"er_sde"},
    }
    for name, others in twins.items():
        sigmas = make_schedule(name, 4, 5.0).sigmas
        for other in others:
            np.testing.assert_allclose(make_schedule(other, 4, 5.0).sigmas, sigmas, atol=2e-7)
    alone = set(SCHEDULERS) - set().union(*twins.values())
    assert len({tables[name] for name in alone}) == len(alone)


@pytest.mark.parametrize("name", ["unipc", "dpm++_sde", "deis", "lcm", "sa_ode_stable"])
def test_slices_are_parts_of_the_whole(name):
    whole = make_schedule(name, 8, 5.0)
    part = make_schedule(name, 8, 5.0, start_step=2, end_step=6)
    assert np.array_equal(part.sigmas, whole.sigmas[2:7])
    assert np.array_equal(part.timesteps, whole.timesteps[2:6])
    assert (part.start_step, part.total_steps, part.num_steps) == (2, 8, 4)
    rest = make_schedule(name, 8, 5.0, start_step=6)
    assert np.array_equal(rest.sigmas, whole.sigmas[6:])


@pytest.mark.parametrize(("start", "end"), [(-1, -1), (6, -1), (0, 7), (3, 3), (4, 2), (0, 0)])
def test_impossible_slices_are_refused(start, end):
    with pytest.raises(InvalidRequest, match="'start_step' and 'end_step' must satisfy") as info:
        make_schedule("unipc", 6, 5.0, start_step=start, end_step=end)
    assert (info.value.field, info.value.code) == ("start_step", "OUT_OF_RANGE")


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(InvalidRequest, match=r"must be one of dpm\+\+_sde, .*got 'ddim'") as info:
        make_schedule("ddim", 6, 5.0)
    assert (info.value.field, info.value.code) == ("scheduler", "INVALID_CHOICE")


@pytest.mark.parametrize(
    ("name", "steps", "allowed"),
    [
        ("unipc", 0, "between 1 and 1000"),
        ("unipc", 1001, "between 1 and 1000"),
        ("flowmatch_distill", 6, "must be 4"),
        ("lightx2v_distill", 6, "must be 4 .*use euler/official"),
        ("flowmatch_causvid", 10, "between 1 and 9"),
        ("rcm", 5, "between 1 and 4"),
        ("longcat_distill_euler", 51, "between 1 and 50"),
    ],
)
def test_impossible_step_counts_are_refused(name, steps, allowed):
    with pytest.raises(InvalidRequest, match=allowed) as info:
        make_schedule(name, steps, 5.0)
    assert (info.value.field, info.value.code) == ("num_inference_steps", "OUT_OF_RANGE")


@pytest.mark.parametrize("shift", [0.0, -1.0, 100.1, float("nan"), float("inf")])
def test_impossible_shifts_are_refused(shift):
    with pytest.raises(InvalidRequest, match="'shift' must be between"):
        make_schedule("euler", 6, shift)


def test_steps_that_round_to_the_same_sigma_are_refused():
    with pytest.raises(InvalidRequest, match="at the same noise level"):
        make_schedule("euler/beta", 1000, 0.01)


def test_every_sampler_works_at_its_limits():
    for name in SCHEDULERS:
        for steps in step_limits(name):
            for shift in (0.1, 100.0):
                assert make_schedule(name, steps, shift).num_steps == steps


def test_known_tables_of_the_specification():
    wrapper = make_schedule("dpm++_sde", 6, 5.0)
    assert wrapper.timesteps.tolist() == [999, 961, 909, 833, 714, 499]
    assert make_schedule("unipc/official", 6, 5.0).timesteps.tolist() == [
        999, 961, 908, 833, 713, 499,
    ]  # fmt: skip
    official = make_schedule("dpm++/official", 6, 5.0)
    assert official.timesteps.tolist() == [1000, 961, 909, 833, 714, 500]
    distilled = make_schedule("lightx2v_distill", 4, 5.0).sigmas
    np.testing.assert_allclose(distilled, [1, 0.9375, 5 / 6, 0.625, 0], atol=1e-7)


def test_rcm_starts_at_its_angle():
    schedule = make_schedule("rcm", 4, 5.0)
    angle = np.arctan(120.0)
    assert schedule.initial_scale == pytest.approx(1 / (np.cos(angle) + np.sin(angle)), abs=1e-6)
    assert schedule.timesteps[0] == pytest.approx(1000 * 120 / 121, abs=1e-2)
    assert make_schedule("rcm", 4, 5.0, start_step=1).initial_scale == 1.0
    assert make_schedule("lcm", 4, 5.0).initial_scale == 1.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_beta_quantile_is_that_of_scipy(probabilities):
    values = np.array(probabilities)
    np.testing.assert_allclose(_beta_quantile(values), beta.ppf(values, 0.6, 0.6), atol=1e-12)


def test_schedules_and_windows_need_no_torch():
    code = (
        "import sys; import xicon_infer.sampling.schedule, xicon_infer.sampling.windows, "
        "xicon_infer.sampling.coefficients, xicon_infer.sampling.cache_tables; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
