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

from xicon_infer.job_field import PIPELINES, PROFILES, SCAIL, Field, choice_of, integer_of, only
from xicon_infer.job_fields_motion import MOTION, MOTION_OUTPUT
from xicon_infer.types import CONTEXT_SCHEDULES, FITS, FUSE_METHODS, SCHEDULERS

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "DEFAULT_PROMPT",
    "DISTILL_LORA",
    "EXAMPLES",
    "FIELDS",
    "GROUPS",
    "MAX_FRAMES",
    "MAX_LORAS",
    "MAX_LORA_STRENGTH",
    "MAX_PIXELS",
    "MAX_PROMPT_CHARACTERS",
    "PIPELINES",
    "PROFILES",
    "SCAIL",
    "Field",
]

DEFAULT_PROMPT = "the human starts to dance"

# The official default of Wan2.1; the ComfyUI graphs use it as well.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

DISTILL_LORA = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
"""What makes 6 steps without guidance enough; the default of profile fast with real weights."""

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
        "pose": "xicon-infer run --pipeline pose --video dance.mp4 --output pose.mp4",
    }
)
"""One command per pipeline."""


POSE_FITS = ("crop", "stretch", "pad")
ATTENTION_KERNELS = ("flash3", "flash2", "cudnn", "flash", "efficient", "xformers", "math")

_IMAGE_FIT_HELP = (
    "how the reference gets its size: cut, keep its aspect (which changes the size of the video), "
    "distort, or fill up"
)
_PRESET_HELP = "tiny: random weights for a trial on any machine; fp8, bf16: the 14B model"
_LORAS_HELP = (
    "LoRA as NAME-or-path[:strength]; may be repeated; 'none' for no LoRA (default: the "
    "step-distill LoRA in profile fast with fp8 and bf16)"
)
_LORA_MODE_HELP = (
    "full: all of the file, weights untouched; merge: added to the weights once; comfy_unmerged: "
    "linear weights only"
)
_NEGATIVE_HELP = "what guidance moves away from; read only where guidance_scale is not 1"
_NUM_FRAMES_HELP = (
    "frames of the video, as many as the pose has if not given; scail lowers them to 4n+1"
)
_VIDEO_HELP = (
    "driving video: its person is found and followed, unless --track or --pose-video gives the "
    "motion; source of sound and fps"
)
_POSE_FIT_HELP = "how the pose gets its size; stretch for a pose video only"
_PREVIEW_HELP = "write the pose as a video too (.pose.mp4)"
_PIPELINE_HELP = "what to make; scail: the character dancing, pose: the pose video alone"
_REF_START_HELP = "first step with the reference, as a fraction"
_FPS_HELP = "frames per second the driving video is resampled to; source: its own"
_PROFILE_HELP = "fast: 6 steps, distill LoRA; quality: as the authors sample, 50 steps"
_SEED_HELP = "seed of the noise; -1 draws one and reports it"
_UNCOND_HELP = "reference in the unconditional branch: keep (official) or zero (ComfyUI wrapper)"
_POSE_RENDER_HELP = (
    "full_then_half: at full size, then halved (official); half: at half size (ComfyUI wrapper)"
)
_POSE_ROPE_HELP = "positions of the pose tokens: pooled (official) or midpoint (ComfyUI core)"
_T_OFFSET_HELP = "latent frame where pose positions start: 1 (official) or 0 (ComfyUI wrapper)"
_CLIP_HELP = "reference for CLIP: stretch (official) or center crop (ComfyUI)"
_DTYPE_HELP = "precision of the computation; auto: bf16 on a GPU, fp32 on the CPU"
_ATTENTION_HELP = "attention kernel; auto: the fastest that runs"
_BATCHING_HELP = "both guidance branches in one forward pass, or one after the other"


_INPUT = (
    Field("image", "path", "input", "reference picture: the character to animate"),
    Field("video", "path", "input", _VIDEO_HELP),
    Field("track", "path", "input", "motion as .npz, drawn before use"),
    Field("pose_video", "path", "input", "video of the rendered pose", pipelines=SCAIL),
    choice_of("image_fit", "input", _IMAGE_FIT_HELP, *FITS, pipelines=SCAIL),
    choice_of("pose_fit", "input", _POSE_FIT_HELP, *POSE_FITS),
)

_OUTPUT = (
    Field("output", "path", "output", "video file to write (.mp4)", "out.mp4"),
    Field("overwrite", "switch", "output", "replace existing files", False),
    choice_of("audio", "output", "source: keep the sound of the driving video", "source", "none"),
    integer_of("crf", "output", "H.264 quality, lower is better", 19, 0, 51),
    Field("sheet", "switch", "output", "write a contact sheet beside the video (.png)", False),
    *only(SCAIL, Field("pose_preview", "switch", "output", _PREVIEW_HELP, False)),
    *MOTION_OUTPUT,
)

_MODEL = (
    choice_of("pipeline", "model", _PIPELINE_HELP, *PIPELINES),
    Field("models_dir", "path", "model", "folder with weights; read before XICON_MODELS_DIR"),
    *only(
        SCAIL,
        choice_of("preset", "model", _PRESET_HELP, "tiny", "fp8", "bf16", default="fp8"),
        Field("loras", "loras", "model", _LORAS_HELP, flag="--lora"),
        choice_of("lora_mode", "model", _LORA_MODE_HELP, "full", "merge", "comfy_unmerged"),
    ),
)

_PROMPT = only(
    SCAIL,
    Field("prompt", "text", "prompt", "what the video shows", DEFAULT_PROMPT),
    Field("negative_prompt", "text", "prompt", _NEGATIVE_HELP, DEFAULT_NEGATIVE_PROMPT),
)

_SIZE = (
    Field("width", "integer", "size", "pixels", 512, 128, 1920, 32),
    Field("height", "integer", "size", "pixels", 896, 128, 1920, 32),
    integer_of("num_frames", "size", _NUM_FRAMES_HELP, None, 1, MAX_FRAMES),
    integer_of("max_frames", "size", "most driving frames, 0 for all", 0, 0, 10_000),
    integer_of("skip_frames", "size", "driving frames left out at the start", 0, 0, 100_000),
    integer_of("select_every_nth", "size", "take every n-th driving frame", 1, 1, 60),
    Field("fps", "number", "size", _FPS_HELP, "source", 1, 60, also=("source",)),
)

_SAMPLING = only(
    SCAIL,
    choice_of("profile", "sampling", _PROFILE_HELP, *PROFILES),
    Field(
        "num_inference_steps",
        "integer",
        "sampling",
        "steps",
        6,
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
    Field("shift", "number", "sampling", "shift of the noise levels", 5.0, 0.01, 100),
    choice_of("scheduler", "sampling", "sampler", *SCHEDULERS),
    Field("seed", "integer", "sampling", _SEED_HELP, -1, 0, 2**64 - 1, also=(-1,)),
    choice_of("uncond_reference", "sampling", _UNCOND_HELP, "keep", "zero"),
)

_POSE = (
    Field("draw_face", "switch", "pose", "draw the face of a track", True),
    Field("draw_hands", "switch", "pose", "draw the hands of a track", True),
    *only(
        SCAIL,
        Field("pose_strength", "number", "pose", "factor on the pose tokens", 1.0, 0, 10),
        Field("pose_start", "number", "pose", "first step with the pose, as a fraction", 0.0, 0, 1),
        Field("pose_end", "number", "pose", "last such step, as a fraction", 0.5, 0, 1),
        Field("ref_strength", "number", "pose", "factor on the reference latents", 1.0, 0, 10),
        Field("ref_start", "number", "pose", _REF_START_HELP, 0.0, 0, 1),
        Field("ref_end", "number", "pose", "last such step, as a fraction", 1.0, 0, 1),
        choice_of("pose_render", "pose", _POSE_RENDER_HELP, "full_then_half", "half"),
        choice_of("pose_rope", "pose", _POSE_ROPE_HELP, "pooled", "midpoint"),
        choice_of("pose_rope_t_offset", "pose", _T_OFFSET_HELP, 1, 0),
        choice_of("clip_preprocess", "pose", _CLIP_HELP, "stretch", "center"),
    ),
)

_WINDOW = only(
    SCAIL,
    choice_of("context_schedule", "window", "how windows are laid", *CONTEXT_SCHEDULES),
    integer_of("context_frames", "window", "frames of a window", 81, 17, 321),
    integer_of("context_stride", "window", "largest step inside a window, in frames", 4, 1, 16),
    integer_of("context_overlap", "window", "frames that two windows share", 16, 4, 160),
    Field("freenoise", "switch", "window", "repeat the noise of the first window", True),
    choice_of("fuse_method", "window", "weights where windows overlap", *FUSE_METHODS),
)

_TILING = only(
    SCAIL,
    Field("tile", "switch", "tiling", "decode in tiles", False),
    integer_of("tile_height", "tiling", "pixels", 272, 64, 2048, 8),
    integer_of("tile_width", "tiling", "pixels", 272, 64, 2048, 8),
    integer_of("tile_stride_height", "tiling", "pixels to the next tile", 144, 32, 2040, 8),
    integer_of("tile_stride_width", "tiling", "pixels to the next tile", 128, 32, 2040, 8),
)

_MACHINE = (
    choice_of("device", "machine", "where to compute", "auto", "cuda", "cpu"),
    *only(
        SCAIL,
        choice_of("dtype", "machine", _DTYPE_HELP, "auto", "bf16", "fp16", "fp32"),
        choice_of("attention", "machine", _ATTENTION_HELP, "auto", *ATTENTION_KERNELS),
        choice_of("guidance_batching", "machine", _BATCHING_HELP, "auto", "batched", "sequential"),
    ),
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
    *_MACHINE,
)
