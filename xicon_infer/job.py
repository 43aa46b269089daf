"""From untrusted values to a `Job`: every option present, typed and in range.

`make_job` is the only way to build one. It refuses what is unknown, of the wrong type, out of
range or not read by the pipeline; it repairs only what the request contract says must be
repaired, and tells so in `Job.warnings`. It looks at no file: `check_files` does.

The table of options is `xicon_infer.job_fields`, the check of one value `xicon_infer.job_values`;
here are the rules between options.
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
    MAX_PIXELS,
    PIPELINES,
    PROFILES,
    Field,
)
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

    warnings: repairs, and given options that have no effect in this job.
    """

    pipeline: str
    preset: Literal["tiny", "fp8", "bf16"]
    models_dir: Path | None
    loras: tuple[Lora, ...]
    lora_mode: Literal["full", "merge", "comfy_unmerged"]
    image: Path
    pose_video: Path | None
    track: Path | None
    video: Path | None
    image_fit: Fit
    pose_fit: Fit
    output: Path
    overwrite: bool
    audio: Literal["source", "none"]
    crf: int
    sheet: bool
    pose_preview: bool
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

    def settings(self) -> dict[str, Any]:
        """Returns every option that the pipeline reads, JSON-able; `make_job` takes it back."""
        used = (option.name for option in FIELDS if option.used_by(self.pipeline))
        return {name: _plain(getattr(self, name)) for name in used}

    def outputs(self) -> dict[str, Path]:
        """Returns every file the job will write: video, report, and on request sheet and pose."""
        paths = {"video": self.output, "report": self.output.with_suffix(".json")}
        if self.sheet:
            paths["sheet"] = self.output.with_suffix(".png")
        if self.pose_preview:
            paths["pose"] = self.output.with_suffix(".pose.mp4")
        return paths


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
    _check_inputs(resolved)
    _check_together(resolved)
    warnings += _without_effect(checked, resolved, table)
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
        WeightsError: the models folder or a LoRA given as a path.
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
        values["loras"] = () if values["preset"] == "tiny" else (Lora(DISTILL_LORA),)
    values["output"] = Path(values["output"])
    return values


def _check_inputs(values: Mapping[str, Any]) -> None:
    if values["image"] is None:
        raise refusal("image", "Missing 'image': the reference picture", "MISSING_FIELD")
    if values["pose_video"] is not None and values["track"] is not None:
        raise refusal("track", "give 'pose_video' or 'track', not both", "INVALID_MEDIA")
    if values["pose_video"] is None and values["track"] is None:
        seen = (
            "'video' alone cannot drive: this version finds no poses. " if values["video"] else ""
        )
        raise refusal(
            "pose_video",
            f"{seen}Give --pose-video (a rendered pose) or --track (a saved motion)",
            "DRIVING_VIDEO_REQUIRED",
        )
    if values["track"] is not None and values["pose_fit"] == "stretch":
        message = "'pose_fit' must be one of crop, pad for a track, got \"stretch\""
        raise refusal("pose_fit", message, "INVALID_CHOICE")
    if values["output"].suffix.lower() != ".mp4":
        name = shown(str(values["output"]))
        raise refusal("output", f"'output' must end in .mp4, got {name}", "INVALID_VALUE")


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuses values that are possible alone but not together."""
    width, height = values["width"], values["height"]
    if width * height > MAX_PIXELS:
        message = f"Resolution {width}x{height} exceeds the limit of {MAX_PIXELS} pixels"
        raise refusal("width", message, "PIXELS_EXCEEDED")
    if values["context_overlap"] >= values["context_frames"]:
        message = "'context_overlap' must be smaller than 'context_frames'"
        raise refusal("context_overlap", message, "OUT_OF_RANGE")
    for small, large in (("pose_start", "pose_end"), ("ref_start", "ref_end")):
        if values[small] > values[large]:
            numbers = f"{values[small]:g} and {values[large]:g}"
            message = f"'{small}' must not be larger than '{large}', got {numbers}"
            raise refusal(small, message, "OUT_OF_RANGE")
    for side in ("height", "width"):
        tile, stride = values[f"tile_{side}"], values[f"tile_stride_{side}"]
        if stride >= tile:
            message = (
                f"'tile_stride_{side}' must be smaller than 'tile_{side}' ({tile}), got {stride}"
            )
            raise refusal(f"tile_stride_{side}", message, "OUT_OF_RANGE")


def _without_effect(
    checked: Mapping[str, Any], values: Mapping[str, Any], table: Mapping[str, Field]
) -> list[str]:
    """Returns a warning for each given option that nothing reads in this very job."""
    tiles = ("tile_height", "tile_width", "tile_stride_height", "tile_stride_width")
    drawn = ("draw_face", "draw_hands", "pose_render")
    guidance = ("negative_prompt", "uncond_reference", "guidance_batching")
    silent = values["audio"] == "none" and values["fps"] != "source"
    rules: tuple[tuple[tuple[str, ...], bool, str], ...] = (
        (tiles, not values["tile"], "without 'tile'"),
        (drawn, values["track"] is None, "with a pose video, which is drawn already"),
        (guidance, math.isclose(values["guidance_scale"], 1.0), "at guidance_scale 1"),
        (("lora_mode",), not values["loras"], "without a LoRA"),
        (("video",), silent, "when neither its sound nor its fps is used"),
    )
    return [
        f"'{name}' has no effect {reason}"
        for names, idle, reason in rules
        for name in names
        if idle and name in checked and checked[name] != table[name].default
    ]
