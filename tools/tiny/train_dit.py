"""Trains the small SCAIL transformer of the tiny preset on the drawn world.

    python -m tools.tiny.train_dit --out runs/tiny

Flow matching: the model sees (1 - sigma) clean + sigma noise and learns noise - clean. Reference
and pose together leave little to guess, so that a few steps without guidance suffice and nothing
has to be distilled. Like `train_vae`, the command goes on where it was stopped, and every step
draws from a generator seeded with its own number.

The first heads start with a look at the pose token under each noise token, which lies 120 columns
away: found by chance, that takes thousands of steps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from tools.tiny import dit_forward
from tools.tiny.latents import Latents, read_latents
from tools.tiny.optimise import (
    learning_rate,
    make_optimisers,
    restore_run,
    save_run,
    set_rate,
    update_average,
    write_log,
)
from xicon_infer.console import ConsoleProgress
from xicon_infer.models.scail import POSE_COLUMN_OFFSET, ScailTransformer
from xicon_infer.models.wan import WanConfig
from xicon_infer.ops.rope import THETA, axis_pairs

CONFIG = WanConfig(
    dim=256, ffn_dim=768, num_heads=2, num_layers=6, in_dim=20, text_dim=64, image_dim=64
)
LEARNING_RATE = 2e-3
SHIFT = 5.0
BATCH_CELLS = 9600
"""Latent cells of a batch: 8 clips of 5 frames of 12 x 20, 1 of 13 frames of 16 x 28."""
KIND_SHARES = {"96x160x17": 0.55, "96x160x49": 0.1, "128x224x49": 0.35}
"""Kind of the clips -> share of the batches."""
LONG_SHARE = 0.4
"""Share of the batches of long clips that show them whole; the others show 5 latent frames."""
SAVE_EVERY = 250


class Batch(NamedTuple):
    """What a step is made of; None where a condition is dropped."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    text: dit_forward.Text
    image: Tensor
    reference: Tensor | None
    pose: Tensor | None


def draw_batch(kinds: Sequence[Latents], step: int) -> Batch:
    """Returns the batch of a step, from the clips of one of the kinds of `KIND_SHARES`.

    A twentieth of the batches has no reference, an eighth no pose. Those have less noise: in the
    recipe the pose is active in the first half of the steps.
    """
    rng = np.random.default_rng(step)
    generator = torch.Generator().manual_seed(step)
    shares = np.array(list(KIND_SHARES.values()))[: len(kinds)]
    data = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    whole = data.video.shape[2]
    frames = whole if rng.random() < LONG_SHARE else min(5, whole)
    size = max(1, BATCH_CELLS // (frames * data.video[0, 0, 0].numel()))
    with_pose, with_reference = rng.random() > 0.125, rng.random() > 0.05
    rows = torch.from_numpy(rng.integers(len(data.video), size=size))
    starts = rng.integers(whole - frames + 1, size=size) * (rng.random(size) > 0.25)
    video, pose = (
        torch.stack(
            [clips[n, :, t : t + frames] for n, t in zip(rows, starts.astype(int), strict=True)]
        ).float()
        for clips in (data.video, data.pose)
    )
    prompts = [data.text[n].float() for n in rows]
    kept = [p if rng.random() > 0.1 else p[:0] for p in prompts]
    return Batch(
        clean=video,
        noise=torch.randn(video.shape, generator=generator),
        sigma=draw_sigma(size, generator, top=1.0 if with_pose else 0.9),
        text=dit_forward.gather_text(kept, CONFIG.text_len),
        image=data.image[rows].float(),
        reference=data.reference[rows].float() if with_reference else None,
        pose=pose if with_pose else None,
    )


def draw_sigma(size: int, generator: torch.Generator, top: float) -> Tensor:
    """Returns noise levels [size] up to `top`, most of them high, a tenth of them at the top."""
    u = torch.rand(size, generator=generator)
    shifted = SHIFT * u / (1 + (SHIFT - 1) * u)
    at_top = torch.rand(size, generator=generator) < 0.1
    return torch.where(at_top, torch.ones(()), shifted) * top


def loss_of(model: ScailTransformer, batch: Batch) -> Tensor:
    """Returns the mean squared error of the velocity."""
    sigma = batch.sigma[:, None, None, None, None]
    noisy = batch.clean.lerp(batch.noise, sigma)
    with torch.autocast(noisy.device.type, torch.bfloat16):
        predicted = dit_forward.velocity(
            model,
            noisy,
            batch.sigma * 1000,
            batch.text,
            image=batch.image,
            reference=batch.reference,
            pose=batch.pose,
        )
    return (predicted.float() - (batch.noise - batch.clean)).square().mean()


@torch.no_grad()
def start_weights(model: ScailTransformer) -> None:
    """Sets the first weights: small outputs, identity blocks, and a look at the pose."""
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(param)
        elif param.ndim > 1 and "modulation" not in name:
            nn.init.normal_(param, std=param[0].numel() ** -0.5, generator=generator)
        if name.endswith((".o.weight", "ffn.2.weight", "head.head.weight")):
            param.mul_(0.1)
    # Time starts without a say; the gates start open.
    cast("nn.Linear", model.time_projection[1]).weight.mul_(0.1)
    for index, block in enumerate(model.layers):
        block.modulation.zero_()
        block.modulation[:, 2::3] = 1.0
        if index < 3:
            look_at_pose(block.self_attn.q, block.self_attn.k, CONFIG.head_dim)
    model.head.modulation.zero_()


def look_at_pose(query: nn.Linear, key: nn.Linear, head_dim: int) -> None:
    """Makes the first head attend to the position 120 columns to the right of the token's own.

    Queries and keys of that head become constants (their biases). Turned by RoPE, they agree best
    where the columns differ by the angle that is built into the query.
    """
    pairs_t, pairs_h, pairs_w = axis_pairs(head_dim)
    omega = THETA ** (-torch.arange(pairs_w, dtype=torch.float64) / pairs_w)
    angle = torch.cat((torch.zeros(pairs_t + pairs_h), POSE_COLUMN_OFFSET * omega)).float()
    for layer, values in ((query, angle), (key, torch.zeros_like(angle))):
        layer.weight[:head_dim] *= 0.3
        layer.bias[:head_dim] = 2.0 * torch.stack((values.cos(), values.sin()), dim=1).flatten()


def train(
    out: Path, *, steps: int, clips: Sequence[int], device: str, cooldown: float = 0.3
) -> Path:
    """Trains, or goes on training, and returns the file with the averaged weights.

    Args:
        out: folder of the run, with the latents of `tools.tiny.latents`.
        steps: of the whole run.
        clips: how many of the clips of each kind to use, in the order of `KIND_SHARES`.
        device: "cpu" or "cuda".
        cooldown: share of the steps, at the end, in which the learning rate falls to 0.
    """
    progress = ConsoleProgress()
    data = [
        read_latents(out / f"latents_{kind}", count)
        for kind, count in zip(KIND_SHARES, clips, strict=False)
    ]
    model = ScailTransformer(CONFIG)
    start_weights(model)
    model.to(device)
    average = copy.deepcopy(model)
    optimisers = make_optimisers(
        model, LEARNING_RATE, weight_decay=0.01, plain=("patch_embedding", "head", "text_embedding")
    )
    path = out / "dit.pt"
    first = restore_run(path, model, average, optimisers)
    losses: list[float] = []
    with progress.stage("train the transformer"):
        for step in range(first, steps):
            rate = learning_rate(step, steps, warmup=200, cooldown=cooldown)
            set_rate(optimisers, LEARNING_RATE * rate)
            loss = loss_of(model, to_device(draw_batch(data, step), device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            update_average(average, model, step, longest=600)
            losses.append(float(loss.detach()))
            progress.step(step + 1 - first, steps - first)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save_run(path, step + 1, model, average, optimisers)
                write_log(out / "dit.jsonl", step + 1, float(np.mean(losses)), {})
                losses.clear()
    return path


def to_device(batch: Batch, device: str) -> Batch:
    """Returns the batch on another device."""

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    return Batch(
        clean=batch.clean.to(device),
        noise=batch.noise.to(device),
        sigma=batch.sigma.to(device),
        text=dit_forward.Text(*(part.to(device) for part in batch.text)),
        image=batch.image.to(device),
        reference=moved(batch.reference),
        pose=moved(batch.pose),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.train_dit", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, with latents")
    parser.add_argument("--steps", type=int, default=12000, help="of the whole run")
    parser.add_argument(
        "--clips",
        type=int,
        nargs="+",
        default=[900, 100, 160],
        help="clips of each kind to train on",
    )
    parser.add_argument(
        "--cooldown",
        type=float,
        default=0.3,
        help="share of the steps in which the rate falls to 0",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    train(
        options.out,
        steps=options.steps,
        clips=options.clips,
        device=options.device,
        cooldown=options.cooldown,
    )


if __name__ == "__main__":
    main()
