"""Seeds, FreeNoise and the order of draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.sampling.noise import MAX_SEED, freenoise, initial_noise, step_noise

SHAPE = (16, 9, 2, 3)


def test_the_seed_decides_the_noise():
    first, _ = initial_noise(7, SHAPE)
    again, _ = initial_noise(7, SHAPE)
    other, _ = initial_noise(8, SHAPE)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_axis_does_not_change_the_numbers():
    assert torch.equal(initial_noise(7, (1, *SHAPE))[0][0], initial_noise(7, SHAPE)[0])


@pytest.mark.parametrize("seed", [0, 2**53, 2**63, MAX_SEED])
def test_every_64_bit_seed_works(seed):
    assert initial_noise(seed, SHAPE)[0].isfinite().all()


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_other_seeds_are_refused(seed):
    with pytest.raises(InvalidRequest, match="'seed' must be between 0 and 18446744073709551615"):
        initial_noise(seed, SHAPE)


def test_draws_follow_one_another():
    noise, generator = initial_noise(3, SHAPE)
    following = step_noise(generator, SHAPE)
    stream = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack([noise, following]), stream)


def test_freenoise_draws_from_the_same_generator():
    (noise, generator), (_, untouched) = initial_noise(3, SHAPE), initial_noise(3, SHAPE)
    freenoise(noise, 4, 2, generator)
    assert not torch.equal(step_noise(generator, (4,)), step_noise(untouched, (4,)))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 11), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_freenoise_copies_whole_frames_of_the_window_before(frames, context, overlap, seed):
    overlap = min(overlap, context - 1)
    index = torch.arange(frames)[:, None, None]
    source = freenoise(index, context, overlap, torch.Generator().manual_seed(seed)).flatten()
    assert torch.equal(source[:context], torch.arange(frames)[:context])
    assert (source < context).all()
    advance = context - overlap
    for place in range(context, frames, advance):
        piece = source[place : place + advance]
        start = place - context
        donors = source[start : start + len(piece)]
        assert sorted(piece.tolist()) == sorted(donors.tolist())


def test_freenoise_leaves_short_noise_and_its_input_alone():
    noise, generator = initial_noise(3, SHAPE)
    before = noise.clone()
    assert torch.equal(freenoise(noise, 9, 2, generator), noise)
    changed = freenoise(noise, 5, 2, generator)
    assert torch.equal(noise, before)
    assert not torch.equal(changed, noise)


def test_freenoise_depends_on_every_argument():
    noise, _ = initial_noise(3, SHAPE)

    def shuffled(context, overlap, seed):
        return freenoise(noise, context, overlap, torch.Generator().manual_seed(seed))

    base = shuffled(4, 2, 0)
    for other in (shuffled(5, 2, 0), shuffled(4, 1, 0), shuffled(4, 2, 1)):
        assert not torch.equal(base, other)


def test_freenoise_takes_a_batch_axis():
    noise, _ = initial_noise(3, SHAPE)
    single = freenoise(noise, 4, 2, torch.Generator().manual_seed(0))
    batch = freenoise(noise[None], 4, 2, torch.Generator().manual_seed(0))
    assert torch.equal(batch[0], single)
