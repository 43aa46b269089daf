"""What training computes is what the true classes compute."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines import tiny
from tools.tiny import dit_forward, export, vae_forward
from tools.tiny.train_vae import Pool, to_video
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.models.wan import WanConfig

SMALL_VAE = VAEConfig(dim=8, num_res_blocks=1)
SMALL_DIT = WanConfig(
    dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=20, text_dim=16, image_dim=16
)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    model = WanVAE(SMALL_VAE)
    model.load_state_dict(tiny.tiny_vae_state(SMALL_VAE))
    return model.double()


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_vae_at_once_equals_the_stream(vae: WanVAE, frames: int) -> None:
    video = torch.rand(1, 3, frames, 16, 24, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video)
        torch.testing.assert_close(vae_forward.encode(vae, video), latents, rtol=1e-5, atol=1e-6)
        pictures = vae.decode(latents)
        mine = vae_forward.decode(vae, latents)
    torch.testing.assert_close(mine, pictures, rtol=1e-5, atol=1e-5)


def test_vae_at_once_has_gradients(vae: WanVAE) -> None:
    model = WanVAE(SMALL_VAE)
    model.load_state_dict(vae.state_dict())
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    vae_forward.decode(model, vae_forward.encode(model, video)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def dit(seed: int = 0) -> ScailTransformer:
    model = ScailTransformer(SMALL_DIT)
    model.load_state_dict(tiny.tiny_transformer_state(config=SMALL_DIT))
    return model


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("with_pose", [True, False])
def test_transformer_equals_the_true_class(with_reference: bool, with_pose: bool) -> None:
    model, generator = dit(), torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    texts = [noise(3, 16), noise(7, 16)]
    latents, timestep, image = noise(2, 16, 3, 8, 4), torch.tensor([900.0, 300.0]), noise(2, 5, 16)
    reference = noise(2, 16, 1, 8, 4) if with_reference else None
    pose = noise(2, 16, 3, 4, 2) if with_pose else None
    with torch.no_grad():
        found = dit_forward.velocity(
            model,
            latents,
            timestep,
            dit_forward.gather_text(texts, SMALL_DIT.text_len),
            image=image,
            reference=reference,
            pose=pose,
        )
        wanted = model(
            latents,
            timestep,
            model.encode_context(texts, image),
            reference=None if reference is None else model.embed_reference(reference),
            pose=None if pose is None else model.embed_pose(pose),
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_padding_is_counted() -> None:
    text = dit_forward.gather_text([torch.ones(2, 4), torch.ones(5, 4)], 512)
    assert text.states.shape == (2, 6, 4)
    assert text.log_count[0].tolist()[:3] == pytest.approx([0, 0, math.log(510)])
    assert text.log_count[0, 3:].eq(-math.inf).all()


def test_folding_keeps_pictures_and_normalises_latents() -> None:
    model = WanVAE(SMALL_VAE)
    model.load_state_dict(tiny.tiny_vae_state(SMALL_VAE))
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    pool = Pool(frames, frames[:0])
    video = to_video(frames[:1])
    with torch.no_grad():
        before = vae_forward.decode(model, vae_forward.encode(model, video))
        statistics = export.latent_statistics(model, pool)
        export.fold_statistics(model, *statistics)
        after = vae_forward.decode(model, vae_forward.encode(model, video))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        raw = [vae_forward.encode(model, to_video(clip[None]))[0].flatten(1) for clip in frames]
        latents = model.normalize(torch.cat(raw, 1)[None, :, :, None, None])[0, :, :, 0, 0]
    assert (statistics[1] - latents.std(1)).abs().max() > 0.05
    torch.testing.assert_close(latents.std(1), torch.ones(16), rtol=0.02, atol=0)
