"""Lays reference, pose and result of the demo side by side in a GIF, as the README shows it.

    python examples/demo_gif.py examples/tiny_character.png outputs/demo.mp4 outputs/demo.gif

The pose video lies beside the result (`--pose-preview`). Every second frame, one palette for all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from xicon_infer.media.image import load_image
from xicon_infer.media.video import read_clip
from xicon_infer.media.write import atomic_path

STRIDE = 2
COLOURS = 256


def main(picture: Path, video: Path, out: Path) -> None:
    """Writes the GIF."""
    clip = read_clip(video, with_audio=False)
    pose = read_clip(video.with_suffix(".pose.mp4"), with_audio=False).frames
    height, width = clip.frames.shape[1:3]
    still = np.asarray(Image.fromarray(load_image(str(picture))).resize((width, height)))
    rows = []
    for frame, drawn in zip(clip.frames[::STRIDE], pose[::STRIDE], strict=True):
        line = np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.NEAREST))
        rows.append(Image.fromarray(np.concatenate([still, line, frame], axis=1)))
    sample = np.concatenate([np.asarray(row) for row in rows[:: max(1, len(rows) // 8)]])
    # By their area the background alone would take most of the palette, hence the square root.
    shades, counts = np.unique(sample.reshape(-1, 3), axis=0, return_counts=True)
    weighted = np.repeat(shades, np.ceil(counts**0.5).astype(int), axis=0)
    palette = Image.fromarray(weighted[None]).quantize(COLOURS)
    pictures = [row.quantize(palette=palette, dither=Image.Dither.NONE) for row in rows]
    with atomic_path(out) as part:
        pictures[0].save(
            part,
            format="gif",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 * STRIDE / clip.fps),
            loop=0,
            optimize=False,
        )
    print(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit((__doc__ or "").strip())
    main(*map(Path, sys.argv[1:]))
