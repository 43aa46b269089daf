"""The rules between options: what does not go together, and what has no effect in a job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from xicon_infer.job_field import Field
from xicon_infer.job_fields import MAX_PIXELS
from xicon_infer.job_fields_motion import DEFAULT_DETECTOR
from xicon_infer.job_values import refusal, shown

_SOURCES = {
    "scail": "--video (a dance), --pose-video (a rendered pose) or --track (a saved motion)",
    "pose": "--video (a dance) or --track (a saved motion)",
}


def finds_poses(values: Mapping[str, Any]) -> bool:
    """Returns True if the motion is found in the driving video."""
    given = values["pose_video"] is not None or values["track"] is not None
    return values["video"] is not None and not given


def check_inputs(values: Mapping[str, Any]) -> None:
    """Refuses too few or too many inputs, and what does not fit to them.

    Args:
        values: every option, typed and in range.

    Raises:
        InvalidRequest: naming the option.
    """
    pipeline = values["pipeline"]
    if values["image"] is None and pipeline == "scail":
        raise refusal("image", "Missing 'image': the reference picture", "MISSING_FIELD")
    _check_motion_source(values)
    drawn = values["pose_video"] is None
    if drawn and values["pose_fit"] == "stretch":
        message = "'pose_fit' must be one of crop, pad for a track or a driving video, got "
        raise refusal("pose_fit", f'{message}"stretch"', "INVALID_CHOICE")
    if values["image"] is None and values["align"] != "off":
        message = f"'align' {values['align']} needs --image, the reference to fit the motion to"
        raise refusal("align", message, "MISSING_FIELD")
    if values["tracker"] != "none" and values["detector"] == DEFAULT_DETECTOR:
        message = (
            f"'tracker' must be none with --detector {DEFAULT_DETECTOR}, got "
            f"{shown(values['tracker'])}: give an ultralytics model (.pt, .onnx, .engine)"
        )
        raise refusal("tracker", message, "INVALID_CHOICE")
    if values["overlay"] and not finds_poses(values):
        message = "'overlay' needs --video without --track or --pose-video: it shows what was found"
        raise refusal("overlay", message, "MISSING_FIELD")
    if values["output"].suffix.lower() != ".mp4":
        name = shown(str(values["output"]))
        raise refusal("output", f"'output' must end in .mp4, got {name}", "INVALID_VALUE")


def _check_motion_source(values: Mapping[str, Any]) -> None:
    """Refuses a job with no motion, or with two."""
    pipeline = values["pipeline"]
    if values["pose_video"] is not None and values["track"] is not None:
        raise refusal("track", "give 'pose_video' or 'track', not both", "INVALID_MEDIA")
    if all(values[name] is None for name in ("video", "pose_video", "track")):
        message = f"Nothing drives the video: give {_SOURCES[pipeline]}"
        raise refusal("video", message, "DRIVING_VIDEO_REQUIRED")
    if pipeline == "pose" and values["video"] is not None and values["track"] is not None:
        message = "give 'video' or 'track' to pipeline pose, not both"
        raise refusal("track", message, "INVALID_MEDIA")


def check_together(values: Mapping[str, Any]) -> None:
    """Refuses numbers that are possible alone but not together.

    Args:
        values: every option, typed and in range.

    Raises:
        InvalidRequest: naming the option.
    """
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


def without_effect(
    checked: Mapping[str, Any], values: Mapping[str, Any], table: Mapping[str, Field]
) -> list[str]:
    """Returns a warning for each given option that nothing reads in this very job.

    Args:
        checked: the options that were given.
        values: every option.
        table: name -> option.
    """
    return [
        f"'{name}' has no effect {reason}"
        for names, idle, reason in (*_sampling_rules(values), *_motion_rules(values))
        for name in names
        if idle and name in checked and checked[name] != table[name].default
    ]


_Rule: TypeAlias = "tuple[tuple[str, ...], bool, str]"
"""Options, whether they are idle, and why."""


def _sampling_rules(values: Mapping[str, Any]) -> tuple[_Rule, ...]:
    tiles = ("tile_height", "tile_width", "tile_stride_height", "tile_stride_width")
    guidance = ("negative_prompt", "uncond_reference", "guidance_batching")
    return (
        (tiles, not values["tile"], "without 'tile'"),
        (guidance, math.isclose(values["guidance_scale"], 1.0), "at guidance_scale 1"),
        (("lora_mode",), not values["loras"], "without a LoRA"),
    )


def _motion_rules(values: Mapping[str, Any]) -> tuple[_Rule, ...]:
    found = finds_poses(values)
    rendered = values["pose_video"] is not None
    drawn = ("draw_face", "draw_hands", "pose_render")
    networks = ("body", "detector", "tracker", "keypoint_model", "keypoint_decode")
    followed = (*networks, "subject", "persons", "smooth", "pose_cache", "save_track")
    unseen = not (found or values["sheet"])
    silent = values["audio"] == "none" and values["fps"] != "source"
    fitted = found and values["align"] != "off"
    given = f"with {'a pose video' if rendered else 'a track'}: no pose is found"
    return (
        (drawn, rendered, "with a pose video, which is drawn already"),
        (followed, not found, given),
        (("align",), not found and values["align"] != "off", given),
        (("video",), unseen and silent, "when neither its sound nor its fps is used"),
        (("audio",), values["video"] is None and not rendered, "without a video"),
        (("image",), values["pipeline"] == "pose" and not fitted, "without alignment"),
    )
