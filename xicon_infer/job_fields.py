"""The one table of options: name, type, range, default, help and command-line flag of each.

The command line, the JSON of a report, the reference page and later the request of a server are
all made from `FIELDS`; `xicon_infer.job` checks values against it. An option is added here and
as an attribute of `Job`, nowhere else.

Names, ranges and defaults are those of the request contract. Differences: a width or height that
is no multiple of 32 is refused on the command line, and fps is by default that of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from xicon_infer.job_cache import STEP_CACHE
from xicon_infer.job_field import (
    DANCER,
    DRIVEN,
    PIPELINES,
    SCAIL,
    VIDEO,
    Field,
    choice_of,
    integer_of,
    only,
)
from xicon_infer.job_fields_machine import MACHINE, STORAGE
from xicon_infer.job_fields_motion import MOTION, MOTION_OUTPUT
from xicon_infer.job_profiles import DEFAULT_NEGATIVE_PROMPT, PRESETS, PROFILES, SHIFT, Value
from xicon_infer.sizes import SIZINGS
from xicon_infer.types import CONTEXT_SCHEDULES, FITS, FUSE_METHODS, SCHEDULERS

__all__ = [
    "DEFAULT_PROMPT",
    "EXAMPLES",
    "FIELDS",
    "GROUPS",
    "MAX_FRAMES",
    "MAX_LORAS",
    "MAX_LORA_STRENGTH",
    "MAX_PIXELS",
    "MAX_PROMPT_CHARACTERS",
    "Field",
]

DEFAULT_PROMPT = "the human starts to dance"

MAX_FRAMES = 481
"""Most frames of one job, in and out."""

MAX_PIXELS = 1_048_576
"""Most pixels of one frame."""

MAX_PROMPT_CHARACTERS = 4000
MAX_LORAS = 4
MAX_LORA_STRENGTH = 4.0

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "input": "What is animated, and by what.",
        "motion": "How the person in the driving video is found and followed.",
        "output": "The video, and what is written beside it.",
        "model": "Which weights, and where they are.",
        "prompt": "What the text encoder reads.",
        "size": "Size and length of the video.",
        "sampling": "How the noise becomes a video.",
        "pose": "How strongly pose and reference act, and when.",
        "window": "Long videos are sampled in overlapping windows.",
        "tiling": "Decoding in tiles, as the ComfyUI graph does: slower, blended at the seams.",
        "machine": "Device, precision and kernels; the picture changes by rounding only.",
    }
)
"""Groups of options in the order of the help, with a sentence each."""

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "scail": "xicon-infer run --pipeline scail --image character.png --video dance.mp4",
        "steady_dancer": "xicon-infer run --pipeline steady_dancer --image character.png "
        "--video dance.mp4",
        "wan_i2v": "xicon-infer run --pipeline wan_i2v --image start.png --prompt 'she waves'",
        "wan_t2v": "xicon-infer run --pipeline wan_t2v --prompt 'a red fox in the snow'",
        "pose": "xicon-infer run --pipeline pose --video dance.mp4 --output pose.mp4",
    }
)
"""One command per pipeline."""


POSE_FITS = ("crop", "stretch", "pad")

_IMAGE_HELP = (
    "reference picture: the character to animate, or the start of the video (wan_i2v); several "
    "make one video each"
)
_IMAGE_FIT_HELP = (
    "how the reference gets its size: cut, keep its aspect (which changes the size of the video), "
    "distort, or fill up"
)
_PRESET_HELP = (
    "set of weights; tiny: small ones that need no file, for a trial on any machine (trained for "
    "scail, random for the others); `xicon-infer weights list` shows what each needs"
)
_LORAS_HELP = (
    "LoRA as NAME-or-path[:strength]; may be repeated; 'none' for no LoRA (default: the "
    "step-distill LoRA in profile fast, except with tiny and 1.3b)"
)
_LORA_MODE_HELP = (
    "full: all of the file, weights untouched; merge: added to the weights once; comfy_unmerged: "
    "linear weights only"
)
_NEGATIVE_HELP = "what guidance moves away from; read only where guidance_scale is not 1"
_NUM_FRAMES_HELP = (
    "frames of the video, lowered to 4n+1 but by pose; if not given, as many as drive it"
)
_VIDEO_HELP = (
    "driving video: its person is found and followed, unless --track or --pose-video gives the "
    "motion; source of sound and fps"
)
_POSE_VIDEO_HELP = (
    "video of the rendered pose; for steady_dancer also a folder of frames 0000.jpg and on"
)
_NEGATIVE_POSE_HELP = (
    "beside a --pose-video: video or folder of the varied pose that the condition guidance moves "
    "away from"
)
_POSE_FIT_HELP = "how the pose gets its size; stretch for a pose video only"
_PREVIEW_HELP = "write the pose as a video too (.pose.mp4)"
_PIPELINE_HELP = (
    "what to make; scail and steady_dancer: the character dancing, wan_i2v: a picture coming to "
    "life, wan_t2v: a text as video, pose: the pose video alone"
)
_REF_START_HELP = "first step with the reference, as a fraction"
_FPS_HELP = "frames per second of the video; a driving video is resampled to it; source: its own"
_PROFILE_HELP = "fast: 4 to 6 steps, distill LoRA; quality: as the authors of the model sample"
_SEED_HELP = "seed of the noise; -1 draws one and reports it"
_SHIFT_HELP = (
    "shift of the noise levels; in profile quality of steady_dancer and wan_i2v 3 up to 832x480 "
    "pixels"
)
_UNCOND_HELP = "reference in the unconditional branch: keep (official) or zero (ComfyUI wrapper)"
_POSE_RENDER_HELP = (
    "full_then_half: at full size, then halved (official); half: at half size (ComfyUI wrapper)"
)
_POSE_ROPE_HELP = "positions of the pose tokens: pooled (official) or midpoint (ComfyUI core)"
_T_OFFSET_HELP = "latent frame where pose positions start: 1 (official) or 0 (ComfyUI wrapper)"
_CLIP_HELP = "reference for CLIP: stretch (official) or center crop (ComfyUI)"
_SIZING_HELP = (
    "exact: width x height; area: as many pixels in the aspect of the image; bucket: the nearest "
    "of the sizes the model was trained on"
)
_ANCHOR_HELP = (
    "what a later window starts with; every: the start image again (ComfyUI wrapper); first: "
    "nothing"
)
_CONDITION_HELP = (
    "steady_dancer: guidance away from a varied pose, in some steps a third forward pass; 0 is off"
)
_POSE_CLIP_HELP = "tell the model the first pose picture too (official), not in the ComfyUI wrapper"


_INPUT = (
    Field("image", "path", "input", _IMAGE_HELP, pipelines=(*DRIVEN, "wan_i2v")),
    Field("end_image", "path", "input", "picture the video ends with", pipelines=("wan_i2v",)),
    *only(
        DRIVEN,
        Field("video", "path", "input", _VIDEO_HELP),
        Field("track", "path", "input", "motion as .npz, drawn before use"),
    ),
    Field("pose_video", "path", "input", _POSE_VIDEO_HELP, pipelines=(*SCAIL, *DANCER)),
    Field("negative_pose", "path", "input", _NEGATIVE_POSE_HELP, pipelines=DANCER),
    choice_of("image_fit", "input", _IMAGE_FIT_HELP, *FITS, pipelines=(*SCAIL, *DANCER, "wan_i2v")),
    choice_of("pose_fit", "input", _POSE_FIT_HELP, *POSE_FITS, pipelines=DRIVEN),
)

_OUTPUT = (
    Field("output", "path", "output", "video file to write (.mp4)", "out.mp4"),
    Field("overwrite", "switch", "output", "replace existing files", False),
    choice_of(
        "audio",
        "output",
        "source: keep the sound of the driving video",
        "source",
        "none",
        pipelines=DRIVEN,
    ),
    integer_of("crf", "output", "H.264 quality, lower is better", 19, 0, 51),
    Field("sheet", "switch", "output", "write a contact sheet beside the video (.png)", False),
    *only((*SCAIL, *DANCER), Field("pose_preview", "switch", "output", _PREVIEW_HELP, False)),
    *MOTION_OUTPUT,
)

_MODEL = (
    choice_of("pipeline", "model", _PIPELINE_HELP, *PIPELINES),
    Field("models_dir", "path", "model", "folder with weights, read before all others"),
    *only(
        VIDEO,
        choice_of(
            "preset",
            "model",
            _PRESET_HELP,
            *dict.fromkeys(preset for names in PRESETS.values() for preset in names),
        ),
        Field("loras", "loras", "model", _LORAS_HELP, flag="--lora"),
        choice_of("lora_mode", "model", _LORA_MODE_HELP, "full", "merge", "comfy_unmerged"),
        *STORAGE,
    ),
)

_PROMPT = only(
    VIDEO,
    Field(
        "prompt",
        "text",
        "prompt",
        "what the video shows; required by wan_t2v",
        {"scail": DEFAULT_PROMPT, "steady_dancer": DEFAULT_PROMPT, "wan_i2v": "", "wan_t2v": ""},
    ),
    Field("negative_prompt", "text", "prompt", _NEGATIVE_HELP, DEFAULT_NEGATIVE_PROMPT),
)

_SIDE = {"scail": 32, "pose": 32, "steady_dancer": 16, "wan_i2v": 16, "wan_t2v": 16}
_WIDTH = {"scail": 512, "steady_dancer": 480, "wan_i2v": 832, "wan_t2v": 832, "pose": 512}
_HEIGHT = {"scail": 896, "steady_dancer": 832, "wan_i2v": 480, "wan_t2v": 480, "pose": 896}
_FRAMES = {"scail": None, "steady_dancer": None, "wan_i2v": 81, "wan_t2v": 81, "pose": None}
_FPS: Mapping[str, Value] = {
    "scail": "source",
    "steady_dancer": 16.0,
    "wan_i2v": 16.0,
    "wan_t2v": 16.0,
    "pose": "source",
}

_SIZE = (
    Field("width", "integer", "size", "pixels", _WIDTH, 128, 1920, _SIDE),
    Field("height", "integer", "size", "pixels", _HEIGHT, 128, 1920, _SIDE),
    choice_of("sizing", "size", _SIZING_HELP, *SIZINGS, pipelines=(*DANCER, "wan_i2v")),
    Field("num_frames", "integer", "size", _NUM_FRAMES_HELP, _FRAMES, 1, MAX_FRAMES),
    *only(
        DRIVEN,
        integer_of("max_frames", "size", "most driving frames, 0 for all", 0, 0, 10_000),
        integer_of("skip_frames", "size", "driving frames left out at the start", 0, 0, 100_000),
        integer_of("select_every_nth", "size", "take every n-th driving frame", 1, 1, 60),
    ),
    Field("fps", "number", "size", _FPS_HELP, _FPS, 1, 60, also=("source",)),
)

_STEPS = {"scail": 6, "steady_dancer": 4, "wan_i2v": 4, "wan_t2v": 4}

_SAMPLING = (
    *only(
        VIDEO,
        choice_of("profile", "sampling", _PROFILE_HELP, *PROFILES),
        Field(
            "num_inference_steps",
            "integer",
            "sampling",
            "steps",
            _STEPS,
            low=1,
            high=100,
            aliases=("--steps",),
        ),
        Field(
            "guidance_scale",
            "number",
            "sampling",
            "classifier-free guidance; 1 is off and halves the time",
            1.0,
            low=0,
            high=30,
            aliases=("--cfg",),
        ),
        # At 0 every noise level would be 0; the request contract names 0 as the lower end.
        Field("shift", "number", "sampling", _SHIFT_HELP, SHIFT, 0.01, 100),
        choice_of("scheduler", "sampling", "sampler", *SCHEDULERS),
        Field("seed", "integer", "sampling", _SEED_HELP, -1, 0, 2**64 - 1, also=(-1,)),
        *STEP_CACHE,
    ),
    choice_of("uncond_reference", "sampling", _UNCOND_HELP, "keep", "zero", pipelines=SCAIL),
    *only(
        DANCER,
        Field("condition_guide_scale", "number", "sampling", _CONDITION_HELP, 0.0, 0, 20),
        Field("st_cond_cfg", "number", "sampling", "where it begins, as a fraction", 0.1, 0, 1),
        Field("end_cond_cfg", "number", "sampling", "where it ends, as a fraction", 0.4, 0, 1),
    ),
)

_POSE_END = {"scail": 0.5, "steady_dancer": 1.0}
_FACE = {"scail": True, "steady_dancer": False, "pose": True}

_POSE = (
    Field("draw_face", "switch", "pose", "draw the face of a track", _FACE, pipelines=DRIVEN),
    Field("draw_hands", "switch", "pose", "draw the hands of a track", True, pipelines=DRIVEN),
    *only(
        (*SCAIL, *DANCER),
        Field("pose_strength", "number", "pose", "factor on the pose", 1.0, 0, 10),
        Field("pose_start", "number", "pose", "first step with the pose, as a fraction", 0.0, 0, 1),
        Field("pose_end", "number", "pose", "last such step, as a fraction", _POSE_END, 0, 1),
    ),
    *only(
        DANCER,
        Field("pose_strength_spatial", "number", "pose", "on its shape alone", 1.0, 0, 10),
        Field("pose_strength_temporal", "number", "pose", "on its motion alone", 1.0, 0, 10),
        Field("pose_clip", "switch", "pose", _POSE_CLIP_HELP, True),
    ),
    *only(
        SCAIL,
        Field("ref_strength", "number", "pose", "factor on the reference latents", 1.0, 0, 10),
        Field("ref_start", "number", "pose", _REF_START_HELP, 0.0, 0, 1),
        Field("ref_end", "number", "pose", "last such step, as a fraction", 1.0, 0, 1),
        choice_of("pose_render", "pose", _POSE_RENDER_HELP, "full_then_half", "half"),
        choice_of("pose_rope", "pose", _POSE_ROPE_HELP, "pooled", "midpoint"),
        choice_of("pose_rope_t_offset", "pose", _T_OFFSET_HELP, 1, 0),
    ),
    choice_of(
        "clip_preprocess",
        "pose",
        _CLIP_HELP,
        "stretch",
        "center",
        pipelines=(*SCAIL, *DANCER, "wan_i2v"),
    ),
)

_WINDOW = (
    *only(
        VIDEO,
        choice_of("context_schedule", "window", "how windows are laid", *CONTEXT_SCHEDULES),
        integer_of("context_frames", "window", "frames of a window", 81, 17, 321),
        integer_of("context_stride", "window", "largest step inside a window, in frames", 4, 1, 16),
        integer_of("context_overlap", "window", "frames that two windows share", 16, 4, 160),
        Field("freenoise", "switch", "window", "repeat the noise of the first window", True),
        choice_of("fuse_method", "window", "weights where windows overlap", *FUSE_METHODS),
    ),
    choice_of(
        "window_anchor",
        "window",
        _ANCHOR_HELP,
        "every",
        "first",
        default={"steady_dancer": "first", "wan_i2v": "every"},
        pipelines=(*DANCER, "wan_i2v"),
    ),
)

_TILING = only(
    VIDEO,
    Field("tile", "switch", "tiling", "decode in tiles", False),
    integer_of("tile_height", "tiling", "pixels", 272, 64, 2048, 8),
    integer_of("tile_width", "tiling", "pixels", 272, 64, 2048, 8),
    integer_of("tile_stride_height", "tiling", "pixels to the next tile", 144, 32, 2040, 8),
    integer_of("tile_stride_width", "tiling", "pixels to the next tile", 128, 32, 2040, 8),
)

FIELDS: tuple[Field, ...] = (
    *_INPUT,
    *MOTION,
    *_OUTPUT,
    *_MODEL,
    *_PROMPT,
    *_SIZE,
    *_SAMPLING,
    *_POSE,
    *_WINDOW,
    *_TILING,
    *MACHINE,
)
