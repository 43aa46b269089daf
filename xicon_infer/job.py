"""From untrusted values to a `Job`: every option present, typed and in range.

`make_job` is the only way to build one. It refuses what is unknown, of the wrong type, out of
range or not read by the pipeline; it repairs only what the request contract says must be
repaired, and tells so in `Job.warnings`. It looks at no file: `check_files` does.

The table of options is `xicon_infer.job_fields`, the check of one value `xicon_infer.job_values`,
the rules between options `xicon_infer.job_rules`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from xicon_infer.errors import MediaError, WeightsError
from xicon_infer.job_fields import (
    DISTILL_LORA,
    FIELDS,
    MAX_FRAMES,
    PIPELINES,
    PROFILES,
    Field,
)
from xicon_infer.job_fields_motion import DEFAULT_DETECTOR
from xicon_infer.job_rules import check_inputs, check_together, finds_poses, without_effect
from xicon_infer.job_values import Lora, check_value, refusal, shown
from xicon_infer.types import Fit, latent_frames, pixel_frames

__all__ = ["Job", "Lora", "Source", "check_files", "make_job", "refuse_unknown", "resolve_frames"]

Source = Literal["cli", "request"]
"""Who asks: sizes are refused on the command line where a request repairs them."""

REQUEST_FPS = 16.0
"""Default frame rate of a request; the command line keeps that of the source."""

_INPUTS = ("image", "pose_video", "track", "video")


_NTSC_ROUNDING = 0.0009
"""Frames per second by which a rounded NTSC rate may be off; whole rates are further away."""


@dataclass(frozen=True)
class Job:
    """One video to make. The attributes are the options of `FIELDS`; see there for each.

    An option that the pipeline does not read has its default. warnings: repairs, and given options
    that have no effect in this job.
    """

    pipeline: str
    preset: Literal["tiny", "fp8", "bf16"]
    models_dir: Path | None
    loras: tuple[Lora, ...]
    lora_mode: Literal["full", "merge", "comfy_unmerged"]
    image: Path | None
    pose_video: Path | None
    track: Path | None
    video: Path | None
    image_fit: Fit
    pose_fit: Fit
    body: Literal["nlf", "rtmw3d"]
    detector: str
    tracker: Literal["none", "botsort", "bytetrack"]
    keypoint_model: Literal["vitpose-h", "vitpose-l"]
    keypoint_decode: Literal["dark", "udp"]
    subject: str
    persons: int
    smooth: float
    align: Literal["auto", "off", "wide"]
    pose_cache: bool
    output: Path
    overwrite: bool
    audio: Literal["source", "none"]
    crf: int
    sheet: bool
    pose_preview: bool
    overlay: bool
    save_track: bool
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int | None
    max_frames: int
    skip_frames: int
    select_every_nth: int
    fps: float | Literal["source"]
    profile: str
    num_inference_steps: int
    guidance_scale: float
    shift: float
    scheduler: str
    seed: int
    uncond_reference: Literal["keep", "zero"]
    pose_strength: float
    pose_start: float
    pose_end: float
    ref_strength: float
    ref_start: float
    ref_end: float
    draw_face: bool
    draw_hands: bool
    pose_render: Literal["full_then_half", "half"]
    pose_rope: Literal["pooled", "midpoint"]
    pose_rope_t_offset: Literal[0, 1]
    clip_preprocess: Literal["stretch", "center"]
    context_schedule: str
    context_frames: int
    context_stride: int
    context_overlap: int
    freenoise: bool
    fuse_method: str
    tile: bool
    tile_height: int
    tile_width: int
    tile_stride_height: int
    tile_stride_width: int
    device: Literal["auto", "cuda", "cpu"]
    dtype: Literal["auto", "bf16", "fp16", "fp32"]
    attention: str
    guidance_batching: Literal["auto", "batched", "sequential"]
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def frame_rate(self) -> Fraction | None:
        """The wanted rate, None for the source's; 23.976, 29.97 and 59.94 mean n * 1000 / 1001."""
        if self.fps == "source":
            return None
        ntsc = Fraction(round(self.fps * 1001 / 1000) * 1000, 1001)
        return ntsc if abs(float(ntsc) - self.fps) < _NTSC_ROUNDING else Fraction(str(self.fps))

    @property
    def guided(self) -> bool:
        """True if a second, unconditional branch runs."""
        return not math.isclose(self.guidance_scale, 1.0)

    @property
    def finds_poses(self) -> bool:
        """True if the motion is found in the driving video: no pose video and no track is given."""
        return self.video is not None and self.pose_video is None and self.track is None

    @property
    def aligns(self) -> bool:
        """True if the found motion is fitted to the reference, whose pose is found as well."""
        return self.finds_poses and self.image is not None and self.align != "off"

    @property
    def detector_path(self) -> Path | None:
        """The ultralytics model that finds the persons, None for YOLOv10m."""
        return None if self.detector == DEFAULT_DETECTOR else Path(self.detector)

    def settings(self) -> dict[str, Any]:
        """Returns every option that the pipeline reads, JSON-able; `make_job` takes it back."""
        used = (option.name for option in FIELDS if option.used_by(self.pipeline))
        return {name: _plain(getattr(self, name)) for name in used}

    def outputs(self) -> dict[str, Path]:
        """Returns every file the job will write, by kind; "video" and "report" are always there.

        Pipeline pose always writes the track and the openpose file; the others are on request.
        """
        alone = self.pipeline == "pose"
        wanted = {
            "video": (True, ".mp4"),
            "report": (True, ".json"),
            "sheet": (self.sheet, ".png"),
            "pose": (self.pose_preview, ".pose.mp4"),
            "overlay": (self.overlay, ".overlay.mp4"),
            "track": (alone or (self.save_track and self.finds_poses), ".npz"),
            "openpose": (alone, ".openpose.json"),
        }
        paths = {kind: self.output.with_suffix(end) for kind, (on, end) in wanted.items() if on}
        return paths | {"video": self.output}


def make_job(
    values: Mapping[str, object],
    *,
    source: Source = "cli",
    fields: tuple[Field, ...] = FIELDS,
) -> Job:
    """Returns the job that the values describe; what is left out or None takes its default.

    Args:
        values: option -> value, of the types of `FIELDS`; LoRAs as text or {name, strength}.
        source: "cli" refuses a size that is no multiple of 32 and keeps the source's fps;
            "request" floors the size with a warning and resamples to 16 fps.
        fields: the table of options.

    Raises:
        InvalidRequest: naming the field, the value and what is allowed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    table = {option.name: option for option in fields}
    pipeline = check_value(table["pipeline"], given.get("pipeline", PIPELINES[0]))
    refuse_unknown(given, table, pipeline)
    warnings: list[str] = []
    checked = {
        name: _sized(table[name], check_value(table[name], value), source, warnings)
        for name, value in given.items()
    }
    resolved = _with_defaults(checked, table, pipeline, source)
    check_inputs(resolved)
    check_together(resolved)
    warnings += without_effect(checked, resolved, table)
    return Job(**resolved, warnings=tuple(warnings))


def refuse_unknown(given: Mapping[str, object], table: Mapping[str, Field], pipeline: str) -> None:
    """Refuses an option that does not exist, with a near match, or that the pipeline ignores.

    Raises:
        InvalidRequest: for the first such option.
    """
    for name in given:
        if name not in table:
            near = difflib.get_close_matches(str(name), table, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            named = shown(str(name))[1:-1]
            raise refusal(str(name), f"Unknown field '{named}'{hint}", "UNKNOWN_FIELD")
        if not table[name].used_by(pipeline):
            users = ", ".join(table[name].pipelines)
            raise refusal(
                name,
                f"'{name}' is not used by pipeline {pipeline}, only by {users}; leave it out",
                "UNUSED_FIELD",
            )


def resolve_frames(available: int, requested: int | None) -> tuple[int, list[str]]:
    """Returns the number of frames of the video, and a warning for every repair.

    The pose decides, unless `requested` is given: then a longer pose is cut and a shorter one
    has its last frame repeated. At most 481; then lowered to 4n + 1.

    Args:
        available: frames of the pose, after skipping and thinning out.
        requested: the option num_frames, or None.

    Raises:
        InvalidRequest: either number is below 1.
    """
    for name, value in (("available", available), ("num_frames", requested)):
        if value is not None and value < 1:
            raise refusal(name, f"'{name}' must be at least 1, got {value}", "OUT_OF_RANGE")
    warnings = []
    wanted = available if requested is None else requested
    if requested is not None and available != requested:
        change = "cut" if available > requested else "its last frame repeated"
        warnings.append(f"the pose has {available} frames, {requested} are asked for: {change}")
    if wanted > MAX_FRAMES:
        warnings.append(f"{wanted} frames cut to {MAX_FRAMES}, the most of one job")
        wanted = MAX_FRAMES
    num_frames = pixel_frames(latent_frames(wanted))
    if num_frames != wanted:
        warnings.append(f"{wanted} frames lowered to {num_frames}: the model makes 4n+1")
    return num_frames, warnings


def check_files(job: Job) -> None:
    """Refuses inputs that are not there and outputs that cannot or must not be written.

    Raises:
        MediaError: an input or output file.
        WeightsError: the models folder, or a LoRA or a detector given as a path.
    """
    inputs = {name: path for name in _INPUTS if (path := getattr(job, name)) is not None}
    for name, path in inputs.items():
        if not _is(path, "file"):
            state = "is not a file" if _is(path, "there") else "does not exist"
            raise MediaError(f"'{name}': {path} {state}", field=name, code="MEDIA_NOT_FOUND")
    if job.models_dir is not None and not _is(job.models_dir, "folder"):
        raise WeightsError(f"'models_dir': {job.models_dir} is not a folder", field="models_dir")
    for lora in job.loras:
        if "/" in lora.name and not _is(Path(lora.name), "file"):
            raise WeightsError(
                f"'loras': {lora.name} is not a file", field="loras", code="LORA_NOT_FOUND"
            )
    if job.detector_path is not None and not _is(job.detector_path, "file"):
        raise WeightsError(f"'detector': {job.detector} is not a file", field="detector")
    folder = job.output.parent
    if not _is(folder, "folder") or not os.access(folder, os.W_OK):
        raise _unwritable(f"folder {folder} does not exist or cannot be written to")
    for path in job.outputs().values():
        _check_output(path, inputs, overwrite=job.overwrite)


def _check_output(path: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(f"{shown(path.name)}: {error.strerror}") from error
    for name, source in inputs.items():
        if _is(path, "there") and path.samefile(source):
            raise _unwritable(f"{path} is also '{name}'; choose another name")
    if not _is(path, "file"):
        raise _unwritable(f"{path} is not a file")
    if not overwrite:
        raise _unwritable(f"{path} exists; choose another name or give --overwrite")


def _unwritable(problem: str) -> MediaError:
    return MediaError(f"'output': {problem}", field="output", code="OUTPUT_NOT_WRITABLE")


def _is(path: Path, what: Literal["there", "file", "folder"]) -> bool:
    """Returns False also where the system refuses the name, for example as too long."""
    try:
        if what == "there":
            return path.exists()
        return path.is_file() if what == "file" else path.is_dir()
    except OSError:
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [{"name": lora.name, "strength": lora.strength} for lora in value]
    return value


def _sized(option: Field, value: Any, source: Source, warnings: list[str]) -> Any:
    """Returns a value that divides by the option's multiple, floored only for a request."""
    if option.multiple == 1 or value % option.multiple == 0:
        return value
    below = value - value % option.multiple
    if source == "request":
        warnings.append(f"'{option.name}' {value} lowered to {below}: a multiple is needed")
        return below
    near = [v for v in (below, below + option.multiple) if option.low <= v <= option.high]
    raise refusal(
        option.name,
        f"'{option.name}' must be a multiple of {option.multiple}, got {value}: use "
        + " or ".join(str(v) for v in near),
        "OUT_OF_RANGE",
    )


def _with_defaults(
    checked: Mapping[str, Any], table: Mapping[str, Field], pipeline: str, source: Source
) -> dict[str, Any]:
    """Returns a value for every option: the given one, that of the profile, or the default."""
    base = {name: option.default_for(pipeline) for name, option in table.items()}
    if source == "request":
        base["fps"] = REQUEST_FPS
    profile = checked.get("profile", base["profile"])
    values = {**base, **PROFILES[profile], **checked}
    if values["loras"] is None:
        none = values["preset"] == "tiny" or not table["loras"].used_by(pipeline)
        values["loras"] = () if none else (Lora(DISTILL_LORA),)
    values["output"] = Path(values["output"])
    if "align" not in checked and (values["image"] is None or not finds_poses(values)):
        values["align"] = "off"
    return values
