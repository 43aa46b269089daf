"""Trains the small Wan VAE of the tiny preset on the drawn world.

    python -m tools.tiny.train_vae --out runs/tiny

The same command goes on where it was stopped. Every step draws its clips from a generator seeded
with its own number, so that a run that was interrupted sees what one that was not would have seen.

The loss is the Charbonnier distance of the pixels and their squared error. Noise on the latents
and a small price on their size take the place of the KL term: neighbouring latents come to mean
similar pictures.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tools.tiny import vae_forward
from tools.tiny.optimise import (
    learning_rate,
    load_checkpoint,
    make_optimisers,
    restore_run,
    save_checkpoint,
    save_run,
    set_rate,
    update_average,
    write_log,
)
from tools.tiny.world import Split, make_clip
from xicon_infer.console import ConsoleProgress
from xicon_infer.models.vae import WanVAE
from xicon_infer.models.vae_config import VAEConfig
from xicon_infer.types import Progress

CONFIG = VAEConfig(dim=24, num_res_blocks=1)
HEIGHT, WIDTH, CLIP_FRAMES = 160, 96, 33
LEARNING_RATE = 2e-3
LATENT_NOISE, LATENT_PRICE = 0.3, 2e-3
WHOLE_FROM = 0.85
"""From here on whole pictures instead of crops: attention in the middle sees the final size."""
SAVE_EVERY = 200
SQUARE = 4.0
"""Weight of the squared error. The distance alone is content with the median, which for the thin
lines of a pose is black."""
EDGE = 0.01
"""Where the Charbonnier distance turns from square to linear, in units of [-1, 1]."""


class Kind(NamedTuple):
    """A kind of batch: how many frames a clip has, how many clips, how often it comes."""

    frames: int
    batch: int
    share: float


KINDS = {
    "pose": Kind(frames=33, batch=2, share=0.3),
    "picture": Kind(frames=1, batch=16, share=0.1),
    "short": Kind(frames=9, batch=3, share=0.2),
    "long": Kind(frames=33, batch=1, share=0.4),
}
WHOLE_FRAMES = 21


class Pool(NamedTuple):
    """Clips kept in memory: uint8 [N, F, H, W, 3] and their poses [N, F, H / 2, W / 2, 3]."""

    frames: Tensor
    poses: Tensor


def draw_pool(split: Split, count: int, path: Path, progress: Progress) -> Pool:
    """Returns clips of a split, from the file if it is there.

    Args:
        split: "train" or "test".
        count: clips.
        path: file that keeps them between runs.
        progress: told of every clip.
    """
    kept = load_checkpoint(path)
    if kept is not None and len(kept["frames"]) == count:
        return Pool(kept["frames"], kept["poses"])
    frames, poses = [], []
    with progress.stage(f"draw {split} clips"):
        for seed in range(count):
            clip = make_clip(seed, split=split, num_frames=CLIP_FRAMES, height=HEIGHT, width=WIDTH)
            frames.append(torch.from_numpy(clip.frames))
            poses.append(torch.from_numpy(clip.pose))
            progress.step(seed + 1, count, "clip")
    pool = Pool(torch.stack(frames), torch.stack(poses))
    save_checkpoint(path, pool._asdict())
    return pool


def draw_batch(pool: Pool, step: int, *, whole: bool) -> Tensor:
    """Returns the batch of a step, [B, 3, F, h, w] in [-1, 1].

    Pose videos, single frames, and videos of 9 and of 33 frames: a causal network that has only
    seen the first few frames of a video goes astray in the rest.

    Args:
        pool: the clips.
        step: seeds the choice.
        whole: whole pictures instead of 64 x 64 crops.
    """
    rng = np.random.default_rng(step)
    name = rng.choice(list(KINDS), p=[kind.share for kind in KINDS.values()])
    kind = KINDS[str(name)]
    source = pool.poses if name == "pose" else pool.frames
    length, batch = kind.frames, kind.batch
    height, width = source.shape[2:4]
    if not whole:
        height, width = min(64, height), min(64, width)
    elif name == "long":
        length = WHOLE_FRAMES
    clips = []
    for _ in range(batch):
        n = rng.integers(len(source))
        t = rng.integers(source.shape[1] - length + 1)
        y = rng.integers(source.shape[2] - height + 1)
        x = rng.integers(source.shape[3] - width + 1)
        clips.append(source[n, t : t + length, y : y + height, x : x + width])
    return to_video(torch.stack(clips))


def to_video(frames: Tensor) -> Tensor:
    """Returns uint8 [B, F, H, W, 3] as [B, 3, F, H, W] in [-1, 1]."""
    video = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return video.contiguous(memory_format=torch.channels_last_3d)


def start_weights(vae: WanVAE) -> None:
    """Sets weights to keep the variance, and every residual branch to zero.

    A network of identities learns at once; one of many random layers spends its first thousand
    steps on finding a path for the signal.
    """
    generator = torch.Generator().manual_seed(0)
    for name, param in vae.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(param)
        elif param.ndim > 1 and "gamma" not in name:
            inputs = param[0].numel()
            nn.init.normal_(param, std=inputs**-0.5, generator=generator)
        if name.endswith(("residual.6.weight", "proj.weight")):
            nn.init.zeros_(param)


def loss_of(vae: WanVAE, video: Tensor, seed: int) -> Tensor:
    """Returns the loss of a batch [B, 3, F, H, W]."""
    generator = torch.Generator(video.device.type).manual_seed(seed)
    with torch.autocast(video.device.type, torch.bfloat16):
        latents = vae_forward.encode(vae, video).float()
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        result = vae_forward.decode(vae, latents + LATENT_NOISE * noise)
    error = (result.float() - video).square()
    distance = (error + EDGE**2).sqrt().mean() + SQUARE * error.mean()
    return distance + LATENT_PRICE * latents.square().mean()


@torch.inference_mode()
def measure(vae: WanVAE, pool: Pool) -> dict[str, float]:
    """Returns the PSNR of whole clips and of pose videos, dB, and the size of the latents."""
    found = {}
    for name, frames in pool._asdict().items():
        errors, sizes = [], []
        for clip in frames:
            video = to_video(clip[None]).to(next(vae.parameters()).device)
            with torch.autocast(video.device.type, torch.bfloat16):
                latents = vae_forward.encode(vae, video)
                result = vae_forward.decode(vae, latents)
            errors.append((result.float().clamp(-1, 1) - video).square().mean())
            sizes.append(latents.float().std())
        # The range is 2 wide.
        found[f"psnr_{name}"] = float(10 * torch.log10(4 / torch.stack(errors)).mean())
        found[f"std_{name}"] = float(torch.stack(sizes).mean())
    return found


def train(out: Path, *, steps: int, clips: int, device: str) -> Path:
    """Trains, or goes on training, and returns the file with the averaged weights.

    Args:
        out: folder of the run.
        steps: of the whole run.
        clips: in the pool.
        device: "cpu" or "cuda".
    """
    progress = ConsoleProgress()
    pool = draw_pool("train", clips, out / "pool_train.pt", progress)
    held_out = draw_pool("test", 12, out / "pool_test.pt", progress)
    vae = WanVAE(CONFIG)
    start_weights(vae)
    vae.to(device)
    average = copy.deepcopy(vae)
    optimisers = make_optimisers(
        vae, LEARNING_RATE, weight_decay=0.0, plain=("encoder.conv1", "decoder.head", "conv")
    )
    path = out / "vae.pt"
    first = restore_run(path, vae, average, optimisers)
    with progress.stage("train the VAE"):
        for step in range(first, steps):
            set_rate(optimisers, LEARNING_RATE * learning_rate(step, steps))
            batch = draw_batch(pool, step, whole=step >= WHOLE_FROM * steps).to(device)
            loss = loss_of(vae, batch, seed=step)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            update_average(average, vae, step, longest=500)
            progress.step(step + 1 - first, steps - first)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save_run(path, step + 1, vae, average, optimisers)
                write_log(out / "vae.jsonl", step + 1, loss.item(), measure(average, held_out))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.train_vae", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=5000, help="of the whole run")
    parser.add_argument("--clips", type=int, default=500, help="clips to draw for training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    train(options.out, steps=options.steps, clips=options.clips, device=options.device)


if __name__ == "__main__":
    main()
