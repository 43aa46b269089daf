"""Makes the training data of the tiny transformer: clips of the drawn world as latents.

    python -m tools.tiny.latents --out runs/tiny --kind 96x160x17 --clips 900
    python -m tools.tiny.latents --out runs/tiny --kind 96x160x49 --clips 100
    python -m tools.tiny.latents --out runs/tiny --kind 128x224x49 --clips 160

Many short clips show many characters; long ones teach what windows look like. Each clip becomes
one file, so that the command goes on where it was stopped and several of them (`--first`) can work
at once. Text and picture states come from the same seeded encoders that the
tiny preset has.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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


class Kind(NamedTuple):
    """Clips of one size and length: pixels, frames, and the seed of the first one."""

    width: int
    height: int
    num_frames: int
    first_seed: int


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "96x160x17": Kind(96, 160, 17, 0),
        "96x160x49": Kind(96, 160, 49, 100_000),
        "128x224x49": Kind(128, 224, 49, 200_000),
    }
)
"""Width x height x frames -> the kind; each has characters of its own."""


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
    for number in range(count):
        clip = load_checkpoint(folder / f"{number:05d}.pt")
        if clip is None:
            raise FileNotFoundError(
                f"clip {number} of {count} is not in {folder}; make it with python -m "
                f"tools.tiny.latents --out {folder.parent} --kind {folder.name.split('_')[-1]} "
                f"--clips {count}"
            )
        clips.append(clip)
    stacked = {name: torch.stack([c[name] for c in clips]) for name in Latents._fields[:-1]}
    return Latents(**stacked, text=[clip["text"] for clip in clips])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.latents", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, with vae.pt")
    parser.add_argument("--kind", choices=tuple(KINDS), required=True, help="pixels x frames")
    parser.add_argument("--clips", type=int, required=True, help="make clips up to this number")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip to make")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    vae, encoders = load_vae(options.out), load_tiny("scail")
    folder = options.out / f"latents_{options.kind}"
    progress = ConsoleProgress()
    kind = KINDS[options.kind]
    size = {"num_frames": kind.num_frames, "height": kind.height, "width": kind.width}
    with progress.stage("encode clips"):
        for number in range(options.first, options.clips):
            path = folder / f"{number:05d}.pt"
            if not path.exists():
                clip = make_clip(kind.first_seed + number, split="train", **size)
                save_checkpoint(path, encode_clip(vae, encoders, clip))
            progress.step(number + 1 - options.first, options.clips - options.first, "clip")


if __name__ == "__main__":
    main()
