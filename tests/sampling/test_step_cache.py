"""Step caches on a fake model: which steps are skipped, what comes out, what is kept apart."""

from __future__ import annotations

import pytest
import torch

from xicon_infer.sampling.cache_tables import MAGCACHE_RATIOS
from xicon_infer.sampling.step_cache import (
    EasyCache,
    MagCache,
    Moment,
    StepRange,
    TeaCache,
    run_cached,
)

STEPS = 20


def moment(step, branch="cond", size=1.0):
    """The time embedding grows by 1 % of its first value per step, the tokens by 0.1 %."""
    grown = 1 + 0.01 * step
    return Moment(
        step=step,
        num_steps=STEPS,
        branch=branch,
        hidden_states=torch.full((1, 4, 3), size * (1 + 0.001 * step)),
        time_embedding=torch.full((1, 3), grown),
        time_projection=torch.full((1, 6, 3), grown**3),
    )


def run(cache, branches=("cond",)):
    """Returns the steps that ran the blocks, per branch, and every output."""
    computed, outputs = {branch: [] for branch in branches}, []

    for step in range(STEPS):
        for number, branch in enumerate(branches):

            def blocks(hidden, step=step, branch=branch, number=number):
                computed[branch].append(step)
                return hidden + 1 + step + 100 * number

            outputs.append(run_cached(cache, moment(step, branch), blocks))
    return computed, outputs


def test_without_a_cache_every_step_is_computed():
    computed, outputs = run(None)
    assert computed["cond"] == list(range(STEPS))
    assert outputs[5][0, 0, 0].item() == pytest.approx(1.005 + 6)


def test_teacache_skips_while_the_embedding_has_moved_little():
    computed, _ = run(TeaCache(0.05, variant=None, steps=StepRange(1)))
    # Step 0 is outside; from 1: e0 = grown^3 moves about 3 % per step: 0.03 + 0.06 > 0.05.
    assert computed["cond"] == [0, 1, *range(3, STEPS, 2)]


def test_teacache_adds_the_residual_of_the_last_computed_step():
    _, outputs = run(TeaCache(0.05, variant=None, steps=StepRange(1)))
    # Step 2 reuses step 1, whose blocks added 2; its own input is 1.002.
    assert outputs[2][0, 0, 0].item() == pytest.approx(1.002 + 2)


def test_teacache_measures_from_the_last_computed_step():
    computed, _ = run(TeaCache(0.2, variant=None, steps=StepRange(1, 5)))
    # 0.03, + 0.06 = 0.09, + 0.09 = 0.18 are below 0.2; the range then ends.
    assert computed["cond"] == [0, 1, 5, *range(6, STEPS)]


def test_teacache_threshold_variant_and_mode_decide():
    def computed(threshold, variant, mode="e"):
        return run(TeaCache(threshold, variant=variant, mode=mode))[0]["cond"]

    assert computed(0.2, "1_3B") != computed(0.3, "1_3B")
    assert computed(0.1, "1_3B") != computed(0.1, None)
    assert computed(0.3, "1_3B") != computed(0.3, "i2v_480")
    assert computed(0.2, "1_3B") != computed(0.2, "1_3B", "e0")
    # Without a polynomial the projection is compared, whatever the mode.
    assert computed(0.1, None) == computed(0.1, None, "e0")


def test_teacache_polynomial_value_is_the_published_one():
    # 1.3B, "e": at a distance of 0.05 the fit gives 0.0772; one step of it is below 0.08.
    cache = TeaCache(0.08, variant="1_3B", steps=StepRange(0))
    first, second = moment(0), moment(5)
    assert cache.residual(first) is None
    cache.store(first, first.hidden_states + 1)
    x = 0.05
    value = 2396.76752 * x**4 - 1311.10545 * x**3 + 201.331979 * x**2 - 8.29855975 * x + 0.137887774
    assert (cache.residual(second) is not None) == (value < 0.08)
    tighter = TeaCache(value - 1e-4, variant="1_3B", steps=StepRange(0))
    tighter.store(first, first.hidden_states + 1)
    assert tighter.residual(second) is None


def test_magcache_skips_by_calibrated_error_and_count():
    def expected(threshold, max_skips, start):
        """The rule, written out: reset on compute, skip while error and count allow it."""
        ratios, computed, ready = MAGCACHE_RATIOS["14B"], [], False
        ratio, error, count = 1.0, 0.0, 0
        for step in range(STEPS):
            if step >= start and ready:
                ratio *= ratios[int(step * (50 / STEPS))]
                error += abs(1 - ratio)
                count += 1
                if error <= threshold and count <= max_skips:
                    continue
            computed.append(step)
            if step >= start:
                ready, ratio, error, count = True, 1.0, 0.0, 0
        return computed

    for threshold, max_skips, start in ((0.02, 4, 1), (0.1, 4, 1), (0.1, 2, 1), (0.1, 4, 8)):
        cache = MagCache(threshold, variant="14B", max_skips=max_skips, steps=StepRange(start))
        assert run(cache)[0]["cond"] == expected(threshold, max_skips, start)
    patterns = {tuple(expected(*case)) for case in ((0.02, 4, 1), (0.1, 4, 1), (0.1, 2, 1))}
    assert len(patterns) == 3


def test_magcache_variant_decides():
    assert run(MagCache(0.02, variant="i2v_480"))[0] != run(MagCache(0.02, variant="14B"))[0]


def test_easycache_compares_input_movement_with_the_last_output():
    # Input moves 0.001 per step; the last output is about step + 2.
    computed, outputs = run(EasyCache(0.0011, steps=StepRange(3)))
    assert computed["cond"][:4] == [0, 1, 2, 3]
    # From step 3 (output 5.003): 0.001 k / output stays below while k < 0.0011 * 5 / 0.001.
    assert computed["cond"][4] == 9
    assert outputs[4][0, 0, 0].item() == pytest.approx(1.004 + 4)


def test_easycache_threshold_decides():
    assert run(EasyCache(0.0))[0]["cond"] == list(range(STEPS))
    assert run(EasyCache(1.0))[0]["cond"] == list(range(11))
    assert run(EasyCache(1.0, steps=StepRange(3, 7)))[0]["cond"] == [0, 1, 2, 3, *range(8, STEPS)]


@pytest.mark.parametrize(
    "make",
    [
        lambda steps: TeaCache(0.3, variant=None, steps=steps),
        lambda steps: MagCache(0.1, steps=steps),
        lambda steps: EasyCache(0.5, steps=steps),
    ],
)
def test_ranges_and_branches_hold_for_every_cache(make):
    computed, outputs = run(make(StepRange(4, 12)), branches=("cond", ("uncond", 1)))
    for steps in computed.values():
        assert set(range(5)) | set(range(13, STEPS)) <= set(steps)
        assert len(steps) < STEPS
    # The second branch's blocks add 100 more: its residual is its own.
    for step in range(STEPS):
        assert outputs[2 * step + 1].mean() > 100 > outputs[2 * step].mean()


def test_a_cache_does_not_change_what_it_is_given():
    cache = TeaCache(1.0, variant=None, steps=StepRange(0))
    first = moment(0)
    output = first.hidden_states + 1
    cache.store(first, output)
    second = moment(1)
    before = second.hidden_states.clone()
    residual = cache.residual(second)
    assert torch.equal(second.hidden_states, before)
    assert torch.equal(residual, torch.ones(1, 4, 3))
