"""The loop, guidance, ranges and fused windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from xicon_infer.errors import Cancelled
from xicon_infer.sampling.denoise import (
    active_at,
    classifier_free,
    denoise,
    fused_windows,
    guide,
)
from xicon_infer.sampling.noise import initial_noise, step_noise
from xicon_infer.sampling.schedule import make_schedule, step_limits
from xicon_infer.sampling.solvers import make_solver
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import CONTEXT_SCHEDULES, FUSE_METHODS, SCHEDULERS, SilentProgress

SHAPE = (1, 16, 3, 2, 2)


def model(latents, timesteps, index):
    return 0.7 * latents + timesteps[:, None, None, None, None] / 4000


def run(schedule, seed=1, predict=model, progress=None, **options):
    latents, generator = initial_noise(seed, SHAPE)
    options = {"generator": generator, **options}
    return denoise(predict, latents, schedule, progress=progress or SilentProgress(), **options)


class Operations(TorchDispatchMode):
    """Collects the names of all tensor operations, and the types that come out."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_reads_nothing_back_and_stays_float32(name):
    schedule = make_schedule(name, min(4, step_limits(name)[1]), 5.0)
    latents, generator = initial_noise(1, SHAPE)
    with Operations() as seen:
        final = denoise(model, latents, schedule, generator=generator, progress=SilentProgress())
    loop = seen.names[seen.names.index("expand") :]  # before it, DEIS reads its host constants
    assert final.dtype == torch.float32
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(loop)
    assert "_to_copy" not in loop
    assert seen.dtypes <= {torch.float32, torch.float64}


def test_the_loop_is_the_solver_step_by_step():
    schedule = make_schedule("dpm++_sde", 6, 5.0)
    latents, generator = initial_noise(1, SHAPE)
    solver = make_solver(schedule)
    for index, timestep in enumerate(schedule.timesteps):
        velocity = model(latents, torch.tensor([float(timestep)]), index)
        latents = solver.step(latents, velocity, index, step_noise(generator, SHAPE))
    assert torch.equal(run(schedule), latents)


def test_the_model_sees_latents_timesteps_and_index():
    seen = []

    def predict(latents, timesteps, index):
        seen.append((latents.shape, timesteps.tolist(), timesteps.dtype, index))
        return latents

    start = torch.randn(2, *SHAPE[1:])
    schedule = make_schedule("unipc", 3, 5.0)
    denoise(predict, start, schedule, generator=None, progress=SilentProgress())
    expected = [
        (start.shape, [t, t], torch.float32, i) for i, t in enumerate(schedule.timesteps.tolist())
    ]
    assert seen == expected


def test_given_step_noises_replace_the_generator():
    schedule = make_schedule("dpm++_sde", 4, 5.0)
    _, generator = initial_noise(1, SHAPE)
    drawn = [step_noise(generator, SHAPE) for _ in range(4)]
    assert torch.equal(run(schedule, step_noises=drawn, generator=None), run(schedule))
    drawn[1] = -drawn[1]
    assert not torch.equal(run(schedule, step_noises=drawn), run(schedule))


def test_every_argument_changes_the_result():
    base = run(make_schedule("dpm++_sde", 4, 5.0))
    others = [
        run(make_schedule("dpm++_sde", 4, 5.0), seed=2),
        run(make_schedule("dpm++_sde", 5, 5.0)),
        run(make_schedule("dpm++_sde", 4, 3.0)),
        run(make_schedule("dpm++", 4, 5.0)),
        run(make_schedule("dpm++_sde", 4, 5.0, start_step=1)),
        run(make_schedule("dpm++_sde", 4, 5.0, end_step=3)),
        run(make_schedule("dpm++_sde", 4, 5.0), predict=lambda x, t, i: model(x, t, i) * 1.01),
        run(make_schedule("dpm++_sde", 4, 5.0), generator=torch.Generator().manual_seed(5)),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_rcm_scales_its_initial_noise():
    seen = []

    def predict(latents, timesteps, index):
        seen.append(latents)
        return latents

    schedule = make_schedule("rcm", 4, 5.0)
    run(schedule, predict=predict)
    assert schedule.initial_scale < 0.993
    torch.testing.assert_close(seen[0], initial_noise(1, SHAPE)[0] * schedule.initial_scale)


def test_two_parts_of_a_schedule_make_the_whole():
    latents, _ = initial_noise(1, SHAPE)
    parts = [{"end_step": 3}, {"start_step": 3}]
    for part in parts:
        schedule = make_schedule("euler", 6, 5.0, **part)
        latents = denoise(model, latents, schedule, generator=None, progress=SilentProgress())
    torch.testing.assert_close(latents, run(make_schedule("euler", 6, 5.0)))


def test_progress_is_told_each_step_and_can_stop_the_run():
    class Stop(SilentProgress):
        def __init__(self):
            super().__init__()
            self.steps = []

        def step(self, done, total, unit="step"):
            self.steps.append((done, total))
            if done == 2:
                raise Cancelled("stop")

    progress = Stop()
    with pytest.raises(Cancelled):
        run(make_schedule("euler", 4, 5.0), progress=progress)
    assert progress.steps == [(1, 4), (2, 4)]


def test_half_precision_latents_and_missing_noise_are_refused():
    schedule = make_schedule("dpm++_sde", 4, 5.0)
    with pytest.raises(ValueError, match=r"float32, got torch\.bfloat16"):
        denoise(
            model,
            torch.zeros(SHAPE).bfloat16(),
            schedule,
            generator=None,
            progress=SilentProgress(),
        )
    with pytest.raises(ValueError, match="draws noise"):
        run(schedule, generator=None)


def test_the_loop_keeps_no_graph():
    weight = torch.ones(1, requires_grad=True)
    final = run(make_schedule("euler", 2, 5.0), predict=lambda x, t, i: x * weight)
    assert not final.requires_grad


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [(0.0, 0.5, [0, 1, 2, 3]), (0.0, 1.0, range(6)), (0.5, 1.0, [3, 4, 5]), (0.9, 1.0, [])],
)
def test_ranges_include_both_ends(start, end, active):
    assert [i for i in range(6) if active_at(i, 6, start, end)] == list(active)


def test_guidance_moves_from_without_to_with():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert classifier_free(cond, uncond, 4.0).item() == 9.0
    assert classifier_free(cond, uncond, 0.0).item() == 1.0
    assert classifier_free(cond.bfloat16(), uncond.bfloat16(), 2.0).dtype == torch.float32


def branches(calls):
    def predict(latents, timesteps, conditionings):
        calls.append((latents.shape[0], tuple(timesteps.shape), conditionings))
        rows = latents.chunk(len(conditionings))
        return torch.cat([row * c for row, c in zip(rows, conditionings, strict=True)])

    return predict


@given(st.integers(1, 3), st.floats(-3, 9).filter(lambda s: abs(s - 1) > 1e-3))
@settings(max_examples=25, deadline=None)
def test_batched_guidance_equals_sequential(batch, scale):
    latents, timesteps = torch.randn(batch, 2, 3), torch.full((batch,), 500.0)
    results, calls = [], []
    for batched in (True, False):
        guided = guide(branches(calls), 2.0, 0.5, scale, batched=batched)
        results.append(guided(latents, timesteps))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    expected = (0.5 + scale * 1.5) * latents
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-4)
    assert calls == [
        (2 * batch, (2 * batch,), (2.0, 0.5)),
        (batch, (batch,), (2.0,)),
        (batch, (batch,), (0.5,)),
    ]


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-12])
def test_a_scale_of_one_skips_the_unconditional_branch(scale):
    calls = []
    guided = guide(branches(calls), 2.0, None, scale, batched=True)
    assert torch.equal(guided(torch.ones(1, 2), torch.zeros(1)), torch.full((1, 2), 2.0))
    assert calls == [(1, (1,), (2.0,))]


def test_guidance_without_an_unconditional_branch_is_refused():
    with pytest.raises(ValueError, match=r"scale of 4\.0 needs an unconditional"):
        guide(branches([]), 2.0, None, 4.0)


@given(
    st.sampled_from(CONTEXT_SCHEDULES),
    st.sampled_from(FUSE_METHODS),
    st.sampled_from([4, 8]),
    st.integers(0, 7),
    st.integers(33, 200),
)
@settings(max_examples=80, deadline=None)
def test_windows_that_agree_give_their_velocity_unchanged(schedule, fuse, stride, step, frames):
    options = ContextOptions(schedule=schedule, frames=33, stride=stride, overlap=8, fuse=fuse)
    total = (frames - 1) // 4 + 1
    found, weights = weighted_windows(options, step, total)
    velocity = torch.arange(2.0 * total).reshape(1, 2, total, 1, 1)

    def predict_window(part, window):
        assert torch.equal(part, velocity[:, :, window])
        return part

    fused = fused_windows(predict_window, velocity, found, weights)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, velocity, rtol=1e-6, atol=1e-5)


def test_fused_windows_is_the_weighted_mean():
    latents = torch.zeros(1, 1, 3, 1, 1)
    values = {0: 10.0, 1: 40.0}

    def predict_window(part, window):
        return torch.full_like(part, values[window[0]]).bfloat16()

    fused = fused_windows(predict_window, latents, [[0, 1], [1, 2]], [[1.0, 0.25], [0.5, 1.0]])
    assert fused.flatten().tolist() == pytest.approx([10, 30, 40])


def test_windows_do_not_see_one_another_and_report():
    latents, seen, told = torch.randn(1, 2, 5, 1, 1), [], []

    def predict_window(part, window):
        seen.append(part.clone())
        return part * 100

    lists, weights = [[0, 1, 2], [4, 0, 2], [2, 3, 4]], [[1.0] * 3] * 3
    fused_windows(
        predict_window, latents, lists, weights, on_window=lambda *counts: told.append(counts)
    )
    for part, window in zip(seen, lists, strict=True):
        assert torch.equal(part, latents[:, :, window])
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_frame_in_no_window_is_an_error():
    with pytest.raises(ValueError, match="latent frame 2 is in no window"):
        fused_windows(
            lambda part, window: part, torch.zeros(1, 1, 4, 1, 1), [[0, 1], [3]], [[1, 1], [1]]
        )


def test_fusing_reads_nothing_back():
    found, weights = weighted_windows(ContextOptions(stride=8), 1, 61)
    with Operations() as seen:
        fused_windows(lambda part, window: part * 2, torch.zeros(1, 16, 61, 2, 2), found, weights)
    assert any(window[1] - window[0] == 2 for window in found)
    assert "_local_scalar_dense" not in seen.names
