"""The one table of options: name, type, range, default, help and command-line flag of each.

The command line, the JSON of a report, the reference page and later the request of a server are
all made from `FIELDS`; `xicon_infer.job` checks values against it. An option is added here and
as an attribute of `Job`, nowhere else.

Names, ranges and defaults are those of the request contract. Differences: a width or height that
is no multiple of 32 is refused on the command line, and fps is by default that of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from xicon_infer.types import CONTEXT_SCHEDULES, FITS, FUSE_METHODS, SCHEDULERS

Kind = Literal["path", "text", "integer", "number", "switch", "choice", "loras"]

Value: TypeAlias = "str | int | float | bool | tuple[()] | None"
"""A default: JSON-like, None where the option may be left out without one."""

PIPELINES: tuple[str, ...] = ("scail",)
SCAIL: tuple[str, ...] = ("scail",)

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

PROFILES: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {
        "fast": {},
        # What the authors of SCAIL sample with: Euler, guidance by text alone against an empty
        # negative prompt, the pose present in every step, no distillation.
        "quality": {
            "scheduler": "euler/official",
            "num_inference_steps": 50,
            "shift": 5.0,
            "guidance_scale": 4.0,
            "negative_prompt": "",
            "pose_end": 1.0,
            "loras": (),
        },
    }
)
"""Defaults that a profile changes; a value that is given wins over the profile."""

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "input": "What is animated, and by what.",
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
        "scail": "xicon-infer run --pipeline scail --image character.png --pose-video pose.mp4 "
        "--output dance.mp4",
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
_NUM_FRAMES_HELP = "frames of the video, lowered to 4n+1; as many as the pose has if not given"
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


@dataclass(frozen=True)
class Field:
    """One option.

    name: of the attribute and the JSON key; the flag is the same with dashes. kind: its type.
    group: a key of `GROUPS`. help: one phrase with the unit. default: one value, or one per
    pipeline. low, high: ends of the range, both allowed. multiple: a size must divide by it.
    pipelines: those that use it; empty = all. choices: all allowed values. also: values allowed
    besides a range. aliases: further flags. flag: the flag where it differs from the name.
    """

    name: str
    kind: Kind
    group: str
    help: str
    default: Value | Mapping[str, Value] = None
    low: float = 0
    high: float = 0
    multiple: int = 1
    pipelines: tuple[str, ...] = ()
    choices: tuple[str | int, ...] = ()
    also: tuple[str | int, ...] = ()
    aliases: tuple[str, ...] = ()
    flag: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """Returns the command-line flags, the main one first."""
        return (self.flag or "--" + self.name.replace("_", "-"), *self.aliases)

    def default_for(self, pipeline: str) -> Value:
        """Returns the default in a pipeline, before a profile changes it."""
        if isinstance(self.default, Mapping):
            return self.default[pipeline]
        return self.default

    @property
    def default_text(self) -> str:
        """Returns the default for a reader, and where pipelines or profiles differ; "" if none."""
        if self.default is None:
            return ""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        values = self.default if isinstance(self.default, Mapping) else {"": self.default}
        same = len(set(values.values())) == 1
        parts = [str(v) if same else f"{name} {v}" for name, v in values.items()]
        parts = parts[:1] if same else parts
        changed = ((name, profile.get(self.name)) for name, profile in PROFILES.items())
        parts += [f"{name} {v}" for name, v in changed if v is not None and str(v) != parts[0]]
        return "; ".join(parts)

    def used_by(self, pipeline: str) -> bool:
        """Returns True if the pipeline reads this option."""
        return not self.pipelines or pipeline in self.pipelines


def _choice(
    name: str,
    group: str,
    text: str,
    *choices: str | int,
    default: str | int | None = None,
    pipelines: tuple[str, ...] = (),
) -> Field:
    """Returns an option with a closed list of values; the first is the default unless given."""
    first = choices[0] if default is None else default
    return Field(name, "choice", group, text, first, pipelines=pipelines, choices=choices)


def _integer(
    name: str, group: str, text: str, default: int | None, low: int, high: int, multiple: int = 1
) -> Field:
    return Field(name, "integer", group, text, default, low, high, multiple)


_INPUT = (
    Field("image", "path", "input", "reference picture: the character to animate"),
    Field("pose_video", "path", "input", "video of the rendered pose", pipelines=SCAIL),
    Field("track", "path", "input", "motion as .npz, drawn before use", pipelines=SCAIL),
    Field("video", "path", "input", "driving video: source of sound and fps", pipelines=SCAIL),
    _choice("image_fit", "input", _IMAGE_FIT_HELP, *FITS),
    _choice(
        "pose_fit",
        "input",
        "how the pose gets its size; stretch for a video only",
        *POSE_FITS,
        pipelines=SCAIL,
    ),
)

_OUTPUT = (
    Field("output", "path", "output", "video file to write (.mp4)", "out.mp4"),
    Field("overwrite", "switch", "output", "replace existing files", False),
    _choice("audio", "output", "source: keep the sound of the driving video", "source", "none"),
    _integer("crf", "output", "H.264 quality, lower is better", 19, 0, 51),
    Field("sheet", "switch", "output", "write a contact sheet beside the video (.png)", False),
    Field("pose_preview", "switch", "output", "write the pose as a video too", False),
)

_MODEL = (
    _choice("pipeline", "model", "what to make", *PIPELINES),
    _choice("preset", "model", _PRESET_HELP, "tiny", "fp8", "bf16", default="fp8"),
    Field("models_dir", "path", "model", "folder with weights; read before XICON_MODELS_DIR"),
    Field("loras", "loras", "model", _LORAS_HELP, flag="--lora"),
    _choice("lora_mode", "model", _LORA_MODE_HELP, "full", "merge", "comfy_unmerged"),
)

_PROMPT = (
    Field("prompt", "text", "prompt", "what the video shows", {"scail": DEFAULT_PROMPT}),
    Field("negative_prompt", "text", "prompt", _NEGATIVE_HELP, DEFAULT_NEGATIVE_PROMPT),
)

_SIZE = (
    Field("width", "integer", "size", "pixels", {"scail": 512}, 128, 1920, 32),
    Field("height", "integer", "size", "pixels", {"scail": 896}, 128, 1920, 32),
    _integer("num_frames", "size", _NUM_FRAMES_HELP, None, 1, MAX_FRAMES),
    _integer("max_frames", "size", "most driving frames, 0 for all", 0, 0, 10_000),
    _integer("skip_frames", "size", "driving frames left out at the start", 0, 0, 100_000),
    _integer("select_every_nth", "size", "take every n-th driving frame", 1, 1, 60),
    Field("fps", "number", "size", _FPS_HELP, "source", 1, 60, also=("source",)),
)

_SAMPLING = (
    _choice("profile", "sampling", _PROFILE_HELP, *PROFILES),
    Field(
        "num_inference_steps",
        "integer",
        "sampling",
        "steps",
        {"scail": 6},
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
    _choice("scheduler", "sampling", "sampler", *SCHEDULERS),
    Field("seed", "integer", "sampling", _SEED_HELP, -1, 0, 2**64 - 1, also=(-1,)),
    _choice("uncond_reference", "sampling", _UNCOND_HELP, "keep", "zero", pipelines=SCAIL),
)

_POSE = (
    Field("pose_strength", "number", "pose", "factor on the pose tokens", 1.0, 0, 10),
    Field("pose_start", "number", "pose", "first step with the pose, as a fraction", 0.0, 0, 1),
    Field("pose_end", "number", "pose", "last such step, as a fraction", {"scail": 0.5}, 0, 1),
    Field("ref_strength", "number", "pose", "factor on the reference latents", 1.0, 0, 10),
    Field("ref_start", "number", "pose", "first step with the reference, as a fraction", 0.0, 0, 1),
    Field("ref_end", "number", "pose", "last such step, as a fraction", 1.0, 0, 1),
    Field("draw_face", "switch", "pose", "draw the face of a track", True),
    Field("draw_hands", "switch", "pose", "draw the hands of a track", True),
    _choice("pose_render", "pose", _POSE_RENDER_HELP, "full_then_half", "half", pipelines=SCAIL),
    _choice("pose_rope", "pose", _POSE_ROPE_HELP, "pooled", "midpoint", pipelines=SCAIL),
    _choice("pose_rope_t_offset", "pose", _T_OFFSET_HELP, 1, 0, pipelines=SCAIL),
    _choice("clip_preprocess", "pose", _CLIP_HELP, "stretch", "center"),
)

_WINDOW = (
    _choice("context_schedule", "window", "how windows are laid", *CONTEXT_SCHEDULES),
    _integer("context_frames", "window", "frames of a window", 81, 17, 321),
    _integer("context_stride", "window", "largest step inside a window, in frames", 4, 1, 16),
    _integer("context_overlap", "window", "frames that two windows share", 16, 4, 160),
    Field("freenoise", "switch", "window", "repeat the noise of the first window", True),
    _choice("fuse_method", "window", "weights where windows overlap", *FUSE_METHODS),
)

_TILING = (
    Field("tile", "switch", "tiling", "decode in tiles", False),
    _integer("tile_height", "tiling", "pixels", 272, 64, 2048, 8),
    _integer("tile_width", "tiling", "pixels", 272, 64, 2048, 8),
    _integer("tile_stride_height", "tiling", "pixels to the next tile", 144, 32, 2040, 8),
    _integer("tile_stride_width", "tiling", "pixels to the next tile", 128, 32, 2040, 8),
)

_MACHINE = (
    _choice("device", "machine", "where to compute", "auto", "cuda", "cpu"),
    _choice("dtype", "machine", _DTYPE_HELP, "auto", "bf16", "fp16", "fp32"),
    _choice("attention", "machine", _ATTENTION_HELP, "auto", *ATTENTION_KERNELS),
    _choice("guidance_batching", "machine", _BATCHING_HELP, "auto", "batched", "sequential"),
)

FIELDS: tuple[Field, ...] = (
    *_INPUT,
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
