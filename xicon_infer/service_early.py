"""A video that is encoded while its later frames are still decoded.

The recipe hands its frames on as they come (`Components.frames_to`), in a thread. They are encoded
into a file beside the output under a name of its own, which `service_outputs` takes over when
everything else is complete. Whatever happens, the file is gone afterwards.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipelines.components import Components
from xicon_infer.job import Job
from xicon_infer.media.write import write_video
from xicon_infer.types import Audio, UInt8Array


@dataclass
class EarlyVideo:
    """Where the video of a job is encoded while it is decoded.

    path: a file in the folder of the output. fps, audio, crf: of the video. done: whether all of
    it is there.
    """

    path: Path
    fps: Fraction
    audio: Audio | None
    crf: int
    done: bool = False

    def write(self, frames: Iterator[UInt8Array]) -> None:
        """Encodes frames as they come.

        Raises:
            MediaError: DISK_FULL or MEDIA_WRITE.
        """
        self.done = False
        write_video(self.path, frames, fps=self.fps, audio=self.audio, crf=self.crf)
        self.done = True

    def take(self, target: Path) -> bool:
        """Gives the file its name, if all of it is there; says whether it was."""
        if self.done:
            self.path.replace(target)
            self.done = False
            return True
        return False


@contextmanager
def early_video(
    job: Job, parts: Components[Any], fps: Fraction, audio: Audio | None = None
) -> Iterator[EarlyVideo]:
    """Has the video of a job encoded while it is decoded inside.

    Args:
        job: names the output and its quality.
        parts: whose recipe is called inside.
        fps: of the video.
        audio: its sound.
    """
    name = f".{secrets.token_hex(8)}{job.output.suffix}"
    early = EarlyVideo(job.output.with_name(name), fps, audio, job.crf)
    parts.frames_to = early.write
    try:
        yield early
    finally:
        parts.frames_to = None
        with suppress(OSError):
            early.path.unlink()
