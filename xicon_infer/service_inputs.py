"""The motion and the sound of a job, read from its files at the rate of the result."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from pipelines.dancer_folders import read_pose_folder
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job
from xicon_infer.media.selection import Selection
from xicon_infer.media.video import probe, read_clip, read_sound
from xicon_infer.service_files import read_tracks
from xicon_infer.types import Audio, Clip, Progress, Track

FOLDER_RATE = Fraction(16)
"""Of pictures in a folder, if no rate is asked for: that of the models."""


def motion_selection(job: Job) -> Selection:
    """Returns which frames of a motion are taken, at which rate.

    The rate is the number given, else that of the driving video, else the motion's own.
    """
    driving = probe(job.video, field="video") if job.video else None
    rate = job.frame_rate or (driving.fps if driving else None)
    return Selection(rate, job.max_frames, job.skip_frames, job.select_every_nth)


def read_motion(
    job: Job, selection: Selection, progress: Progress
) -> tuple[Clip | list[Track] | None, Audio | None]:
    """Returns the motion of a file and its sound; None where it must be found in the video.

    The sound is that of the driving video, else of the pose video. A folder of pose pictures is
    not read here, but by `read_drawn_pose`, which knows the size of the result.
    """
    motion: Clip | list[Track] | None = None
    audio = None
    if job.pose_video is not None and not job.pose_video.is_dir():
        motion = read_clip(
            job.pose_video,
            selection=selection,
            with_audio=job.audio == "source" and job.video is None,
            warn=progress.warn,
            field="pose_video",
        )
        audio = motion.audio
    elif job.track is not None:
        motion = read_tracks(job.track, selection)
    if job.video is not None and job.audio == "source":
        audio = read_sound(job.video, selection=selection, warn=progress.warn, field="video")
    return motion, audio


def read_drawn_pose(
    path: Path, field: str, selection: Selection, size: tuple[int, int], progress: Progress
) -> Clip:
    """Returns drawn poses from a video, or from a folder of numbered pictures.

    Pictures have no rate: they are taken one by one, and play at the rate of the result.

    Args:
        path: of the video or folder.
        field: the option it comes from, for errors.
        selection: which frames.
        size: (W, H) of the result; pictures of a folder are brought to it.
        progress: told of warnings.

    Raises:
        MediaError: a file cannot be read, or a number is missing in the folder.
        InvalidRequest: the selection leaves no picture.
    """
    if not path.is_dir():
        return read_clip(
            path, selection=selection, with_audio=False, warn=progress.warn, field=field
        )
    rate = selection.force_rate or FOLDER_RATE
    clip = read_pose_folder(path, size=size, fps=rate, progress=progress)
    frames = clip.frames[selection.skip_first_frames :: selection.select_every_nth]
    frames = frames[: selection.frame_load_cap or None]
    if not len(frames):
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of {len(clip.frames)} pictures, got "
            f"{selection.skip_first_frames}",
            field="skip_frames",
            code="OUT_OF_RANGE",
        )
    return Clip(frames, rate)
