"""From untrusted values to a `Job`: every option present, typed and in range.

`make_job` is the only way to build one. It refuses what is unknown, of the wrong type, out of
range or not read by the pipeline; it repairs only what the request contract says must be
repaired, and tells so in `Job.warnings`. It looks at no file: `check_files` does.

The table of options is `xicon_infer.job_fields`, the check of one value `xicon_infer.job_values`,
the rules between options `xicon_infer.job_rules`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xicon_infer.errors import MediaError, WeightsError
from xicon_infer.job_field import PIPELINES, Field
from xicon_infer.job_fields import FIELDS, MAX_FRAMES
from xicon_infer.job_profiles import (
    DISTILL_LORAS,
    PRESET_QUALITY,
    PRESETS,
    PROFILES,
    QUALITY_ALONE,
    SMALL_SHIFT,
    WITHOUT_LORA,
)
from xicon_infer.job_rules import check_inputs, check_together, finds_poses, without_effect
from xicon_infer.job_types import Job
from xicon_infer.job_values import Lora, check_value, refusal, shown
from xicon_infer.sizes import SMALL_AREA
from xicon_infer.types import latent_frames, pixel_frames

__all__ = [
    "Job",
    "Lora",
    "Source",
    "check_files",
    "make_job",
    "outputs_for",
    "refuse_unknown",
    "resolve_frames",
]

Source = Literal["cli", "request"]
"""Who asks: sizes are refused on the command line where a request repairs them."""

REQUEST_FPS = 16.0
"""Default frame rate of a request; the command line keeps that of the source."""

_INPUTS = ("image", "end_image", "pose_video", "negative_pose", "track", "video")

_FOLDERS = ("pose_video", "negative_pose")
"""Inputs that pipeline steady_dancer also takes as a folder of pictures."""


def make_job(
    values: Mapping[str, object],
    *,
    source: Source = "cli",
    fields: tuple[Field, ...] = FIELDS,
) -> Job:
    """Returns the job that the values describe; what is left out or None takes its default.

    Args:
        values: option -> value, of the types of `FIELDS`; LoRAs as text or {name, strength}.
        source: "cli" refuses a size that is no multiple of what the pipeline needs and keeps the
            source's fps; "request" floors the size with a warning and resamples to 16 fps.
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
        name: _sized(table[name], check_value(table[name], value), pipeline, source, warnings)
        for name, value in given.items()
    }
    resolved = _with_defaults(checked, table, pipeline, source)
    check_inputs(resolved)
    check_together(resolved)
    warnings += without_effect(checked, resolved, table)
    return Job(**resolved, warnings=tuple(warnings))


def outputs_for(output: Path, images: Sequence[Path]) -> list[Path]:
    """Returns the video file of each of several references: the reference's name is added.

    Args:
        output: as asked for, as `out.mp4`.
        images: the references; those of one name are numbered.
    """
    stems = [image.stem for image in images]
    names = [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[: index + 1].count(stem)}"
        for index, stem in enumerate(stems)
    ]
    return [output.with_name(f"{output.stem}.{name}{output.suffix}") for name in names]


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
        takes_folder = job.pipeline == "steady_dancer" and name in _FOLDERS
        if not (takes_folder and _is(path, "folder")) and not _is(path, "file"):
            state = "is not a file" if _is(path, "there") else "does not exist"
            raise MediaError(f"'{name}': {path} {state}", field=name, code="MEDIA_NOT_FOUND")
    if job.models_dir is not None and not _is(job.models_dir, "folder"):
        raise WeightsError(f"'models_dir': {job.models_dir} is not a folder", field="models_dir")
    if job.transformer is not None and not _is(job.transformer, "there"):
        raise WeightsError(f"'transformer': {job.transformer} does not exist", field="transformer")
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


def _sized(option: Field, value: Any, pipeline: str, source: Source, warnings: list[str]) -> Any:
    """Returns a value that divides by the option's multiple, floored only for a request."""
    multiple = option.multiple_for(pipeline)
    if multiple == 1 or value % multiple == 0:
        return value
    below = value - value % multiple
    if source == "request":
        warnings.append(f"'{option.name}' {value} lowered to {below}: a multiple is needed")
        return below
    near = [v for v in (below, below + multiple) if option.low <= v <= option.high]
    raise refusal(
        option.name,
        f"'{option.name}' must be a multiple of {multiple}, got {value}: use "
        + " or ".join(str(v) for v in near),
        "OUT_OF_RANGE",
    )


def _with_defaults(
    checked: Mapping[str, Any], table: Mapping[str, Field], pipeline: str, source: Source
) -> dict[str, Any]:
    """Returns a value for every option: the given one, that of the profile, or the default."""
    values: dict[str, Any] = {name: option.default_for(pipeline) for name, option in table.items()}
    if source == "request":
        values["fps"] = REQUEST_FPS
    if "preset" not in checked and pipeline in PRESETS:
        values["preset"] = PRESETS[pipeline][0]
    preset = checked.get("preset", values["preset"])
    if "profile" not in checked and preset in QUALITY_ALONE:
        values["profile"] = "quality"
    profile = checked.get("profile", values["profile"])
    values |= PROFILES[profile].get(pipeline, {})
    if profile == "quality":
        values |= PRESET_QUALITY.get(preset, {})
    values |= checked
    if "shift" not in checked and profile == "quality" and _small_shift(values):
        values["shift"] = SMALL_SHIFT
    if values["loras"] is None:
        none = preset in WITHOUT_LORA or not table["loras"].used_by(pipeline)
        values["loras"] = () if none else (Lora(DISTILL_LORAS[pipeline]),)
    values["output"] = Path(values["output"])
    lone = values["pose_video"] is not None and values["negative_pose"] is None
    if "condition_guide_scale" not in checked and lone:
        values["condition_guide_scale"] = 0.0  # nothing to guide away from
    for name in ("align", "pose_align"):
        if name not in checked and (values["image"] is None or not finds_poses(values)):
            values[name] = "off"
    return values


def _small_shift(values: Mapping[str, Any]) -> bool:
    """Returns True for the smaller sizes of the models that were run with another shift there."""
    small = values["width"] * values["height"] <= SMALL_AREA
    named = values["pipeline"] in ("steady_dancer", "wan_i2v")
    return small and named and "shift" not in PRESET_QUALITY.get(values["preset"], {})
