"""The Wan recipe on tiny components: pictures, every option, windows, first and last picture."""

from __future__ import annotations

from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipelines import build_pipeline, tiny
from pipelines.loading import LoadOptions, assemble, load_tiny
from pipelines.wan_video import WanOptions, WanVideoPipeline, check_pictures, window_condition
from xicon_infer.errors import Cancelled, InvalidRequest
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.models.wan import WanTransformer
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import SilentProgress

SMALL = WanOptions(width=64, height=48, num_frames=5, num_inference_steps=2, seed=3, prompt="a cat")
LONG = replace(SMALL, num_frames=29, context=ContextOptions(frames=17, overlap=8))


@pytest.fixture(scope="module")
def from_text() -> WanVideoPipeline:
    return WanVideoPipeline(load_tiny("wan_t2v"))


@pytest.fixture(scope="module")
def from_image() -> WanVideoPipeline:
    return WanVideoPipeline(load_tiny("wan_i2v"))


@pytest.fixture(scope="module")
def from_both() -> WanVideoPipeline:
    """A first-and-last-frame model: the two pictures have 17 CLIP tokens each."""
    config = replace(tiny.TINY_I2V, image_positions=34)
    states = {
        "transformer": tiny.tiny_transformer_state(WanTransformer, config),
        "vae": tiny.tiny_vae_state(),
        "text_encoder": tiny.tiny_text_state(),
        "image_encoder": tiny.tiny_vision_state(),
    }
    heads = tiny.TINY_VISION.num_heads
    return WanVideoPipeline(
        assemble("wan_i2v", states, tiny.tiny_tokens(), {}, LoadOptions(), vision_heads=heads)
    )


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def test_text_to_video(from_text):
    progress = SilentProgress()
    out = from_text(SMALL, progress=progress)
    assert out.clip.frames.shape == (5, 48, 64, 3)
    assert out.clip.fps == 16
    assert out.first is None
    assert progress.warnings == []
    assert not np.array_equal(out.clip.frames, from_text(replace(SMALL, seed=4)).clip.frames)


def test_image_to_video_starts_from_the_picture(from_image):
    first, other = picture(0), picture(1)
    out = from_image(SMALL, first)
    assert out.first.shape == (48, 64, 3)
    assert not np.array_equal(out.clip.frames, from_image(SMALL, other).clip.frames)
    assert np.array_equal(out.clip.frames, from_image(SMALL, first).clip.frames)


def test_first_and_last_picture(from_both):
    first, last = picture(0), picture(1, (30, 90))
    out = from_both(SMALL, first, last)
    assert out.last.shape == out.first.shape == (48, 64, 3)
    assert not np.array_equal(out.clip.frames, from_both(SMALL, first, picture(2)).clip.frames)
    swapped = from_both(SMALL, last, first).clip.frames
    assert not np.array_equal(out.clip.frames, swapped)


def test_the_last_picture_takes_the_size_of_the_first(from_both):
    options = replace(SMALL, image_fit="resize")
    out = from_both(options, picture(0, (40, 90)), picture(1, (90, 40)))
    assert out.first.shape == out.last.shape
    assert out.first.shape[1] == 64
    assert out.first.shape[0] < 48


@pytest.mark.parametrize(
    ("given", "field"),
    [((None, None), "image"), ((picture(0), picture(1)), "end_image"), ((None, picture(1)), "end")],
)
def test_pictures_that_an_image_model_cannot_use(from_image, given, field):
    with pytest.raises(InvalidRequest, match=field) as error:
        from_image(SMALL, *given)
    assert error.value.field.startswith(field)


def test_a_text_model_takes_no_picture(from_text):
    with pytest.raises(InvalidRequest, match="wan_i2v weights"):
        from_text(SMALL, picture(0))


def test_a_model_for_both_wants_both(from_both):
    with pytest.raises(InvalidRequest, match="Missing 'end_image'"):
        from_both(SMALL, picture(0))
    with pytest.raises(InvalidRequest, match="at least 5"):
        from_both(replace(SMALL, num_frames=4), picture(0), picture(1))
    with pytest.raises(InvalidRequest, match="34 CLIP tokens"):
        image = torch.zeros(1, 17, 64)
        from_both.components.transformer.encode_context([torch.zeros(2, 64)], image)
    check_pictures(from_both.components.transformer, picture(0), picture(1), SMALL)


CHANGES = {
    "prompt": "a dog",
    "width": 80,
    "height": 64,
    "num_frames": 9,
    "fps": Fraction(24),
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "shift": 2.0,
    "scheduler": "unipc",
    "seed": 5,
    "image_fit": "pad",
    "clip_preprocess": "center",
    "tiles": TileOptions(4, 4, 3, 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_counts(from_image, name):
    out = from_image(SMALL, picture(0)).clip
    changed = from_image(replace(SMALL, **{name: CHANGES[name]}), picture(0)).clip
    same = out.frames.shape == changed.frames.shape and out.fps == changed.fps
    assert not (same and np.array_equal(out.frames, changed.frames))


def test_options_that_count_with_guidance_or_windows(from_image):
    guided = replace(SMALL, guidance_scale=3.0)
    base = from_image(guided, picture(0)).clip.frames
    other = from_image(replace(guided, negative_prompt="blurred"), picture(0)).clip.frames
    assert not np.array_equal(base, other)
    apart = from_image(replace(guided, guidance_batching="sequential"), picture(0)).clip.frames
    together = from_image(replace(guided, guidance_batching="batched"), picture(0)).clip.frames
    assert np.abs(apart.astype(int) - together).max() <= 1
    long = from_image(LONG, picture(0)).clip.frames
    assert long.shape[0] == 29
    for change in (
        {"window_anchor": "first"},
        {"context": replace(LONG.context, freenoise=False)},
        {"context": replace(LONG.context, overlap=4)},
        {"context": replace(LONG.context, fuse="pyramid")},
    ):
        changed = from_image(replace(LONG, **change), picture(0)).clip.frames
        assert not np.array_equal(long, changed), change
    tested = {*CHANGES, "negative_prompt", "guidance_batching", "window_anchor", "context"}
    tested |= {"step_cache"}
    assert tested == {option.name for option in fields(WanOptions)}


def test_what_stands_in_front_of_a_later_window():
    condition = torch.arange(10.0)[None, None, :, None, None].expand(1, 20, 10, 2, 2)
    for frames in (slice(3, 7), [3, 4, 5, 6]):
        every = window_condition(condition, frames, "every")
        assert every[0, 0, :, 0, 0].tolist() == [0, 4, 5, 6]
        assert window_condition(condition, frames, "first")[0, 0, :, 0, 0].tolist() == [3, 4, 5, 6]
    first = window_condition(condition, slice(0, 4), "every")
    assert first[0, 0, :, 0, 0].tolist() == [0, 1, 2, 3]
    assert window_condition(None, slice(0, 4), "every") is None


def test_a_loop_has_three_frames_more(from_text):
    context = ContextOptions(schedule="uniform_looped", frames=17, overlap=8)
    assert len(from_text(replace(LONG, context=context)).clip.frames) == 32


def test_text_and_picture_are_encoded_once(from_image):
    parts = load_tiny("wan_i2v")
    pipeline = WanVideoPipeline(parts)
    first = pipeline(SMALL, picture(0)).clip.frames
    assert parts.cache.hits == 0
    assert np.array_equal(pipeline(SMALL, picture(0)).clip.frames, first)
    assert parts.cache.hits == 3
    pipeline(replace(SMALL, num_frames=9), picture(0))
    assert parts.cache.hits == 5


def test_stop_leaves_the_pipeline_usable(from_text):
    class Stop(SilentProgress):
        def step(self, done, total, unit="step"):
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        from_text(SMALL, progress=Stop())
    assert from_text(SMALL).clip.frames.shape[0] == 5


@pytest.mark.parametrize("change", [{"width": 40}, {"height": 0}, {"num_frames": 0}])
def test_impossible_numbers_are_refused(change):
    with pytest.raises(InvalidRequest, match=next(iter(change))):
        replace(SMALL, **change)


def test_built_by_name():
    assert isinstance(build_pipeline("wan_t2v"), WanVideoPipeline)
    assert build_pipeline("wan_t2v").components.image_encoder is None
