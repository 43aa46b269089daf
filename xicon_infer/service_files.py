"""What every job has in common between its files: reading a saved motion, and the report."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job
from xicon_infer.media.selection import Selection, select_frames
from xicon_infer.media.write import write_json
from xicon_infer.pose.track import load_tracks, resample_track
from xicon_infer.runtime import Recorder, versions
from xicon_infer.types import Result, Track


def read_tracks(path: Path, selection: Selection) -> list[Track]:
    """Returns the persons of a saved motion at the frames the selection takes, at its rate.

    Raises:
        MediaError: the file cannot be used.
        InvalidRequest: the selection leaves no frame.
    """
    tracks = load_tracks(path)
    fps, count = tracks[0].fps, len(tracks[0].body.joints)
    indices = list(
        select_frames(
            float(fps),
            count,
            force_rate=float(selection.force_rate or 0),
            frame_load_cap=selection.frame_load_cap,
            skip_first_frames=selection.skip_first_frames,
            select_every_nth=selection.select_every_nth,
        )
    )
    if not indices:
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of the track's {count} frames, got "
            f"{selection.skip_first_frames}",
            field="skip_frames",
        )
    return [resample_track(track, indices, fps=selection.loaded_rate(fps)) for track in tracks]


def finish(
    job: Job,
    recorder: Recorder,
    report_path: Path,
    *,
    frames: tuple[int, int, int],
    fps: Fraction,
    machine: dict[str, Any],
    pose: dict[str, Any],
    seed: int | None = None,
) -> Result:
    """Returns the result of a job, and writes it as JSON.

    Args:
        job: what was asked for.
        recorder: what was measured and warned of.
        report_path: where the JSON goes; a temporary name.
        frames: (F, H, W) of the video.
        fps: its rate.
        machine: what it ran on.
        pose: what the pose stage found.
        seed: of the noise; None if nothing was drawn.
    """
    paths, settings = job.outputs(), job.settings()
    if seed is not None:
        settings["seed"] = seed
    result = Result(
        path=paths["video"],
        mime_type="video/mp4",
        seed=0 if seed is None else seed,
        num_frames=frames[0],
        width=frames[2],
        height=frames[1],
        fps=fps,
        settings=settings,
        stages=recorder.stages,
        warnings=recorder.warnings,
        versions=versions(),
        outputs={name: path for name, path in paths.items() if name != "video"},
        machine=machine,
        pose=pose,
    )
    write_json(report_path, report(result))
    return result


def report(result: Result) -> dict[str, Any]:
    """Returns the result as JSON has it: paths as text, fps as a fraction and a number."""
    plain = asdict(result)
    plain["path"] = str(result.path)
    plain["outputs"] = {name: str(path) for name, path in result.outputs.items()}
    plain["fps"] = float(result.fps)
    plain["fps_fraction"] = str(result.fps)
    return plain
