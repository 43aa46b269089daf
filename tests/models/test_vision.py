"""The image encoder and its preprocessing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.encoders import (
    load_image_encoder,
    recorded,
    replay_comfy_preprocess,
    replay_image_encoder,
)
from tests.parity.golden import Golden, rel_max
from xicon_infer.errors import InvalidRequest, MediaError, WeightsError
from xicon_infer.models.vision import (
    CLIP_VIT_H,
    MEAN,
    STD,
    PreprocessMode,
    VisionConfig,
    build_image_encoder,
    config_from_shapes,
    encode_image,
    encode_pixels,
    preprocess,
    stretch,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "wan_core"
FILE = Golden(FOLDER / "clip_visual_tiny.safetensors", [GOLDEN])
MODES = get_args(PreprocessMode)
TINY = VisionConfig(width=32, d_ff=48, num_layers=2, num_heads=4, image_size=28, patch_size=14)


def picture(height=40, width=30, seed=0):
    """Returns a smooth random picture."""
    coarse = np.random.default_rng(seed).random((1, 3, 6, 6))
    fine = torch.nn.functional.interpolate(torch.tensor(coarse), size=(height, width))[0]
    return (fine * 255).byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def model():
    return load_image_encoder(FILE)


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_reference_outputs():
    checks = replay_image_encoder(FILE)
    assert checks is not None
    assert {check.name.partition(":")[2] for check in checks} == {
        key for key in FILE.keys if key.startswith("out.")
    }
    for check in checks:
        assert check.ok, check


def test_reference_preprocessing():
    checks = replay_comfy_preprocess(Golden(FOLDER / "clip_preprocess_comfy.safetensors", [GOLDEN]))
    assert checks is not None
    assert len(checks) == 5
    for check in checks:
        assert check.ok, check


def test_only_the_layers_before_the_last_are_there_and_run(model):
    stored = FILE.meta["config"]["num_layers"]
    layers = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    assert len(layers) == stored - 1
    with recorded(model, layers) as states:
        encode_pixels(model, FILE.tensors["in.pixel_values"])
    assert len(states) == stored - 1
    assert not list(model.get_submodule("post_layernorm").parameters())


def test_the_published_size_builds_without_memory():
    with torch.device("meta"):
        model = build_image_encoder(CLIP_VIT_H)
    assert config_from_shapes(shapes_of(model)) == CLIP_VIT_H
    assert len(model.state_dict()) == 5 + 31 * 16
    assert not any(p.requires_grad for p in model.parameters())


def test_loading_onto_meta_gives_a_whole_model(model):
    config = config_from_shapes(shapes_of(model), num_heads=4)
    with torch.device("meta"):
        other = build_image_encoder(config)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    pixels = FILE.tensors["in.pixel_values"]
    assert torch.equal(encode_pixels(other.to("cpu"), pixels), encode_pixels(model, pixels))


def test_the_number_of_heads_cannot_be_guessed(model):
    with pytest.raises(WeightsError, match=r"width 48 .*known: \[1280\].*give num_heads"):
        config_from_shapes(shapes_of(model))


def test_a_tensor_that_is_missing_is_named():
    with pytest.raises(WeightsError, match=r"no tensor 'embeddings.patch_embedding.weight'"):
        config_from_shapes({"visual.cls_embedding": (1, 1, 8)})


@pytest.mark.parametrize(
    ("field", "value"), [("width", 64), ("d_ff", 64), ("num_layers", 3), ("patch_size", 7)]
)
def test_every_size_reaches_the_module(field, value):
    config = replace(TINY, **{field: value})
    assert config_from_shapes(shapes_of(build_image_encoder(config)), num_heads=4) == config
    large = replace(config, image_size=56)
    assert config_from_shapes(shapes_of(build_image_encoder(large)), num_heads=4) == large


@pytest.mark.parametrize("change", [{"num_heads": 2}, {"activation": "quick_gelu"}])
def test_what_shapes_do_not_show_changes_the_result(change):
    torch.manual_seed(0)
    one, other = build_image_encoder(TINY), build_image_encoder(replace(TINY, **change))
    state = {key: 0.3 * torch.randn_like(value) for key, value in one.state_dict().items()}
    one.load_state_dict(state)
    other.load_state_dict(state)
    pixels = torch.randn(1, 3, 28, 28)
    assert rel_max(encode_pixels(one, pixels), encode_pixels(other, pixels)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [28, 56])
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (28, 28), (1, 1), (9, 200)])
def test_every_picture_becomes_the_square(mode, size, shape):
    pixels = preprocess(picture(*shape), size=size, mode=mode)
    assert pixels.shape == (1, 3, size, size)
    assert pixels.dtype == torch.float32


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_one_colour_stays_one_colour(colour, height, width):
    image = np.full((height, width, 3), colour, dtype=np.uint8)
    expected = (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for mode in MODES:
        pixels = preprocess(image, size=14, mode=mode)
        assert (pixels - expected.view(3, 1, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(42, 30), (30, 42), (15, 15)])  # as many cut on both sides
def test_a_mirrored_picture_gives_a_mirrored_square(mode, shape):
    image = picture(*shape)
    for numpy_axis, torch_axis in ((0, 2), (1, 3)):
        mirrored = np.flip(image, numpy_axis).copy()
        one = preprocess(mirrored, size=14, mode=mode)
        other = preprocess(image, size=14, mode=mode).flip(torch_axis)
        # Rounding to 8 bits may tip a value that lies between two levels.
        assert (one - other).abs().max() <= (1e-4 if mode == "stretch" else 0.016)
        assert (one - other).abs().mean() < 1e-4


def test_modes_differ():
    squares = [preprocess(picture(60, 30), size=28, mode=mode) for mode in MODES]
    for i, one in enumerate(squares):
        for other in squares[:i]:
            assert (one - other).abs().mean() > 0.01


def test_center_loses_the_ends_of_a_tall_picture_and_stretch_does_not():
    image = picture(90, 30)
    changed = image.copy()
    changed[:20] = 255 - changed[:20]
    same = {
        mode: torch.equal(
            preprocess(image, size=30, mode=mode), preprocess(changed, size=30, mode=mode)
        )
        for mode in MODES
    }
    assert same == {"stretch": False, "center": True, "comfy_stretch": False}


def test_only_comfy_smooths():
    # Rows black and white in turn: smoothing makes them grey, sampling every fourth does not.
    stripes = np.zeros((112, 112, 3), np.uint8)
    stripes[::2] = 255
    contrast = {mode: preprocess(stripes, size=16, mode=mode).std(dim=2).mean() for mode in MODES}
    assert contrast["center"] < 0.1
    assert contrast["comfy_stretch"] < 0.1
    assert contrast["stretch"] > 0.3


def test_stretch_takes_pictures_that_are_no_longer_8_bit():
    image = picture()
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
    expected = preprocess(image, size=28, mode="stretch")
    assert rel_max(stretch(pixels, size=28), expected) < 1e-6
    assert not torch.equal(stretch(pixels + 0.001, size=28), stretch(pixels, size=28))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(MediaError, match=r"must be uint8 \[H, W, 3\]"):
        preprocess(image, size=28, mode="stretch")


def test_unknown_choices_are_refused(model):
    with pytest.raises(InvalidRequest, match="'squash' is unknown; allowed: stretch, center, "):
        preprocess(picture(), size=28, mode="squash")
    with pytest.raises(InvalidRequest, match="'sum' is unknown; allowed: average, concat"):
        encode_image(model, [picture()], "center", combine="sum")
    with pytest.raises(InvalidRequest, match="at least one is needed"):
        encode_image(model, [], "center")


@pytest.mark.parametrize("mode", MODES)
def test_encode_image_joins_the_steps(model, mode):
    image = picture()
    expected = encode_pixels(model, preprocess(image, size=28, mode=mode))
    assert torch.equal(encode_image(model, [image], mode), expected)
    assert torch.equal(encode_image(model, [image], mode, combine="concat"), expected)


def test_the_mode_changes_the_embedding(model):
    embeds = [encode_image(model, [picture(60, 30)], mode) for mode in MODES]
    assert rel_max(embeds[0], embeds[1]) > 1e-3
    assert rel_max(embeds[0], embeds[2]) > 1e-3
    assert rel_max(embeds[1], embeds[2]) > 1e-3


def test_several_pictures_are_averaged_or_joined(model):
    images = [picture(seed=1), picture(50, 70, seed=2)]
    singles = [encode_image(model, [image], "center") for image in images]
    average = encode_image(model, images, "center")
    joined = encode_image(model, images, "center", combine="concat")
    assert rel_max(average, (singles[0] + singles[1]) / 2) < 1e-5
    assert rel_max(joined, torch.cat(singles, dim=1)) < 1e-5
    assert rel_max(singles[0], singles[1]) > 1e-2


def test_strength_scales_the_embedding(model):
    plain = encode_image(model, [picture()], "center")
    assert torch.equal(encode_image(model, [picture()], "center", strength=0.5), plain * 0.5)


def test_half_precision_weights_work():
    torch.manual_seed(0)
    full = build_image_encoder(TINY)
    half = build_image_encoder(TINY)
    half.load_state_dict(full.state_dict())
    for dtype in (torch.bfloat16, torch.float16):
        embeds = encode_image(half.to(dtype), [picture()], "stretch")
        assert embeds.dtype == dtype
        assert 0 < rel_max(embeds, encode_image(full, [picture()], "stretch")) < 5e-2
