"""Block swap in time: every order that the events allow is right, and stalls are as predicted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from tests.models.builders import fill, normal
from tests.ops.lanes import ClockLanes, QueueLanes
from xicon_infer.formulas_memory import swap_stall_seconds
from xicon_infer.ops.offload import BlockSwap, spread

CPU = torch.device("cpu")


def run_queued(lanes, passes, *, layers=6, swapped=4, buffers=2, stop_at=None):
    """Runs blocks on a device whose computing lags behind; returns results and expectation."""
    blocks = [fill(nn.Linear(4, 4), seed=i) for i in range(layers)]
    expected = normal(3, 4)
    for _ in range(passes):
        for block in blocks:
            expected = block(expected)
    swap = BlockSwap(blocks, swapped, CPU, buffers=buffers, lanes=lanes)
    state = {"x": normal(3, 4)}

    def work(block, weights):
        state["x"] = functional_call(block, weights, state["x"])

    swap.attach(hooks=False)
    if stop_at is not None:
        for index in range(stop_at):
            with swap.block(index):
                pass
    for _ in range(passes):
        for index, block in enumerate(blocks):
            with swap.block(index):
                # A kernel keeps the addresses that it was launched with.
                weights = {name: p.data for name, p in block.named_parameters()}
                lanes.compute(lambda block=block, weights=weights: work(block, weights))
    lanes.run()
    swap.detach()
    return state["x"], expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(2, 4),
    st.sampled_from([None, 1, 3, 5]),
)
def test_no_order_that_the_events_allow_changes_the_result(seed, swapped, buffers, stop_at):
    found, expected = run_queued(
        QueueLanes(seed), 3, swapped=swapped, buffers=buffers, stop_at=stop_at
    )
    assert torch.equal(found, expected)


def test_without_the_events_the_result_is_wrong():
    wrong = 0
    for seed in range(20):
        found, expected = run_queued(QueueLanes(seed, obey=False), 3)
        wrong += not torch.equal(found, expected)
    assert wrong >= 15


@pytest.mark.parametrize("left_out", ["copy", "compute"])
def test_both_directions_of_waiting_are_needed(left_out):
    class Deaf(QueueLanes):
        def wait(self, event, lane):
            if lane != left_out:
                super().wait(event, lane)

    results = [run_queued(Deaf(seed), 3) for seed in range(40)]
    assert any(not torch.equal(found, expected) for found, expected in results)


def test_nothing_is_allocated_and_nothing_copied_twice_in_the_loop():
    lanes = QueueLanes()
    run_queued(lanes, 5, layers=6, swapped=4, buffers=3)
    assert lanes.allocations == 3
    # One copy per swapped block and pass, and those that were made ahead.
    assert 5 * 4 <= lanes.copies <= 5 * 4 + 3
    few = QueueLanes()
    run_queued(few, 5, swapped=2)
    assert few.copies == 2  # both stay in their buffers


# Time


def stalls(blocks, swapped, copy_s, compute_s, passes=12):
    """Returns the stalls of the last pass."""
    lanes = ClockLanes(copy_s)
    modules = [nn.Linear(1, 1) for _ in range(blocks)]
    swap = BlockSwap(modules, swapped, CPU, lanes=lanes)
    swap.attach(hooks=False)
    for _ in range(passes):
        lanes.stalls.clear()
        for index in range(blocks):
            with swap.block(index):
                lanes.compute(compute_s)
    swap.detach()
    return lanes.stalls


@pytest.mark.parametrize("swapped", [4, 5, 8, 10, 20, 40])
@pytest.mark.parametrize("copy_s", [0.5, 1.0, 1.9, 2.0, 3.0, 7.5])
def test_stalls_are_those_of_the_formula(swapped, copy_s):
    blocks, compute_s = 40, 1.0
    found = stalls(blocks, swapped, copy_s, compute_s)
    expected = swap_stall_seconds(copy_s, compute_s, blocks, swapped)
    assert sum(found) == pytest.approx(expected)
    assert len(found) == (swapped if expected else 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 40), st.integers(3, 40), st.floats(0.1, 8))
def test_an_uneven_swap_stalls_little_more(blocks, swapped, copy_s):
    swapped = min(swapped, blocks)
    found = sum(stalls(blocks, swapped, copy_s, 1.0, passes=40))
    expected = swap_stall_seconds(copy_s, 1.0, blocks, swapped)
    assert found >= expected - 1e-6
    if copy_s <= blocks // swapped:
        assert found == pytest.approx(0)
    # Gaps differ by one block, so each copy can be late by at most one block's time.
    assert found <= expected + swapped


def test_copies_are_made_ahead():
    assert not stalls(8, 4, 1.5, 1.0)
    assert stalls(8, 4, 2.5, 1.0)


@given(st.integers(1, 60), st.integers(0, 60))
def test_swapped_blocks_are_spread_evenly(blocks, swapped):
    swapped = min(swapped, blocks)
    found = spread(swapped, blocks)
    assert len(set(found)) == swapped
    assert found == sorted(found)
    assert all(0 <= index < blocks for index in found)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert not gaps or gaps <= {math.floor(blocks / swapped), math.ceil(blocks / swapped)}
