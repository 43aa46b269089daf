"""Shows what the tiny SCAIL model makes of held-out clips, beside the truth.

    python -m tools.tiny.look --out outputs/look

Writes one picture `sheet.png` (per clip a row of the result and a row of the truth, each with
reference, pose and frame) and one video per clip (pose, result, truth side by side). This is for
eyes; `tools.tiny.evaluate` has the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.loading import load_tiny
from pipelines.scail import ScailPipeline
from tools.tiny.evaluate import generate, held_out_clip
from tools.tiny.latents import KINDS
from tools.tiny.motion import FPS
from tools.tiny.world import Clip, draw_sheet
from xicon_infer.console import ConsoleProgress
from xicon_infer.media.write import atomic_path, write_video
from xicon_infer.types import UInt8Array


def side_by_side(clip: Clip, frames: UInt8Array) -> UInt8Array:
    """Returns pose, result and truth in one video [F, H, 3 W, 3]."""
    pose = clip.pose.repeat(2, axis=1).repeat(2, axis=2)
    return np.concatenate([pose, frames, clip.frames], axis=2)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.look", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; made")
    parser.add_argument("--clips", type=int, default=6, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    parser.add_argument(
        "--kind", choices=tuple(KINDS), default="128x224x49", help="pixels x frames"
    )
    parser.add_argument("--pose-end", type=float, default=1.0, help="share of steps with the pose")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    kind, progress = KINDS[options.kind], ConsoleProgress()
    pipeline = ScailPipeline(load_tiny("scail"))
    rows: list[Clip] = []
    with progress.stage("make videos"):
        for number in range(options.clips):
            clip = held_out_clip(
                options.first + number, kind.num_frames, height=kind.height, width=kind.width
            )
            frames = generate(pipeline, clip, pose_end=options.pose_end)
            rows += [replace(clip, frames=frames), clip]
            path = options.out / f"clip_{options.first + number:03d}.mp4"
            write_video(path, side_by_side(clip, frames), fps=Fraction(FPS))
            progress.step(number + 1, options.clips, "clip")
    with atomic_path(options.out / "sheet.png") as part:
        Image.fromarray(draw_sheet(rows, moments=5, zoom=1)).save(part, format="png")


if __name__ == "__main__":
    main()
