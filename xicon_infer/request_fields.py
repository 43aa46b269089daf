"""The one table of request fields: name, type, range, default, other spellings, help.

The validator, the JSON Schema and the reference page are made from `REQUEST_FIELDS` and
`OUTPUT_FIELDS`. Types and ranges come from the options of `Job` where a field is one of them, so
that a server and the command line cannot drift apart; names and defaults are those of the
serving contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from xicon_infer.job_field import Field
from xicon_infer.job_fields import DEFAULT_PROMPT, FIELDS, MAX_PROMPT_CHARACTERS
from xicon_infer.job_profiles import DEFAULT_NEGATIVE_PROMPT, PROFILES
from xicon_infer.media.address import MAX_URL_CHARACTERS
from xicon_infer.request_field import DANCING, DRIVEN, SAMPLED, RequestField
from xicon_infer.settings_table import ATTENTION_MODES, MODES, RESPONSE_FORMATS
from xicon_infer.types import CONTEXT_SCHEDULES, FUSE_METHODS, SCHEDULERS

API_VERSION = 1
MAX_METADATA_BYTES = 4096
MAX_PREFIX_CHARACTERS = 64
MAX_PROMPT = MAX_PROMPT_CHARACTERS
DIMENSION_MULTIPLE = 32
RESIZES: tuple[str, ...] = ("crop", "resize", "pad", "stretch")

FLAT_KEYS: tuple[str, ...] = tuple(
    f"{role}_{kind}" for role in ("image", "video") for kind in ("path", "url", "base64")
)
"""Keys of the legacy flat form, for each role in the order in which they win."""

NESTED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"image": ("images", "reference_image"), "video": ("videos", "dance_video")}
)
"""Role -> object and key of the legacy nested form."""

_OPTIONS: Mapping[str, Field] = {option.name: option for option in FIELDS}

_WAN_FRAMES = {**dict.fromkeys(MODES, None), "wan_i2v": 81, "wan_t2v": 81}
_WIDTHS = {"scail": 512, "steady_dancer": 480, "wan_i2v": 832, "wan_t2v": 832, "pose_only": 512}
_HEIGHTS = {"scail": 896, "steady_dancer": 832, "wan_i2v": 480, "wan_t2v": 480, "pose_only": 896}
_PROMPTS = {**dict.fromkeys(MODES, DEFAULT_PROMPT), "wan_i2v": "", "wan_t2v": ""}
_STEPS = {**dict.fromkeys(MODES, 4), "scail": 6}
_POSE_ENDS = {**dict.fromkeys(MODES, 1.0), "scail": 0.5}

QUALITY_STEPS: Mapping[str, int] = MappingProxyType({**dict.fromkeys(MODES, 40), "wan_t2v": 50})
QUALITY_CFG = 5.0

LEGACY_FPS = 24.0
NESTED_MAX_FRAMES = 100
FLAT_SIZE = (416, 672)


def _from_option(field: RequestField, option: str) -> RequestField:
    """Returns a field with the type and range of an option."""
    of = _OPTIONS[option]
    kind = "boolean" if of.kind == "switch" else of.kind
    assert kind in ("integer", "number", "boolean")
    return replace(field, kind=kind, low=of.low, high=of.high, option=option)


def _like(
    option: str,
    text: str,
    default: object,
    name: str = "",
    spellings: tuple[str, ...] = (),
    modes: tuple[str, ...] = SAMPLED,
) -> RequestField:
    """Returns a field of the name, type and range of an option of `Job`."""
    plain = RequestField(
        name or option,
        "text",
        text,
        default,  # type: ignore[arg-type]
        spellings=spellings,
        modes=modes,
    )
    return _from_option(plain, option)


def _choice(
    name: str,
    text: str,
    choices: tuple[str, ...],
    default: str = "",
    modes: tuple[str, ...] = SAMPLED,
    option: str = "",
) -> RequestField:
    first = default or choices[0]
    return RequestField(name, "choice", text, first, choices=choices, modes=modes, option=option)


_MEDIA_HELP = "{}: URL, data URI, or an object with one of url, base64, path"
_SOURCES = (
    RequestField("api_version", "integer", "version of this contract", API_VERSION, 1, 1),
    _choice("mode", "what to make", MODES, modes=(), option="pipeline"),
    RequestField(
        "image",
        "media",
        _MEDIA_HELP.format("reference or first frame; required but by wan_t2v and pose_only"),
        modes=(*DRIVEN, "wan_i2v"),
        option="image",
    ),
    RequestField(
        "video", "media", _MEDIA_HELP.format("driving video"), modes=DRIVEN, option="video"
    ),
    RequestField(
        "pose_video",
        "media",
        _MEDIA_HELP.format("pose already rendered, skips detection"),
        modes=DANCING,
        option="pose_video",
    ),
    RequestField(
        "prompt",
        "text",
        "what the video shows; required by wan_t2v",
        _PROMPTS,
        high=MAX_PROMPT,
        spellings=("positive_prompt",),
        modes=SAMPLED,
        option="prompt",
    ),
    RequestField(
        "negative_prompt",
        "text",
        "what guidance moves away from; read where cfg is not 1",
        DEFAULT_NEGATIVE_PROMPT,
        high=MAX_PROMPT,
        modes=SAMPLED,
        option="negative_prompt",
    ),
)

_SIZE = (
    _like("width", "pixels, lowered to a multiple of 32", _WIDTHS, modes=()),
    _like("height", "pixels, lowered to a multiple of 32", _HEIGHTS, modes=()),
    RequestField("size", "size", "WIDTHxHEIGHT or WIDTH*HEIGHT, where neither is given"),
    replace(
        _like(
            "num_frames",
            "frames, lowered to 4n+1; none: as many as drive it",
            _WAN_FRAMES,
            spellings=("frame_num", "length"),
            modes=(),
        ),
        limit="max_frames",
    ),
    _like(
        "max_frames",
        "most driving frames, after resampling; 0 for all",
        0,
        spellings=("frame_load_cap",),
        modes=DRIVEN,
    ),
    _like("skip_frames", "driving frames left out at the start", 0, modes=DRIVEN),
    _like("select_every_nth", "take every n-th driving frame", 1, modes=DRIVEN),
    _like(
        "fps",
        "frames per second of the video; a driving video is resampled to it",
        16.0,
        spellings=("frame_rate",),
        modes=(),
    ),
)

_SAMPLING = (
    _choice(
        "profile",
        "fast: with the step-distill LoRA; quality: without",
        tuple(PROFILES),
        option="profile",
    ),
    _like(
        "num_inference_steps",
        "steps of the sampler",
        _STEPS,
        "steps",
        ("num_inference_steps", "sample_steps"),
    ),
    _like(
        "guidance_scale",
        "guidance; at exactly 1 the negative pass is skipped",
        1.0,
        "cfg",
        ("guidance_scale", "sample_guide_scale"),
    ),
    # The contract allows 0, where no noise would be left to remove; see `request_job`.
    replace(_like("shift", "shift of the noise levels", 5.0, "", ("sample_shift",)), low=0),
    replace(
        _choice("scheduler", "sampler", SCHEDULERS, option="scheduler"),
        spellings=("sample_solver",),
    ),
    _like("seed", "-1 draws one; it is always reported", -1, "", ("base_seed",)),
)

_POSE = (
    _like("pose_strength", "factor on the pose", 1.0, modes=DANCING),
    _like("pose_start", "first step with the pose, as a fraction", 0.0, modes=DANCING),
    _like("pose_end", "last such step, as a fraction", _POSE_ENDS, modes=DANCING),
    _like("ref_strength", "factor on the reference", 1.0, modes=("scail",)),
    _like("draw_face", "draw the face of the pose", True, modes=DRIVEN),
    _like("draw_hands", "draw the hands of the pose", True, modes=DRIVEN),
    _like(
        "condition_guide_scale",
        "guidance away from a varied pose",
        1.0,
        modes=("steady_dancer",),
    ),
    _like("st_cond_cfg", "where it begins, as a fraction", 0.1, modes=("steady_dancer",)),
    _like("end_cond_cfg", "where it ends, as a fraction", 0.4, modes=("steady_dancer",)),
)

_WINDOW = (
    _like("context_frames", "frames of a window", 81),
    replace(_like("context_overlap", "frames that two windows share", 16), low=0),
    _like("context_stride", "largest step inside a window, in frames", 4),
    _choice(
        "context_schedule", "how windows are laid", CONTEXT_SCHEDULES, option="context_schedule"
    ),
    _like("freenoise", "repeat the noise of the first window", True),
    _choice("fuse_method", "weights where windows overlap", FUSE_METHODS, option="fuse_method"),
)

_MACHINE = (
    _choice(
        "image_resize",
        "how the image gets its size",
        RESIZES,
        modes=(*DANCING, "wan_i2v"),
        option="image_fit",
    ),
    _choice(
        "video_resize",
        "how the driving frames get their size; resize fits them inside",
        RESIZES,
        "resize",
        modes=DRIVEN,
        option="pose_fit",
    ),
    RequestField(
        "loras",
        "loras",
        "list of {name, strength -4 to 4}; names of installed files",
        [],
        high=4,
        modes=SAMPLED,
        option="loras",
    ),
    _choice("attention_mode", "attention kernels", ATTENTION_MODES, option="attention"),
    replace(_like("blocks_to_swap", "transformer blocks that come and go", "auto"), auto=True),
    replace(_like("tile", "decode in tiles", "auto", "vae_tiling"), auto=True),
)

_SHELL = (
    RequestField("output", "object", "options of the result, see below", {}),
    RequestField("dry_run", "boolean", "check the request and return it resolved", False),
    RequestField("strict", "boolean", "unknown fields are errors", False),
    RequestField(
        "timeout_s", "integer", "most seconds of the job", None, 1, 86_400, limit="job_timeout_s"
    ),
    RequestField(
        "metadata",
        "object",
        "returned unchanged; up to 4 KB as JSON",
        None,
        high=MAX_METADATA_BYTES,
    ),
    _choice("response_format", "form of the answer", RESPONSE_FORMATS, modes=()),
)

REQUEST_FIELDS: tuple[RequestField, ...] = (
    *_SOURCES,
    *_SIZE,
    *_SAMPLING,
    *_POSE,
    *_WINDOW,
    *_MACHINE,
    *_SHELL,
)
"""All fields in the order of the contract."""

OUTPUT_FIELDS: tuple[RequestField, ...] = (
    _choice("format", "container", ("mp4",), modes=()),
    replace(_like("crf", "H.264 quality, lower is better", 19, modes=())),
    _choice("pix_fmt", "pixel format", ("yuv420p",), modes=()),
    _choice("audio", "auto: the sound of the driving video", ("auto", "none"), "", DRIVEN, "audio"),
    RequestField(
        "return_pose_video",
        "boolean",
        "return the pose as a video too",
        False,
        modes=DANCING,
        option="pose_preview",
    ),
    RequestField("return_first_frame", "boolean", "return the first frame as a picture", False),
    _choice("return", "where the video goes", ("auto", "s3", "base64", "volume"), modes=()),
    RequestField(
        "filename_prefix",
        "text",
        "start of the file name, of A-Z a-z 0-9 . _ -",
        None,
        high=MAX_PREFIX_CHARACTERS,
    ),
    RequestField("url_expires_s", "integer", "seconds that a link lives", None, 60, 604_800),
    RequestField(
        "upload_url",
        "url",
        "presigned https address that the video is PUT to",
        None,
        high=MAX_URL_CHARACTERS,
    ),
    _choice("oversize", "what to do where an answer is too large", ("reencode", "fail"), modes=()),
)
"""Fields of the object `output`."""

FIRST: tuple[str, ...] = (
    *("prompt", "negative_prompt", "size", "width", "height", "num_frames", "fps", "profile"),
    *("steps", "cfg", "seed", "shift", "max_frames", "skip_frames", "select_every_nth"),
    *("context_frames", "context_overlap"),
)
"""Fields that are checked first, in this order; the others follow in the order of the table."""
