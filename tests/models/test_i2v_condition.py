"""The image-to-video condition: pixels, mask, and the 20 channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.vae_cases import noise, tiny_vae
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.i2v_condition import (
    I2VImages,
    build_condition,
    condition_mask,
    condition_video,
)

START, END = noise(3, 1, 16, 24), noise(3, 1, 16, 24, seed=2)


def encode(video):
    """A stand-in for the VAE: 16 channels that depend on the first frame of each group."""
    first = video[:, :1, :1, ::8, ::8]
    rest = video[:, :1, 1::4, ::8, ::8]
    return torch.cat([first, rest], dim=2).repeat(1, 16, 1, 1, 1)


def test_one_start_image():
    images = I2VImages(START)
    video = condition_video(images, 9)
    assert video.shape == (3, 9, 16, 24)
    assert torch.equal(video[:, :1], START)
    assert not video[:, 1:].any()
    mask = condition_mask(images, 9)
    assert mask.shape == (4, 3, 2, 3)
    assert mask[:, 0].all()
    assert not mask[:, 1:].any()
    condition = build_condition(encode, images, 9)
    assert condition.shape == (20, 3, 2, 3)
    assert torch.equal(condition[:4], mask)
    assert torch.equal(condition[4:], encode(video[None])[0])


def test_frames_are_rounded_down_to_4n_plus_1():
    images = I2VImages(START)
    for frames in (9, 10, 12):
        assert condition_video(images, frames).shape[1] == 9
        assert torch.equal(condition_mask(images, frames), condition_mask(images, 9))
    assert condition_mask(images, 13).shape[1] == 4
    assert condition_mask(images, 1).shape[1] == 1


def test_several_start_frames_fill_the_mask_frame_by_frame():
    images = I2VImages(noise(3, 3, 8, 8))
    assert condition_mask(images, 9)[:, :, 0, 0].T.tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_the_end_image_is_the_last_frame_of_an_flf2v_model():
    images = I2VImages(START, END, flf2v=True)
    video = condition_video(images, 9)
    assert torch.equal(video[:, 8:], END)
    assert video.shape[1] == 9
    assert condition_mask(images, 9)[:, :, 0, 0].T.tolist()[2] == [0, 0, 0, 1]
    assert build_condition(encode, images, 9).shape[1] == 3


def test_otherwise_the_end_image_is_a_clip_of_its_own():
    images = I2VImages(START, END, flf2v=False)
    seen = []

    def watch(video):
        seen.append(video)
        return encode(video)

    condition = build_condition(watch, images, 9)
    assert [tuple(video.shape[1:3]) for video in seen] == [(3, 9), (3, 1)]
    assert torch.equal(seen[1][0], END)
    assert condition.shape == (20, 4, 2, 3)
    assert condition[:4, 3].all()
    assert not condition[:4, 2].any()
    assert torch.equal(condition[4, 3], END[0, 0, ::8, ::8])


def test_an_end_image_alone_always_has_the_flf2v_layout():
    for flf2v in (False, True):
        images = I2VImages(end=END, flf2v=flf2v)
        assert not images.end_apart
        assert torch.equal(condition_video(images, 5)[:, 4:], END)
        assert condition_mask(images, 5)[:, :, 0, 0].T.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


def test_strengths_scale_the_first_and_last_latent_frame_only():
    images = I2VImages(START, END)
    plain = build_condition(encode, images, 9)
    strong = build_condition(encode, images, 9, start_strength=0.5, end_strength=2.0)
    assert torch.equal(strong[:4], plain[:4])
    factors = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    assert torch.equal(strong[4:], plain[4:] * factors)


def test_the_latents_of_the_caller_are_not_changed():
    latents = encode(condition_video(I2VImages(START), 9)[None])
    before = latents.clone()
    build_condition(lambda _: latents, I2VImages(START), 9, start_strength=0.0)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("start_frames", [1, 4, 5])
def test_a_repeated_grey_tail_is_encoded_once_and_exactly(start_frames):
    vae = tiny_vae(dtype=torch.float64, fast=True)
    images = I2VImages(noise(3, start_frames, 8, 8).double())
    lengths = []

    def counted(video):
        lengths.append(video.shape[2])
        return vae.encode(video)

    look_back = vae.config.look_back
    short = build_condition(counted, images, 141, look_back=look_back)
    whole = build_condition(counted, images, 141)
    # The first latent frame whose 112 + 1 pixel frames are all grey.
    steady = next(t for t in range(36) if 4 * t - look_back >= start_frames)
    assert lengths == [4 * steady + 1, 141]
    assert short.shape == whole.shape
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-12)
    # One frame of look-back less would not do.
    early = build_condition(counted, images, 141, look_back=look_back - 4)
    assert (early - whole).abs().max() > 0


def test_short_videos_and_end_images_are_encoded_whole():
    lengths = []

    def counted(video):
        lengths.append(video.shape[2])
        return encode(video)

    build_condition(counted, I2VImages(START), 117, look_back=112)
    build_condition(counted, I2VImages(START, END), 141, look_back=112)
    build_condition(counted, I2VImages(START), 141, look_back=None)
    assert lengths == [117, 141, 141]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_every_given_frame_is_marked_and_no_other(frames, start, end):
    kept = (frames - 1) // 4 * 4 + 1
    images = I2VImages(torch.ones(3, start, 8, 8), torch.ones(3, end, 8, 8) if end else None)
    if start + end > kept:
        with pytest.raises(InvalidRequest, match="num_frames is"):
            condition_mask(images, frames)
        return
    mask = condition_mask(images, frames)[:, :, 0, 0].T.flatten()
    assert torch.equal(mask[3:], condition_video(images, frames)[0, :, 0, 0])
    assert torch.equal(mask[:3], mask[:1].expand(3))


def test_impossible_images_are_refused():
    with pytest.raises(InvalidRequest, match="give one of them"):
        I2VImages()
    with pytest.raises(InvalidRequest, match="of one size"):
        I2VImages(START, noise(3, 1, 8, 8))
    with pytest.raises(InvalidRequest, match="of one size"):
        I2VImages(START[0])
    with pytest.raises(InvalidRequest, match="without flf2v each must be 1"):
        I2VImages(noise(3, 2, 16, 24), END, flf2v=False)
    with pytest.raises(InvalidRequest, match="num_frames is 0"):
        condition_video(I2VImages(START), 0)
