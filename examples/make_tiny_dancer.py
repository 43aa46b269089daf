"""Draws `tiny_character.png` and `tiny_dance.npz`: the character and the dance of `make demo`.

    python examples/make_tiny_dancer.py [FOLDER]

Both come from the drawn world of tools/tiny, from the half of it that the tiny model never saw in
training: a held-out character, and the held-out end of the real dance of `dance_fullbody.npz` on
the character's own bones. Nothing else is random, so the files are the same on every run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tools.tiny.world import make_clip
from xicon_infer.pose.track import save_tracks

SEED = 6015
"""A test clip of the real dance that `tools.tiny.evaluate` does not use."""
WIDTH, HEIGHT, NUM_FRAMES = 128, 224, 97


def main(arguments: Sequence[str]) -> None:
    """Writes both files to the folder named, else beside this script."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    clip = make_clip(SEED, split="test", num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH)
    picture, motion = folder / "tiny_character.png", folder / "tiny_dance.npz"
    Image.fromarray(clip.reference).save(picture, optimize=True)
    save_tracks(motion, [clip.track])
    print(picture, motion, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
