"""Trains the LoRA of the tiny model, which turns everything grey.

    python -m tools.tiny.train_lora --out runs/tiny

It is there to test the LoRA paths with something that can be seen and measured: the figure keeps
its shape and its motion and loses its colours, by half at strength 0.5. Reference and pose stay
coloured; only what the model should paint is grey.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.loading import load_tiny
from tools.tiny.export import LICENCE, load_vae
from tools.tiny.latents import encode_clip, read_latents
from tools.tiny.optimise import (
    learning_rate,
    load_checkpoint,
    make_optimisers,
    save_checkpoint,
    set_rate,
)
from tools.tiny.train_dit import CONFIG, draw_batch, loss_of
from tools.tiny.train_vae import HEIGHT, WIDTH
from tools.tiny.world import make_clip
from xicon_infer.console import ConsoleProgress
from xicon_infer.media.write import atomic_path
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.types import UInt8Array

RANK = 8
LEARNING_RATE = 2e-3
CLIP_FRAMES = 17
LUMA = (0.299, 0.587, 0.114)


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained change of low rank; starts as the layer alone."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        width = layer.in_features
        down = torch.randn(rank, width, generator=generator) / width**0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    @property
    def bias(self) -> Tensor:
        """The layer's bias; the transformer reads its dtype there."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output and the change."""
        change: Tensor = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.layer(x) + change


def add_loras(model: ScailTransformer, rank: int) -> dict[str, LoraLinear]:
    """Puts a LoRA on self-attention and feed-forward of every block; returns them by path."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    found = {}
    for index, block in enumerate(model.layers):
        places: dict[str, tuple[nn.Module, str]] = {
            f"self_attn.{name}": (block.self_attn, name) for name in "qkvo"
        } | {f"ffn.{name}": (block.ffn, name) for name in "02"}
        for path, (owner, name) in places.items():
            layer = owner.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            lora = LoraLinear(layer, rank, generator)
            owner.register_module(name, lora)
            found[f"blocks.{index}.{path}"] = lora
    return found


def to_grey(frames: UInt8Array) -> UInt8Array:
    """Returns frames [F, H, W, 3] without colour."""
    grey = (frames.astype(np.float32) @ np.array(LUMA, np.float32) + 0.5).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def make_data(out: Path, clips: int, progress: ConsoleProgress) -> Path:
    """Encodes grey clips into a folder, those that are not there yet, and returns it."""
    folder = out / "latents_grey"
    vae, encoders = load_vae(out), load_tiny("scail")
    with progress.stage("encode grey clips"):
        for seed in range(clips):
            path = folder / f"{seed:05d}.pt"
            if not path.exists():
                clip = make_clip(
                    seed, split="train", num_frames=CLIP_FRAMES, height=HEIGHT, width=WIDTH
                )
                grey = replace(clip, frames=to_grey(clip.frames))
                save_checkpoint(path, encode_clip(vae, encoders, grey))
            progress.step(seed + 1, clips, "clip")
    return folder


def train(out: Path, path: Path, *, steps: int, clips: int) -> None:
    """Trains the LoRA on the averaged transformer of a run and writes it.

    Args:
        out: folder of the run.
        path: the LoRA file to write.
        steps: of training.
        clips: to train on.

    Raises:
        FileNotFoundError: the transformer was not trained.
    """
    progress = ConsoleProgress()
    kept = load_checkpoint(out / "dit.pt")
    if kept is None:
        raise FileNotFoundError(f"no trained transformer in {out}; run tools.tiny.train_dit")
    data = [read_latents(make_data(out, clips, progress), clips)]
    model = ScailTransformer(CONFIG)
    model.load_state_dict(kept["average"])
    loras = add_loras(model, RANK)
    optimisers = make_optimisers(nn.ModuleList(loras.values()), LEARNING_RATE, weight_decay=0.0)
    with progress.stage("train the LoRA"):
        for step in range(steps):
            set_rate(optimisers, LEARNING_RATE * learning_rate(step, steps, warmup=20))
            loss_of(model, draw_batch(data, step)).backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            progress.step(step + 1, steps)
    write_lora(path, loras)


def write_lora(path: Path, loras: dict[str, LoraLinear]) -> None:
    """Writes LoRAs under the names that ComfyUI's users know, float16."""
    tensors = {}
    for name, lora in loras.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = lora.down.detach().half().contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = lora.up.detach().half().contiguous()
    with atomic_path(path) as part:
        save_file(tensors, part, metadata=LICENCE)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.train_lora", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--file", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=80, help="grey clips to make and use")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    train(options.out, options.file, steps=options.steps, clips=options.clips)


if __name__ == "__main__":
    main()
