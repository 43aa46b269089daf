"""The VAE against the original, and what its interface promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.vae_cases import TINY, Meter, noise, tiny_vae
from tests.parity.golden import Golden
from tests.parity.vae import REPLAYS, load_vae, replay_vae
from xicon_infer.errors import InvalidRequest
from xicon_infer.models import vae_layers
from xicon_infer.models.vae import VAEConfig, WanVAE
from xicon_infer.models.vae_layers import CausalConv3d

GOLDEN = Path(__file__).parents[1] / "golden" / "wan_core"


@pytest.mark.parametrize(
    ("name", "least"), [("vae_tiny", 10), ("vae_tiled", 4), ("i2v_mask_concat", 17)]
)
def test_equals_the_reference_within_the_tolerance_of_the_readme(name, least):
    golden = Golden(GOLDEN / f"{name}.safetensors", [])
    checks = [check for replay in REPLAYS for check in replay(golden) or []]
    assert len(checks) >= least
    assert not [check for check in checks if not check.ok]


def test_a_replay_can_fail():
    golden = Golden(GOLDEN / "vae_tiny.safetensors", [])
    golden.tensors["weights.decoder.head.2.bias"] += 1e-2
    assert [check.name for check in replay_vae(golden) if not check.ok]


def test_names_are_the_original_ones():
    golden = Golden(GOLDEN / "vae_tiny.safetensors", [])
    names = set(load_vae(golden).state_dict())
    assert names == {key.removeprefix("weights.") for key in golden.keys if "weights." in key}


def test_the_cpu_decodes_as_the_reference_bit_for_bit():
    # Holds on the kind of machine that made the golden; elsewhere kernels may round otherwise,
    # which is what the tolerance is for. The fast order never gives the same bits.
    golden = Golden(GOLDEN / "vae_tiny.safetensors", [])
    vae = load_vae(golden)
    latents = vae.denormalize(golden.tensors["in.latent"])
    exact = (vae.decode(latents) - golden.tensors["out.decode"]).abs().max()
    vae.fast = True
    fast = (vae.decode(latents) - golden.tensors["out.decode"]).abs().max()
    assert exact < fast < 1e-4


@pytest.mark.parametrize("chunk", [1, 2])
def test_the_two_orders_of_computation_are_the_same_function(chunk):
    slow, fast = (tiny_vae(fast=fast, dtype=torch.float64) for fast in (False, True))
    video, latents = noise(2, 3, 9, 16, 24).double(), noise(2, 4, 3, 3, 5).double()
    for a, b in (
        (slow.encode(video), fast.encode(video, chunk=chunk)),
        (slow.decode(latents), fast.decode(latents, chunk=chunk)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frames", [1, 3])
def test_every_convolution_of_the_cpu_takes_the_fast_kernels(frames, monkeypatch):
    """torch's own choice for one small video is many times slower."""
    layer, state = CausalConv3d(4, 6, (3, 3, 3)), tiny_vae(fast=True).begin()
    window = noise(1, frames, 8, 6, 4)
    with torch.no_grad(), Meter() as meter:
        found = layer(window, state)
    monkeypatch.setattr(vae_layers, "has_onednn", lambda: False)
    with torch.no_grad(), Meter() as plain:
        wanted = layer(window, state)
    assert meter.calls["mkldnn_convolution"] == torch.backends.mkldnn.is_available()
    assert plain.calls["mkldnn_convolution"] == 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_fast_is_the_default():
    assert WanVAE(TINY).begin().fast is True
    assert WanVAE(TINY, fast=False).begin().fast is False
    with torch.device("meta"):
        assert WanVAE(TINY).begin().fast is True


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(fast, dtype):
    exact, half = tiny_vae(), tiny_vae(dtype=dtype, fast=fast)
    video, latents = noise(1, 3, 5, 16, 16), noise(1, 4, 2, 3, 3)
    for wanted, got in (
        (exact.encode(video), half.encode(video)),
        (exact.decode(latents), half.decode(latents)),
    ):
        assert got.dtype == dtype
        assert ((got - wanted).norm() / wanted.norm()) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_half_precision_norms_survive_large_activations():
    # The squares of these overflow float16; their norm, in float32, does not.
    vae = tiny_vae(dtype=torch.float16)
    norm = vae.decoder.head[0]
    x = torch.full((1, 1, 1, 1, 4), 4096.0, dtype=torch.float16)
    wanted = norm.gamma.flatten().to(torch.float16)
    torch.testing.assert_close(norm(x, vae.begin())[0, 0, 0, 0], wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("fast", [False, True])
def test_runs_without_and_inside_inference_mode_and_never_tracks_gradients(fast):
    vae, latents = tiny_vae(fast=fast), noise(1, 4, 2, 2, 2)
    plain = vae.decode(latents)
    with torch.inference_mode():
        inside = vae.decode(latents)
    assert torch.equal(plain, inside)
    assert not plain.requires_grad
    assert not next(vae.iter_decode(latents)).requires_grad


def test_channels_last_weights_give_the_same_result():
    latents, video = noise(1, 4, 2, 3, 3).double(), noise(1, 3, 5, 24, 24).double()
    for fast in (False, True):
        vae = tiny_vae(fast=fast, dtype=torch.float64)
        wanted = vae.decode(latents), vae.encode(video)
        assert vae.to_channels_last() is vae
        weight = vae.decoder.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
        for got, want in zip((vae.decode(latents), vae.encode(video)), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fast", [False, True])
def test_a_batch_is_its_single_videos(fast):
    vae = tiny_vae(fast=fast, dtype=torch.float64)
    video, latents = noise(2, 3, 5, 16, 8).double(), noise(2, 4, 3, 2, 1).double()
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(vae.encode(video)[one], vae.encode(video[one]))
        torch.testing.assert_close(vae.decode(latents)[one], vae.decode(latents[one]))


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 9])
def test_frames_after_the_last_4n_plus_1_are_dropped(frames):
    vae, video = tiny_vae(), noise(1, 3, frames, 8, 8)
    kept = (frames - 1) // 4 * 4 + 1
    latents = vae.encode(video)
    assert latents.shape == (1, 4, (frames - 1) // 4 + 1, 1, 1)
    assert torch.equal(latents, vae.encode(video[:, :, :kept]))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (2, 7)])
def test_odd_latent_sizes(height, width):
    vae = tiny_vae()
    video = vae.decode(noise(1, 4, 2, height, width))
    assert video.shape == (1, 3, 5, 8 * height, 8 * width)
    assert vae.encode(video).shape == (1, 4, 2, height, width)


def test_other_shapes_of_model():
    config = VAEConfig(2, 3, (1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False))
    vae = tiny_vae(config, dtype=torch.float64)
    assert vae.encode(noise(1, 3, 5, 8, 12).double()).shape == (1, 3, 3, 2, 3)
    latents = noise(1, 3, 3, 2, 3).double()
    assert vae.decode(latents).shape == (1, 3, 5, 8, 12)
    vae.fast = True
    torch.testing.assert_close(
        vae.decode(latents), tiny_vae(config, dtype=torch.float64).decode(latents)
    )


def test_normalize_and_denormalize_are_inverse_and_use_the_published_numbers():
    vae = WanVAE(VAEConfig(dim=2))
    mu = noise(1, 16, 2, 2, 2)
    latents = vae.normalize(mu)
    torch.testing.assert_close(vae.denormalize(latents), mu)
    assert latents[0, 7, 0, 0, 0].item() == pytest.approx(
        (mu[0, 7, 0, 0, 0].item() - 1.5508) / 2.0743
    )
    assert vae.normalize(mu.bfloat16()).dtype == torch.float32
    assert vae.normalize(mu.double()).dtype == torch.float64


def test_means_and_stds_can_be_given_and_default_to_none_for_other_models():
    mu = noise(1, 4, 1, 2, 2)
    assert torch.equal(tiny_vae().normalize(mu), mu)
    shifted = tiny_vae(means=[1, 2, 3, 4], stds=[2, 2, 2, 2])
    assert shifted.normalize(mu)[0, 1, 0, 0, 0] == (mu[0, 1, 0, 0, 0] - 2) / 2
    for field in ("means", "stds"):
        with pytest.raises(InvalidRequest, match=f"{field} is .*4 numbers"):
            tiny_vae(**{field: [1.0]})


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 12, 8), (1, 4, 5, 8, 8), (3, 5, 8, 8), (1, 3, 5, 0, 8)]
)
def test_a_video_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(InvalidRequest, match=r"video is \(.*multiples of 8"):
        tiny_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (4, 2, 2, 2), (1, 4, 0, 2, 2)])
def test_latents_of_the_wrong_shape_are_refused_at_once(shape):
    with pytest.raises(InvalidRequest, match=r"latents is \(.*\[B, 4, T, h, w\]"):
        tiny_vae().iter_decode(torch.zeros(shape))


def test_no_frames_and_no_chunk_are_refused():
    vae = tiny_vae()
    with pytest.raises(InvalidRequest, match="one frame or more"):
        vae.encode_chunks([])
    with pytest.raises(InvalidRequest, match="one frame or more"):
        vae.encode(noise(1, 3, 0, 8, 8))
    with pytest.raises(InvalidRequest, match="chunk is 0"):
        vae.encode(noise(1, 3, 1, 8, 8), chunk=0)
    with pytest.raises(InvalidRequest, match="chunk is 0"):
        vae.iter_decode(noise(1, 4, 1, 2, 2), chunk=0)


def test_input_is_moved_to_the_dtype_of_the_weights():
    vae = tiny_vae(dtype=torch.float64)
    video = noise(1, 3, 1, 8, 8)
    assert torch.equal(vae.encode(video), vae.encode(video.double()))
    assert vae.decode(noise(1, 4, 1, 2, 2)).dtype == torch.float64
