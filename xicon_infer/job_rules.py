"""The rules between options: what does not go together, and what has no effect in a job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from xicon_infer.job_cache import refuse_cache
from xicon_infer.job_field import Field
from xicon_infer.job_fields import MAX_PIXELS
from xicon_infer.job_fields_motion import DETECTORS
from xicon_infer.job_profiles import PRESETS, PROFILES
from xicon_infer.job_values import refusal, shown

_ALL_SOURCES = "--video (a dance), --pose-video (a rendered pose) or --track (a saved motion)"
_SOURCES = {
    "scail": _ALL_SOURCES,
    "steady_dancer": _ALL_SOURCES,
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
    if values["image"] is None and pipeline in ("scail", "steady_dancer", "wan_i2v"):
        raise refusal("image", "Missing 'image': the reference picture", "MISSING_FIELD")
    if pipeline == "wan_t2v" and not values["prompt"].strip():
        raise refusal("prompt", "Missing 'prompt': what the video shows", "MISSING_FIELD")
    if values["preset"] not in PRESETS.get(pipeline, (values["preset"],)):
        allowed = ", ".join(PRESETS[pipeline])
        message = f"'preset' must be one of {allowed} with pipeline {pipeline}, got "
        raise refusal("preset", message + shown(values["preset"]), "INVALID_CHOICE")
    both = str(values["preset"]).startswith("flf2v")
    if pipeline == "wan_i2v" and both != (values["end_image"] is not None):
        message = (
            "Missing 'end_image': the weights of this preset start and end with a picture"
            if both
            else "'end_image' needs --preset flf2v-fp8 or flf2v-bf16, made to end with a picture"
        )
        raise refusal("end_image", message, "MISSING_FIELD" if both else "UNUSED_FIELD")
    if pipeline in _SOURCES:
        _check_motion(values)
    elif values["fps"] == "source":
        message = f"'fps' must be a number with pipeline {pipeline}: nothing drives it"
        raise refusal("fps", message, "INVALID_NUMBER")
    if values["output"].suffix.lower() != ".mp4":
        name = shown(str(values["output"]))
        raise refusal("output", f"'output' must end in .mp4, got {name}", "INVALID_VALUE")


def _check_motion(values: Mapping[str, Any]) -> None:
    """Refuses what does not fit to the motion of a job that has one."""
    _check_motion_source(values)
    drawn = values["pose_video"] is None
    if drawn and values["pose_fit"] == "stretch":
        message = "'pose_fit' must be one of crop, pad for a track or a driving video, got "
        raise refusal("pose_fit", f'{message}"stretch"', "INVALID_CHOICE")
    for name in ("align", "pose_align"):
        if values["image"] is None and values[name] != "off":
            message = f"'{name}' {values[name]} needs --image, the reference to fit the motion to"
            raise refusal(name, message, "MISSING_FIELD")
    if values["tracker"] != "none" and values["detector"] in DETECTORS:
        message = (
            f"'tracker' must be none with --detector {values['detector']}, got "
            f"{shown(values['tracker'])}: give an ultralytics model (.pt, .onnx, .engine)"
        )
        raise refusal("tracker", message, "INVALID_CHOICE")
    if values["overlay"] and not finds_poses(values):
        message = "'overlay' needs --video without --track or --pose-video: it shows what was found"
        raise refusal("overlay", message, "MISSING_FIELD")
    if values["negative_pose"] is not None and drawn:
        message = "'negative_pose' needs --pose-video: for a driving video or a track it is made"
        raise refusal("negative_pose", message, "MISSING_FIELD")
    given = values["pose_video"] is not None and values["negative_pose"] is None
    if given and values["condition_guide_scale"] > 0:
        message = (
            "'condition_guide_scale' needs --negative-pose beside a --pose-video: it guides away "
            "from it; give the folder or video, or 0"
        )
        raise refusal("condition_guide_scale", message, "MISSING_FIELD")


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
    ranges = ("pose_start", "pose_end"), ("ref_start", "ref_end"), ("st_cond_cfg", "end_cond_cfg")
    for small, large in ranges:
        if values[small] > values[large]:
            numbers = f"{values[small]:g} and {values[large]:g}"
            message = f"'{small}' must not be larger than '{large}', got {numbers}"
            raise refusal(small, message, "OUT_OF_RANGE")
    first = values["step_cache_start"]
    refuse_cache(
        values["step_cache"],
        (None if first == "auto" else first, values["step_cache_end"]),
        values["num_inference_steps"],
        values["guidance_batching"],
    )
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
    pipeline = values["pipeline"]
    return [
        f"'{name}' has no effect {reason}"
        for names, idle, reason in (
            *_sampling_rules(values),
            *_motion_rules(values),
            *_range_rules(values, table),
        )
        for name in names
        if idle and name in checked and checked[name] != table[name].default_for(pipeline)
    ]


_Rule: TypeAlias = "tuple[tuple[str, ...], bool, str]"
"""Options, whether they are idle, and why."""


def _sampling_rules(values: Mapping[str, Any]) -> tuple[_Rule, ...]:
    tiles = ("tile_height", "tile_width", "tile_stride_height", "tile_stride_width")
    guidance = ("negative_prompt", "uncond_reference", "guidance_batching")
    condition = ("st_cond_cfg", "end_cond_cfg", "negative_pose")
    cache = ("step_cache_threshold", "step_cache_start", "step_cache_end")
    tiny, still = values["preset"] == "tiny", values["context_schedule"] == "static_standard"
    return (
        (("transformer",), tiny, "with preset tiny, which has weights of its own"),
        (condition, values["condition_guide_scale"] == 0, "at condition_guide_scale 0"),
        (("blocks_to_swap",), values["memory"] in ("resident", "offload"), "but with streaming"),
        (tiles, not values["tile"], "without 'tile'"),
        (("tile",), values["decoder"] == "tiny", "with decoder tiny, which has no tiles"),
        (guidance, math.isclose(values["guidance_scale"], 1.0), "at guidance_scale 1"),
        (("lora_mode",), not values["loras"], "without a LoRA"),
        (cache, values["step_cache"] == "none", "without a step cache"),
        (("context_stride",), still, "with windows that do not move"),
    )


def _range_rules(values: Mapping[str, Any], table: Mapping[str, Field]) -> Iterator[_Rule]:
    """Yields the ends of ranges that act in the same steps as the default would."""
    pipeline, steps = values["pipeline"], values["num_inference_steps"]
    changed = PROFILES[values["profile"]].get(pipeline, {})
    for first, last in (("pose_start", "pose_end"), ("ref_start", "ref_end")):
        for name in (first, last):
            default = changed.get(name, table[name].default_for(pipeline))
            usual = {**values, name: default}
            same = _acting(usual, first, last) == _acting(values, first, last)
            plural = "step" if steps == 1 else "steps"
            yield (name,), same, f"in {steps} {plural}: they are the same as with {default:g}"


def _acting(values: Mapping[str, Any], first: str, last: str) -> list[int]:
    """Returns the steps in a range whose ends both count."""
    steps = values["num_inference_steps"]
    return [step for step in range(steps) if values[first] <= step / steps <= values[last]]


def _motion_rules(values: Mapping[str, Any]) -> tuple[_Rule, ...]:
    if values["pipeline"] not in _SOURCES:
        return ()
    found = finds_poses(values)
    rendered = values["pose_video"] is not None
    drawn = ("draw_face", "draw_hands", "pose_render", "pose_style")
    networks = ("body", "detector", "tracker", "keypoint_model", "keypoint_decode")
    followed = (*networks, "subject", "persons", "smooth", "pose_cache", "save_track")
    unseen = not (found or values["sheet"])
    silent = values["audio"] == "none" and values["fps"] != "source"
    fitted = found and "off" not in (values["align"], values["pose_align"])
    given = f"with {'a pose video' if rendered else 'a track'}: no pose is found"
    return (
        (drawn, rendered, "with a pose video, which is drawn already"),
        (followed, not found, given),
        (("align",), not found and values["align"] != "off", given),
        (("pose_align",), rendered and values["pose_align"] != "off", given),
        (("video",), unseen and silent, "when neither its sound nor its fps is used"),
        (("audio",), values["video"] is None and not rendered, "without a video"),
        (("image",), values["pipeline"] == "pose" and not fitted, "without alignment"),
    )
