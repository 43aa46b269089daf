"""Makes the training data of the tiny transformer: clips of the drawn world as latents.

    python -m tools.tiny.latents --out runs/tiny --size 96x160 --clips 600
    python -m tools.tiny.latents --out runs/tiny --size 128x224 --clips 300

Each clip becomes one file, so that the command goes on where it was stopped and several of them
(`--first`) can work at once. Text and picture states come from the same seeded encoders that the
tiny preset has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.components import Components
from pipelines.encode import encode_picture, encode_text
from pipelines.loading import load_tiny
from tools.tiny import vae_forward
from tools.tiny.export import load_vae
from tools.tiny.optimise import load_checkpoint, save_checkpoint
from tools.tiny.train_vae import to_video
from tools.tiny.world import Clip, make_clip
from xicon_infer.console import ConsoleProgress
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.vae import WanVAE
from xicon_infer.types import SilentProgress

CLIP_FRAMES = 49
SIZES = ("96x160", "128x224")
"""Width by height, pixels."""


class Latents(NamedTuple):
    """Training clips, stacked; float16.

    video: [N, 16, T, h, w]. pose: [N, 16, T, h / 2, w / 2]. reference: [N, 16, 1, h, w]. image:
    [N, S, C]. text: N tensors [L_i, C].
    """

    video: Tensor
    pose: Tensor
    reference: Tensor
    image: Tensor
    text: list[Tensor]


@torch.inference_mode()
def encode_clip(
    vae: WanVAE, encoders: Components[ScailTransformer], clip: Clip
) -> dict[str, Tensor]:
    """Returns the tensors of a clip, float16, without the axis of the batch."""
    quiet = SilentProgress()

    def latents(frames: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            raw = vae_forward.encode(vae, to_video(frames[None]))
        return vae.normalize(raw.float())[0]

    found = {
        "video": latents(torch.from_numpy(clip.frames)),
        "pose": latents(torch.from_numpy(clip.pose)),
        "reference": latents(torch.from_numpy(clip.reference)[None]),
        "image": encode_picture(encoders, clip.reference, "stretch", quiet)[0],
        "text": encode_text(encoders, [clip.prompt], quiet)[0],
    }
    return {name: value.half() for name, value in found.items()}


def read_latents(folder: Path, count: int) -> Latents:
    """Returns the first clips of a folder.

    Raises:
        FileNotFoundError: one is not there; the message names the command that makes it.
    """
    clips = []
    for seed in range(count):
        clip = load_checkpoint(folder / f"{seed:05d}.pt")
        if clip is None:
            raise FileNotFoundError(
                f"clip {seed} of {count} is not in {folder}; make it with python -m "
                f"tools.tiny.latents --out {folder.parent} --size {folder.name.split('_')[-1]} "
                f"--clips {count}"
            )
        clips.append(clip)
    stacked = {name: torch.stack([c[name] for c in clips]) for name in Latents._fields[:-1]}
    return Latents(**stacked, text=[clip["text"] for clip in clips])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.latents", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, with vae.pt")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="pixels")
    parser.add_argument("--clips", type=int, default=600, help="make clips up to this number")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip to make")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    vae, encoders = load_vae(options.out), load_tiny("scail")
    folder = options.out / f"latents_{options.size}"
    progress = ConsoleProgress()
    width, height = map(int, options.size.split("x"))
    size = {"num_frames": CLIP_FRAMES, "height": height, "width": width}
    with progress.stage("encode clips"):
        for seed in range(options.first, options.clips):
            path = folder / f"{seed:05d}.pt"
            if not path.exists():
                clip = make_clip(seed, split="train", **size)
                save_checkpoint(path, encode_clip(vae, encoders, clip))
            progress.step(seed + 1 - options.first, options.clips - options.first, "clip")


if __name__ == "__main__":
    main()
