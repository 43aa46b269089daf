"""The sizes of a VAE, read from a file's shapes; its parameters and its work at full size."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.models.vae import VAEConfig, WanVAE, config_from_shapes

WIDTH, HEIGHT, FRAMES = 832, 480, 17


def shapes_of(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in WanVAE(config).state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(dim=24),
        VAEConfig(4, 8, (1, 2, 4), 1, (True, False)),
        VAEConfig(6, 3, (2, 1, 3, 1), 3, (False, False, True)),
        VAEConfig(2, 1, (2,), 1, ()),
    ],
)
def test_the_config_is_read_from_the_shapes(config):
    assert config_from_shapes(shapes_of(config)) == config


def test_the_pruned_light_vae_is_recognised():
    shapes = shapes_of(VAEConfig(dim=24))
    assert shapes["decoder.conv1.bias"] == (96,)
    assert config_from_shapes({**shapes, "extra.tensor": (1,)}).dim == 24


def test_foreign_files_are_refused_by_name():
    shapes = shapes_of(VAEConfig())
    with pytest.raises(WeightsError, match=r"holds model\.conv1\.bias.*strip prefixes"):
        config_from_shapes({f"model.{name}": shape for name, shape in shapes.items()})
    with pytest.raises(WeightsError, match="holds nothing"):
        config_from_shapes({})
    with pytest.raises(WeightsError, match=r"12 channels.*Wan2\.2"):
        config_from_shapes({**shapes, "encoder.conv1.weight": (160, 12, 3, 3, 3)})


def test_damaged_files_are_refused_by_tensor():
    shapes = shapes_of(VAEConfig())
    with pytest.raises(
        WeightsError, match=r"decoder\.conv1\.weight with shape \(383, 16, 3, 3, 3\)"
    ):
        config_from_shapes({**shapes, "decoder.conv1.weight": (383, 16, 3, 3, 3)})
    name = "decoder.head.2.bias"
    with pytest.raises(WeightsError, match=rf"1 tensors .*{name} with shape missing"):
        config_from_shapes({key: shape for key, shape in shapes.items() if key != name})
    cut = {key: shape for key, shape in shapes.items() if "encoder.downsamples" not in key}
    with pytest.raises(WeightsError, match="dim_mult is"):
        config_from_shapes(cut)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": 3, "dim_mult": (1, 3, 4, 4)}, "dim"),
        ({"z_dim": -1}, "z_dim"),
        ({"dim_mult": (1, 0, 4, 4)}, "dim_mult"),
        ({"dim_mult": ()}, "dim_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"temporal_downsample": (True, True)}, "temporal_downsample"),
    ],
)
def test_impossible_sizes_are_refused(values, field):
    with pytest.raises(InvalidRequest, match=f"^{field} is ") as error:
        VAEConfig(**values)
    assert error.value.field == field


def test_strides_and_look_back():
    config = VAEConfig()
    assert (config.spatial_stride, config.temporal_stride, config.look_back) == (8, 4, 112)
    other = VAEConfig(4, 4, (1, 2), 1, (True,))
    assert (other.spatial_stride, other.temporal_stride) == (2, 2)


def test_the_published_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        vae = WanVAE()
    count = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert [round(n / 1e6, 1) for n in count] == [53.6, 73.3]


@cache
def work(what, fast, frames=FRAMES):
    """FLOP of a call at 480x832, on tensors without memory."""
    with torch.device("meta"):
        vae = WanVAE(fast=fast)
        video = torch.empty(1, 3, frames, HEIGHT, WIDTH)
        latents = torch.empty(1, 16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    with FlopCounterMode(display=False) as counter:
        vae.encode(video) if what == "encode" else vae.decode(latents)
    return counter.get_total_flops()


# FLOP per pixel of the first frame, and of each of the others; fitted to counts at real sizes.
@pytest.mark.parametrize(
    ("what", "first", "later"), [("decode", 10.8e6, 8.47e6), ("encode", 6.8e6, 5.03e6)]
)
def test_the_reference_order_does_the_work_of_the_closed_form(what, first, later):
    pixels = WIDTH * HEIGHT
    expected = pixels * (first + later * (FRAMES - 1))
    assert work(what, False) == pytest.approx(expected, rel=0.02)
    assert work(what, False, 1) == pytest.approx(pixels * first, rel=0.02)


def test_the_fast_order_saves_what_it_says():
    # First frame: two of three taps of almost every convolution.
    assert 0.33 < work("encode", True, 1) / work("encode", False, 1) < 0.37
    later = [work("encode", fast) - work("encode", fast, 1) for fast in (True, False)]
    # The encoder saves nothing after it.
    assert later[0] == pytest.approx(later[1], rel=1e-3)
    # Decoder: five ninths of the three convolutions after a doubling, per pixel of later frames.
    saved = 2 * 9 * (192 * 96 + 384 * 192 / 4 + 384 * 192 / 16 / 2) * 5 / 9
    later = [work("decode", fast) - work("decode", fast, 1) for fast in (True, False)]
    pixels = WIDTH * HEIGHT * (FRAMES - 1)
    assert later[1] - later[0] == pytest.approx(saved * pixels, rel=0.02)
