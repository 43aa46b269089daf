"""The options of the pose stage: how the person in a driving video is found, followed and fitted.

A part of the table in `xicon_infer.job_fields`, which all others read.
"""

from __future__ import annotations

from xicon_infer.job_field import DANCER, DRIVEN, SCAIL, Field, choice_of, integer_of, only

DEFAULT_DETECTOR = "yolov10m"
DETECTORS = (DEFAULT_DETECTOR, "yolox")
"""Built in; anything else is a file for ultralytics."""

RENDERED = (*SCAIL, "pose")
"""Pipelines that draw the figure of SCAIL, with a body in three dimensions."""

_BODY_HELP = (
    "network for the 3-D body; nlf: weights for non-commercial use only, rtmw3d: Apache-2.0"
)
_DETECTOR_HELP = (
    "who finds persons: yolov10m, yolox, or the path of an ultralytics model (.pt, .onnx, .engine; "
    "needs the package ultralytics, AGPL-3.0)"
)
_TRACKER_HELP = "let ultralytics follow the persons; needs an ultralytics model as --detector"
_DECODE_HELP = "how a keypoint is read off its map: dark (ComfyUI graph) or udp (as trained)"
_SUBJECT_HELP = (
    "who is followed: auto, largest, central, confident, or a number from 0, counted from the left "
    "where the persons are first seen"
)
_SMOOTH_HELP = "how much trembling is smoothed away; 0 is off"
_ALIGN_HELP = (
    "fit the motion to the body of the reference; wide: also where only half of a body is shared; "
    "off without --image, and for a motion that is given"
)
_CACHE_HELP = "keep found poses, and use them again for the same video and options"

_KEYPOINT_HELP = "network for keypoints; dwpose is what the authors of SteadyDancer used"
_FIT_HELP = (
    "how the motion is fitted to the reference; auto: by the bones that both show; official: as "
    "the authors, with the first frame and every bone; off: as it is. By default off "
    "for a saved motion"
)
_STYLE_HELP = "how the pose is drawn: as the authors of SteadyDancer or as the ComfyUI nodes"

MOTION: tuple[Field, ...] = (
    choice_of("body", "motion", _BODY_HELP, "nlf", "rtmw3d", pipelines=RENDERED),
    *only(
        DRIVEN,
        Field(
            "detector",
            "text",
            "motion",
            _DETECTOR_HELP,
            DEFAULT_DETECTOR,
            pattern=r"yolov10m|yolox|(?s:.+)\.(?i:pt|onnx|engine)",
            form="yolov10m, yolox, or a path that ends in .pt, .onnx or .engine",
        ),
        choice_of("tracker", "motion", _TRACKER_HELP, "none", "botsort", "bytetrack"),
        choice_of("keypoint_model", "motion", _KEYPOINT_HELP, "vitpose-h", "vitpose-l", "dwpose"),
        choice_of("keypoint_decode", "motion", _DECODE_HELP, "dark", "udp"),
        Field(
            "subject",
            "text",
            "motion",
            _SUBJECT_HELP,
            "auto",
            pattern="auto|largest|central|confident|0|[1-9][0-9]?",
            form="auto, largest, central, confident, or a number from 0 to 99",
        ),
    ),
    *only(
        RENDERED,
        integer_of(
            "persons", "motion", "how many persons are followed and drawn, at most", 1, 1, 2
        ),
    ),
    Field("smooth", "number", "motion", _SMOOTH_HELP, 0.0, 0, 1, pipelines=DRIVEN),
    choice_of("align", "motion", _ALIGN_HELP, "auto", "off", "wide", pipelines=RENDERED),
    *only(
        DANCER,
        choice_of("pose_align", "motion", _FIT_HELP, "auto", "official", "off"),
        choice_of("pose_style", "motion", _STYLE_HELP, "official", "comfyui"),
    ),
    Field("pose_cache", "switch", "motion", _CACHE_HELP, True, pipelines=DRIVEN),
)

_OVERLAY_HELP = "write the figure over --video (.overlay.mp4)"
_SAVE_HELP = "write the found motion (.npz), for --track; pose always does"

MOTION_OUTPUT: tuple[Field, ...] = (
    Field("overlay", "switch", "output", _OVERLAY_HELP, False, pipelines=RENDERED),
    Field("save_track", "switch", "output", _SAVE_HELP, False, pipelines=(*SCAIL, *DANCER)),
)
