"""The options of the pose stage: how the person in a driving video is found, followed and fitted.

A part of the table in `xicon_infer.job_fields`, which all others read.
"""

from __future__ import annotations

from xicon_infer.job_field import SCAIL, Field, choice_of, integer_of

DEFAULT_DETECTOR = "yolov10m"

_BODY_HELP = (
    "network for the 3-D body; nlf: weights for non-commercial use only, rtmw3d: Apache-2.0"
)
_DETECTOR_HELP = (
    "who finds persons: yolov10m, or the path of an ultralytics model (.pt, .onnx, .engine; "
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

MOTION: tuple[Field, ...] = (
    choice_of("body", "motion", _BODY_HELP, "nlf", "rtmw3d"),
    Field(
        "detector",
        "text",
        "motion",
        _DETECTOR_HELP,
        DEFAULT_DETECTOR,
        pattern=r"yolov10m|(?s:.+)\.(?i:pt|onnx|engine)",
        form="yolov10m, or a path that ends in .pt, .onnx or .engine",
    ),
    choice_of("tracker", "motion", _TRACKER_HELP, "none", "botsort", "bytetrack"),
    choice_of("keypoint_model", "motion", "network for keypoints", "vitpose-h", "vitpose-l"),
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
    integer_of("persons", "motion", "how many persons are followed and drawn, at most", 1, 1, 2),
    Field("smooth", "number", "motion", _SMOOTH_HELP, 0.0, 0, 1),
    choice_of("align", "motion", _ALIGN_HELP, "auto", "off", "wide"),
    Field("pose_cache", "switch", "motion", _CACHE_HELP, True),
)

MOTION_OUTPUT: tuple[Field, ...] = (
    Field("overlay", "switch", "output", "write the figure over --video (.overlay.mp4)", False),
    Field(
        "save_track",
        "switch",
        "output",
        "write the found motion (.npz), for --track; pose always does",
        False,
        pipelines=SCAIL,
    ),
)
