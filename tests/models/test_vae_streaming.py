"""A video may come and go in pieces of any size; the result does not depend on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.errors import InvalidRequest

VIDEO = noise(1, 3, 18, 16, 8)
LATENTS = noise(1, 4, 6, 2, 3, seed=2)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sizes", [[18], [1] * 18, [1, 4, 4, 4, 4, 1], [3, 7, 8], [9, 0, 9]])
def test_encoding_pieces_is_bit_identical_to_encoding_the_whole(sizes, fast):
    vae = tiny_vae(fast=fast)
    assert torch.equal(vae.encode_chunks(torch.split(VIDEO, sizes, dim=2)), vae.encode(VIDEO))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), chunk=st.integers(1, 3))
def test_any_pieces_and_any_chunk_give_the_same_latents(sizes, chunk):
    vae = tiny_vae(dtype=torch.float64, fast=True)
    video = noise(1, 3, sum(sizes), 8, 8).double()
    pieces = vae.encode_chunks(iter(torch.split(video, sizes, dim=2)), chunk=chunk)
    torch.testing.assert_close(pieces, vae.encode(video), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("chunk", [2, 3, 4, 5, 99])
def test_every_chunk_decodes_the_same_video(chunk, fast):
    vae = tiny_vae(dtype=torch.float64, fast=fast)
    latents = LATENTS.double()
    wanted = vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents, chunk=chunk), wanted, rtol=1e-12, atol=1e-12)


def test_pieces_of_a_decoded_video_join_to_the_whole():
    vae = tiny_vae()
    for chunk, frames in ((1, [1, 4, 4, 4, 4, 4]), (2, [1, 8, 8, 4]), (5, [1, 20])):
        pieces = list(vae.iter_decode(LATENTS, chunk=chunk))
        assert [piece.shape[2] for piece in pieces] == frames
        assert torch.equal(torch.cat(pieces, dim=2), vae.decode(LATENTS, chunk=chunk))


def test_the_first_latent_alone_is_the_first_frame():
    vae = tiny_vae(dtype=torch.float64)
    first = vae.decode(LATENTS[:, :, :1].double())
    assert first.shape[2] == 1
    torch.testing.assert_close(first, vae.decode(LATENTS.double())[:, :, :1])


@pytest.mark.parametrize("fast", [False, True])
def test_interleaved_videos_do_not_see_each_other(fast):
    vae = tiny_vae(fast=fast)
    videos = VIDEO, noise(1, 3, 18, 16, 8, seed=5)
    states = vae.begin(), vae.begin()
    got = [[], []]
    for frames in (slice(0, 1), slice(1, 5), slice(5, 9)):
        for i in range(2):
            got[i].append(vae.encode_step(videos[i][:, :, frames], states[i]))
    for i in range(2):
        assert torch.equal(torch.cat(got[i], dim=2), vae.encode(videos[i][:, :, :9]))
    one, other = vae.iter_decode(LATENTS), vae.iter_decode(-LATENTS)
    pairs = list(zip(one, other, strict=True))
    assert torch.equal(torch.cat([pair[1] for pair in pairs], dim=2), vae.decode(-LATENTS))


def test_nothing_is_kept_on_the_modules():
    vae = tiny_vae()
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    vae.decode(LATENTS)
    vae.encode(VIDEO)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


def test_pieces_are_asked_for_one_at_a_time():
    vae, asked = tiny_vae(), []

    def pieces():
        for i in range(9):
            asked.append(i)
            yield VIDEO[:, :, i : i + 1]

    steps = []
    vae.encoder.register_forward_hook(lambda *_: steps.append(len(asked)))
    vae.encode_chunks(pieces())
    assert steps == [1, 5, 9]


def test_the_future_does_not_change_the_past():
    vae = tiny_vae()
    changed = VIDEO.clone()
    changed[:, :, 9:] += 0.5
    before, after = vae.encode(VIDEO), vae.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])
    later = LATENTS.clone()
    later[:, :, 3:] += 0.5
    assert torch.equal(vae.decode(LATENTS)[:, :, :9], vae.decode(later)[:, :, :9])


def test_the_look_back_is_as_long_as_stated_and_no_longer():
    vae = tiny_vae(dtype=torch.float64, fast=True)
    still = torch.zeros(1, 3, 121, 8, 8, dtype=torch.float64)
    moved = still.clone()
    moved[:, :, 0] = 0.7
    difference = (vae.encode(moved) - vae.encode(still)).abs().amax(dim=(0, 1, 3, 4))
    last = vae.config.look_back // 4
    assert difference[last] > 0
    assert not difference[last + 1 :].any()


def test_pieces_of_different_sizes_are_refused():
    with pytest.raises(InvalidRequest, match="H and W multiples of 8"):
        tiny_vae().encode_chunks([VIDEO[:, :, :1], VIDEO[:, :, 1:5, :, :4]])
    with pytest.raises(InvalidRequest, match=r"as in the pieces before, \(1, 16, 8\)"):
        tiny_vae().encode_chunks([VIDEO[:, :, :1], VIDEO[:, :, 1:5, :8]])
