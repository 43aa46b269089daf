"""Step caches on a fake model: which steps are skipped, what comes out, what is kept apart."""

from __future__ import annotations

import pytest
import torch

from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.cache_options import KEPT_TENSORS, CacheOptions, variant_of
from xicon_infer.sampling.cache_tables import MAGCACHE_RATIOS, TEACACHE_POLYNOMIALS
from xicon_infer.sampling.step_cache import (
    PLAIN,
    EasyCache,
    MagCache,
    Moment,
    StepCaching,
    StepRange,
    TeaCache,
    make_caching,
)
from xicon_infer.types import STEP_CACHES

STEPS = 20
GROWN = 1 + 0.01 * torch.arange(STEPS)
"""The time embedding grows by 1 % of its first value per step; its projection by its cube."""
EMBEDDINGS = GROWN[:, None].expand(STEPS, 3)
PROJECTIONS = (GROWN**3)[:, None].expand(STEPS, 18)


def tokens(step):
    """They grow by 0.1 % of their first value per step."""
    return torch.full((1, 4, 3), 1 + 0.001 * step)


FROM_ONE = StepRange(1)


def tea(threshold, *, span=FROM_ONE, projected=True, polynomial=PLAIN):
    embeddings = PROJECTIONS if projected else EMBEDDINGS
    return TeaCache(embeddings, threshold, polynomial=polynomial, steps=span)


def run(cache, branches=("cond",), layouts=None):
    """Returns the steps that ran the blocks, per branch, and every output."""
    computed, outputs = {branch: [] for branch in branches}, []
    caching = cache if isinstance(cache, StepCaching) else StepCaching(cache, STEPS)
    for step in range(STEPS):
        for number, branch in enumerate(branches):
            entering = tokens(step)
            one = caching.at(step, branch, layouts[step] if layouts else None)
            leaving = one.recall(entering)
            if leaving is None:
                computed[branch].append(step)
                leaving = entering + 1 + step + 100 * number
                one.keep(entering, leaving)
            outputs.append(leaving)
    assert caching.passes == STEPS * len(branches)
    assert caching.passes - caching.skipped == sum(map(len, computed.values()))
    return computed, outputs


def test_teacache_skips_while_the_embedding_has_moved_little():
    computed, _ = run(tea(0.05))
    # Step 0 is outside; from 1: the projection moves about 3 % per step: 0.03 + 0.06 > 0.05.
    assert computed["cond"] == [0, 1, *range(3, STEPS, 2)]


def test_teacache_adds_the_residual_of_the_last_computed_step():
    _, outputs = run(tea(0.05))
    # Step 2 reuses step 1, whose blocks added 2; its own input is 1.002.
    assert outputs[2][0, 0, 0].item() == pytest.approx(1.002 + 2)


def test_teacache_measures_from_the_last_computed_step():
    computed, _ = run(tea(0.2, span=StepRange(1, 5)))
    # 0.03, + 0.06 = 0.09, + 0.09 = 0.18 are below 0.2; the range then ends.
    assert computed["cond"] == [0, 1, 5, *range(6, STEPS)]


def test_teacache_threshold_polynomial_and_embedding_decide():
    def computed(threshold, variant="1_3B", mode="e"):
        polynomial = TEACACHE_POLYNOMIALS[variant][mode] if variant else PLAIN
        return run(tea(threshold, projected=mode == "e0", polynomial=polynomial))[0]["cond"]

    assert computed(0.2) != computed(0.3)
    assert computed(0.1) != computed(0.1, None)
    assert computed(0.3) != computed(0.3, "i2v_480")
    assert computed(0.2) != computed(0.2, "1_3B", "e0")


def test_teacache_polynomial_value_is_the_published_one():
    # 1.3B, "e": at a distance of 0.05 the fit gives 0.0772; one step of it is below 0.08.
    polynomial = TEACACHE_POLYNOMIALS["1_3B"]["e"]
    x = 0.05
    value = 2396.76752 * x**4 - 1311.10545 * x**3 + 201.331979 * x**2 - 8.29855975 * x + 0.137887774
    first, second = (Moment(step, STEPS, "cond", tokens(step)) for step in (0, 5))
    for threshold, skips in ((value + 1e-4, True), (value - 1e-4, False)):
        cache = tea(threshold, span=StepRange(0), projected=False, polynomial=polynomial)
        assert cache.residual(first) is None
        cache.store(first, first.hidden_states + 1)
        assert (cache.residual(second) is not None) == skips


def expected_mag(threshold, max_skips, start):
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


def test_magcache_skips_by_calibrated_error_and_count():
    cases = ((0.02, 4, 1), (0.1, 4, 1), (0.1, 2, 1), (0.1, 4, 8))
    for threshold, max_skips, start in cases:
        cache = MagCache(threshold, variant="14B", max_skips=max_skips, steps=StepRange(start))
        assert run(cache)[0]["cond"] == expected_mag(threshold, max_skips, start)
    assert len({tuple(expected_mag(*case)) for case in cases[:3]}) == 3


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


EVERY = [
    lambda steps: tea(0.3, span=steps),
    lambda steps: MagCache(0.1, steps=steps),
    lambda steps: EasyCache(0.5, steps=steps),
]


@pytest.mark.parametrize("make", EVERY)
def test_ranges_and_branches_hold_for_every_cache(make):
    computed, outputs = run(make(StepRange(4, 12)), branches=("cond", ("uncond", 1)))
    for steps in computed.values():
        assert set(range(5)) | set(range(13, STEPS)) <= set(steps)
        assert len(steps) < STEPS
    # The second branch's blocks add 100 more: its residual is its own.
    for step in range(STEPS):
        assert outputs[2 * step + 1].mean() > 100 > outputs[2 * step].mean()


@pytest.mark.parametrize("make", EVERY)
def test_a_change_of_the_other_tokens_forces_a_computation(make):
    plain, _ = run(make(StepRange(1)))
    # After step 1 is computed, step 2 is the first that every cache skips.
    assert 2 not in plain["cond"]
    changed, _ = run(make(StepRange(1)), layouts=["with pose"] * 2 + ["without"] * (STEPS - 2))
    assert 2 in changed["cond"]


def test_a_cache_does_not_change_what_it_is_given():
    cache = tea(1.0, span=StepRange(0))
    first, second = (Moment(step, STEPS, "cond", tokens(step)) for step in (0, 1))
    cache.store(first, first.hidden_states + 1)
    before = second.hidden_states.clone()
    residual = cache.residual(second)
    assert torch.equal(second.hidden_states, before)
    assert torch.equal(residual, torch.ones(1, 4, 3))


def test_options_make_the_cache_they_name():
    assert make_caching(CacheOptions(), EMBEDDINGS) is None
    for method in STEP_CACHES[1:]:
        caching = make_caching(CacheOptions(method, threshold=1.0, start=2), EMBEDDINGS)
        computed = run(caching)[0]["cond"]
        assert computed[:3] == [0, 1, 2]
        assert 3 not in computed
        # Polynomials of TeaCache are below 0 for small distances, which allows a skip at any limit.
        never = make_caching(CacheOptions(method, threshold=0.0, start=2), EMBEDDINGS)
        assert method == "teacache" or run(never)[0]["cond"] == list(range(STEPS))
        late = make_caching(CacheOptions(method, threshold=1.0, start=2, end=4), EMBEDDINGS)
        assert run(late)[0]["cond"][3:] == list(range(5, STEPS))
    usual = CacheOptions("teacache", variant="1_3B").used_threshold
    assert usual < CacheOptions("teacache").used_threshold
    assert CacheOptions("easycache").used_start == 10
    assert set(KEPT_TENSORS) == set(STEP_CACHES)


@pytest.mark.parametrize(
    ("values", "steps", "batching", "field", "message"),
    [
        ({"method": "teacache"}, 11, "auto", "step_cache", "at least 12 steps, got 11"),
        ({"method": "easycache"}, 12, "batched", "guidance_batching", "each branch alone"),
        ({"method": "magcache", "start": 12}, 12, "auto", "step_cache_start", "behind the last"),
        (
            {"method": "magcache", "start": 5, "end": 4},
            20,
            "auto",
            "step_cache_start",
            "cached step, 4 of",
        ),
    ],
)
def test_runs_that_a_cache_does_not_suit_are_refused(values, steps, batching, field, message):
    options = CacheOptions(**values)
    with pytest.raises(InvalidRequest, match=message) as error:
        options.check(steps, batching)
    assert error.value.field == field
    CacheOptions().check(steps, batching)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"method": "dbcache"}, "step_cache"),
        ({"method": "teacache", "threshold": 1.5}, "step_cache_threshold"),
        ({"method": "teacache", "start": -1}, "step_cache_start"),
        ({"method": "teacache", "end": -2}, "step_cache_start"),
    ],
)
def test_values_that_cannot_be_used_are_refused(values, field):
    with pytest.raises(InvalidRequest) as error:
        CacheOptions(**values)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("pipeline", "weights", "variant"),
    [
        ("wan_t2v", "1.3b", "1_3B"),
        ("wan_t2v", "fp8", "14B"),
        ("wan_i2v", "fp8", "i2v_480"),
        ("wan_i2v", "bf16-720p", "i2v_720"),
        ("wan_i2v", "flf2v-fp8", "i2v_720"),
        ("wan_i2v", "Wan2_1-I2V-14B-720P_fp8.safetensors", "i2v_720"),
        ("scail", "fp8", "14B"),
        ("steady_dancer", "gguf", "14B"),
    ],
)
def test_the_calibration_follows_the_weights(pipeline, weights, variant):
    assert variant_of(pipeline, weights) == variant
    assert variant in MAGCACHE_RATIOS
    assert variant in TEACACHE_POLYNOMIALS
