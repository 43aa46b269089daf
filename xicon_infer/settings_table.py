"""The one table of environment variables: name, kind, range, default, help; and the old names.

`xicon_infer.settings` reads values by it; the reference page and the example file are made from
it. Names are those of the serving contract; `XICON_PRESET`, `XICON_MODERATION`
and `XICON_KERNELS` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Kind = Literal["flag", "integer", "number", "text", "choice", "list", "paths", "path", "ports"]
Default: TypeAlias = "str | int | float | bool | tuple[str, ...] | tuple[int, ...]"

MODES: tuple[str, ...] = ("scail", "steady_dancer", "wan_i2v", "wan_t2v", "pose_only")

OTHER_MODES: Mapping[str, str] = MappingProxyType(
    {"steadydancer": "steady_dancer", "i2v": "wan_i2v", "t2v": "wan_t2v"}
)
"""Other spellings of modes, after lowering the case and "-" to "_"."""

ATTENTION_MODES: tuple[str, ...] = (
    *("auto", "flash", "xformers", "sdpa", "sage"),
    *("auto8", "ordered"),
)
RESPONSE_FORMATS: tuple[str, ...] = ("standard", "legacy_video")
VOLUME = "/runpod-volume"
PRESET_NAMES: tuple[str, ...] = (
    *("fp8", "bf16", "low-memory", "tiny", "gguf", "fp8-720p", "bf16-720p"),
    "1.3b",
)
"""Of all modes; a mode without the chosen one uses its first."""

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "worker": "What the worker offers.",
        "weights": "Where the weights are.",
        "request": "What a request may ask for.",
        "intake": "What may be fetched and read.",
        "output": "Where a result goes without a bucket.",
        "bucket": "S3-compatible storage. BUCKET_ENDPOINT_URL switches it on.",
        "job": "The life of a job.",
        "log": "What is written down.",
    }
)
"""Groups of variables in the order of the pages, with a sentence each."""


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    name: main name. kind: how its text is read. group: a key of `GROUPS`. help: one phrase with
    the unit. default: where unset or empty. low, high: ends of the range, both allowed. choices:
    all allowed values, any case. also: other names that are read, the first one set wins.
    secret: never shown. attribute: of `Settings`, where it is not the name itself.
    """

    name: str
    kind: Kind
    group: str
    help: str
    default: Default = ""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    secret: bool = False
    attribute: str = ""

    @property
    def field(self) -> str:
        """Returns the attribute of `Settings`: the name in lower case, without XICON_."""
        return self.attribute or self.name.removeprefix("XICON_").lower()


def _flag(name: str, group: str, text: str, default: bool = False) -> Setting:
    return Setting(name, "flag", group, text, default)


def _count(
    name: str, group: str, text: str, default: float, bounds: tuple[float, float]
) -> Setting:
    kind: Kind = "number" if isinstance(default, float) else "integer"
    return Setting(name, kind, group, text, default, *bounds)


def _one_of(name: str, group: str, text: str, *choices: str) -> Setting:
    return Setting(name, "choice", group, text, choices[0], choices=choices)


_ENDPOINT_HELP = "address of the storage; unset = results go into the answer or to the volume"
_BUCKET_HELP = "bucket; if unset it is taken from the endpoint"
_KEY_HELP = "key id; it and the secret must be of one family (BUCKET_, AWS_ or R2_)"
_CACHE_HELP = "what can be made again, compiled kernels among it; unset = the user's"
_PRESET_HELP = "set of weights for every mode that has it; unset = the first of each mode"
_INLINE_HELP = "largest answer, bytes of JSON; 0 = 19000000 for /runsync, 9500000 for /run"
_MODERATION_HELP = (
    "`module:function` called before the fetch and after the encoding; it may refuse a job"
)
_STEADY_HELP = (
    "default of '{}' in mode steady_dancer with profile quality; unset = that of the mode"
)
_DOWNLOAD_HELP = "fetch missing weights at start, by the pinned manifest; never during a job"
_ALLOWLIST_HELP = "host suffixes, separated by commas; if set, no other host is fetched from"
_PRIVATE_HELP = "let URLs lead to private addresses; for closed networks only"
_REQUEST_S3_HELP = "read the bucket of a request's s3Config"

_WORKER = (
    Setting("XICON_MODES", "list", "worker", "modes on offer", MODES, choices=MODES),
    Setting("XICON_PRESET", "choice", "worker", _PRESET_HELP, choices=PRESET_NAMES),
    _one_of(
        "XICON_STEADY_DANCER_VARIANT",
        "worker",
        "weights of mode steady_dancer; fp16 = bf16",
        *("fp8", "bf16", "fp16", "gguf"),
    ),
    _one_of("XICON_ATTENTION", "worker", "attention kernels preferred", *ATTENTION_MODES),
    _one_of(
        "XICON_KERNELS",
        "worker",
        "what runs between the products of a block",
        *("auto", "eager", "triton", "compile"),
    ),
    _one_of(
        "XICON_MEMORY",
        "worker",
        "full: all networks on the GPU; balanced: one at a time; low: blocks come and go",
        *("auto", "full", "balanced", "low"),
    ),
    _flag("ENABLE_FLASH_ATTN", "worker", "let attention auto choose flash kernels", True),
    _flag("XICON_WARMUP", "worker", "one tiny pass per mode before the first job", True),
    _flag("REFRESH_WORKER", "worker", "ask the platform for a fresh worker after every job"),
    _flag("SERVE_API_LOCALLY", "worker", "serve the SDK's local API on 0.0.0.0:8000"),
)

_WEIGHTS = (
    Setting(
        "XICON_MODELS_DIR",
        "paths",
        "weights",
        "folders with weights, separated by colons, read before all others",
        (),
        also=("MODELS_DIR",),
    ),
    _flag("XICON_DOWNLOAD", "weights", _DOWNLOAD_HELP),
    _flag("XICON_VERIFY_WEIGHTS", "weights", "compare sha256 at start, which takes minutes"),
    Setting("HF_TOKEN", "text", "weights", "Hugging Face token, for XICON_DOWNLOAD", secret=True),
    Setting("XICON_CACHE_DIR", "path", "weights", _CACHE_HELP),
)

_REQUEST = (
    _count("XICON_MAX_PIXELS", "request", "most pixels of a frame", 1_048_576, (16384, 1_048_576)),
    _count("XICON_MAX_FRAMES", "request", "most frames of a video", 481, (1, 481)),
    Setting("XICON_DEFAULT_VIDEO", "path", "request", "driving video of a request without one"),
    _flag("XICON_STRICT_INPUT", "request", "refuse unknown fields instead of warning"),
    _flag("XICON_LEGACY_LENIENT", "request", "nested requests may lack 'videos' and 'prompt'"),
    _one_of("XICON_RESPONSE_FORMAT", "request", "form of the answer", *RESPONSE_FORMATS),
    Setting("XICON_MODERATION", "text", "request", _MODERATION_HELP),
    Setting("STEADYDANCER_GUIDE_SCALE", "number", "request", _STEADY_HELP.format("cfg"), "", 0, 30),
    Setting(
        "STEADYDANCER_CONDITION_GUIDE",
        "number",
        "request",
        _STEADY_HELP.format("condition_guide_scale"),
        "",
        0,
        20,
    ),
    Setting(
        "STEADYDANCER_END_CFG", "number", "request", _STEADY_HELP.format("end_cond_cfg"), "", 0, 1
    ),
    Setting(
        "STEADYDANCER_SEED",
        "integer",
        "request",
        _STEADY_HELP.format("seed") + "; -1 draws one",
        "",
        -1,
        2**64 - 1,
    ),
)

_INTAKE = (
    Setting(
        "XICON_INPUT_ROOTS",
        "paths",
        "intake",
        "folders that paths may lead into, separated by colons; unset = NETWORK_VOLUME_PATH",
        (),
    ),
    _count("XICON_MAX_IMAGE_BYTES", "intake", "bytes", 30_000_000, (1, 10**10)),
    _count("XICON_MAX_VIDEO_BYTES", "intake", "bytes", 300_000_000, (1, 10**11)),
    _count("XICON_MAX_VIDEO_SECONDS", "intake", "seconds", 120.0, (1, 86_400)),
    _count("XICON_FETCH_TIMEOUT_S", "intake", "seconds in all for a video", 300.0, (1, 3600)),
    Setting(
        "XICON_ALLOWED_PORTS", "ports", "intake", "ports of URLs, by commas", (80, 443, 8080, 8443)
    ),
    Setting("XICON_URL_ALLOWLIST", "list", "intake", _ALLOWLIST_HELP, ()),
    _flag("XICON_REQUIRE_HTTPS", "intake", "refuse http"),
    _flag("XICON_ALLOW_PRIVATE_URLS", "intake", _PRIVATE_HELP),
)

_OUTPUT = (
    Setting("NETWORK_VOLUME_PATH", "path", "output", "where the volume is mounted", VOLUME),
    Setting(
        "XICON_OUTPUT_DIR",
        "path",
        "output",
        "folder for results; unset = `outputs` in NETWORK_VOLUME_PATH",
    ),
    _count("XICON_MAX_INLINE_BYTES", "output", _INLINE_HELP, 0, (0, 10**9)),
    _flag("XICON_EMBED_PARAMS", "output", "write seed and settings into the file's metadata"),
)

_BUCKET = (
    Setting("BUCKET_ENDPOINT_URL", "text", "bucket", _ENDPOINT_HELP, also=("R2_ENDPOINT",)),
    Setting("BUCKET_NAME", "text", "bucket", _BUCKET_HELP, also=("R2_BUCKET",)),
    Setting(
        "BUCKET_ACCESS_KEY_ID",
        "text",
        "bucket",
        _KEY_HELP,
        also=("AWS_ACCESS_KEY_ID", "R2_ACCESS_KEY_ID"),
        secret=True,
    ),
    Setting(
        "BUCKET_SECRET_ACCESS_KEY",
        "text",
        "bucket",
        "secret of that key",
        also=("AWS_SECRET_ACCESS_KEY", "R2_SECRET_ACCESS_KEY"),
        secret=True,
    ),
    Setting(
        "AWS_SESSION_TOKEN",
        "text",
        "bucket",
        "session token of a temporary AWS_ key",
        secret=True,
        attribute="bucket_session_token",
    ),
    Setting(
        "BUCKET_REGION",
        "text",
        "bucket",
        "region; unset = from the endpoint",
        also=("AWS_REGION",),
    ),
    Setting("BUCKET_PREFIX", "text", "bucket", "first part of every key, without a leading slash"),
    _count("BUCKET_URL_EXPIRES_S", "bucket", "seconds a link lives", 604_800, (60, 604_800)),
    Setting(
        "BUCKET_PUBLIC_BASE_URL", "text", "bucket", "links are this and the key, not presigned"
    ),
    Setting(
        "BUCKET_ADDRESSING_STYLE",
        "choice",
        "bucket",
        "where the bucket stands in an address; unset = virtual for AWS, else path",
        choices=("path", "virtual"),
    ),
    Setting("BUCKET_ACL", "text", "bucket", "canned ACL of every file; unset = none"),
    _flag("BUCKET_SKIP_CHECK", "bucket", "no trial file at start"),
    _flag("XICON_ALLOW_REQUEST_S3", "bucket", _REQUEST_S3_HELP),
)

_JOB = (
    Setting("XICON_TMP", "path", "job", "where each job has its folder", "/tmp/xicon"),
    _count("XICON_JOB_TIMEOUT_S", "job", "most seconds of a job", 3300, (1, 86_400)),
    _count(
        "XICON_CANCEL_GRACE_S", "job", "seconds a cancelled job may take to stop", 60, (1, 3600)
    ),
    _count(
        "XICON_MAX_JOBS", "job", "jobs until a fresh worker is asked for; 0 = never", 0, (0, 10**6)
    ),
)

_LOG = (
    _one_of("XICON_LOG_LEVEL", "log", "least level", "INFO", "DEBUG", "WARNING", "ERROR"),
    _flag("XICON_LOG_PROMPTS", "log", "log prompts, not only their length and hash"),
    _flag("XICON_DEBUG", "log", "show tracebacks on the command line"),
)

SETTINGS: tuple[Setting, ...] = (
    *_WORKER,
    *_WEIGHTS,
    *_REQUEST,
    *_INTAKE,
    *_OUTPUT,
    *_BUCKET,
    *_JOB,
    *_LOG,
)
