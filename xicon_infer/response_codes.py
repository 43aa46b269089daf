"""Every code of an error or a warning that a client of the worker can get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Code:
    """One code of an error.

    meaning: a sentence for a reader. retryable: the same request may succeed, on this worker or
    another. hint: what to do, where the message alone does not say. validation: found before
    anything is fetched.
    """

    meaning: str
    retryable: bool = False
    hint: str = ""
    validation: bool = True


def _later(meaning: str, hint: str = "", *, retryable: bool = False) -> Code:
    return Code(meaning, retryable, hint, validation=False)


_SMALLER = "use a smaller width, height or num_frames"
_SHORTER = "use fewer frames or steps, or raise timeout_s and the limit of the endpoint"
_ROOTS = "allow the folder with XICON_INPUT_ROOTS on the worker"

CODES: Mapping[str, Code] = MappingProxyType(
    {
        "INPUT_REQUIRED": Code("There is no input."),
        "INVALID_JSON": Code("A text that should hold JSON does not."),
        "INVALID_TYPE": Code("A field is of the wrong type."),
        "UNSUPPORTED_ACTION": Code("Only action `health` exists."),
        "UNSUPPORTED_VERSION": Code("Only api_version 1 exists."),
        "INVALID_CHOICE": Code("A field is none of its values."),
        "MODE_UNAVAILABLE": Code(
            "This worker does not offer the mode.", hint="enable the mode with XICON_MODES"
        ),
        "MISSING_FIELD": Code("A required field is missing."),
        "INVALID_MEDIA": Code("A picture or video is not given as it should be."),
        "URL_INVALID": Code("An address is malformed, has no host, or holds credentials."),
        "URL_SCHEME": Code("An address is not http or https."),
        "URL_BLOCKED": Code("An address leads where the worker does not go."),
        "PATH_NOT_ALLOWED": Code("A path is not below an input folder.", hint=_ROOTS),
        "DRIVING_VIDEO_REQUIRED": Code(
            "Nothing drives the video.", hint="send video, or configure XICON_DEFAULT_VIDEO"
        ),
        "OUT_OF_RANGE": Code("A number, text or list is outside its limits."),
        "INVALID_NUMBER": Code("A field is no number."),
        "PIXELS_EXCEEDED": Code("Width times height is above XICON_MAX_PIXELS."),
        "LORA_NOT_FOUND": Code(
            "No installed LoRA has this name.", hint="install the file; send its bare name"
        ),
        "UNKNOWN_FIELD": Code("A field does not exist, and the request or worker is strict."),
        "WORKFLOW_FORMAT": Code("The graph is not in ComfyUI's API format."),
        "WORKFLOW_UNSUPPORTED": Code("The graph has nodes that mean nothing here."),
        "WORKFLOW_PLACEHOLDER": Code("The graph holds a placeholder nobody replaced."),
        "WORKFLOW_MODEL": Code("The graph names a model that is not installed."),
        "FETCH_FAILED": _later("A picture or video could not be fetched.", retryable=True),
        "FETCH_TIMEOUT": _later("Fetching a picture or video took too long.", retryable=True),
        "MEDIA_TOO_LARGE": _later("A picture or video has too many bytes or pixels."),
        "MEDIA_NOT_FOUND": _later("A file does not exist."),
        "UNSUPPORTED_MEDIA": _later("A file is of a format that is not read."),
        "MEDIA_CORRUPT": _later("A file is damaged."),
        "INVALID_BASE64": _later("A text is not base64, or of neither picture nor video."),
        "VIDEO_TOO_LONG": _later("A video lasts too long or has too many frames."),
        "NO_PERSON_DETECTED": _later("Nobody was found in a picture or video."),
        "CONTENT_REJECTED": _later("The moderation of the worker refused the job."),
        "GPU_OOM": _later("The memory does not suffice.", _SMALLER, retryable=True),
        "GPU_ERROR": _later("The GPU failed.", retryable=True),
        "MODEL_MISSING": _later("Weights are missing on the worker."),
        "JOB_TIMEOUT": _later("The job took longer than it may.", _SHORTER),
        "OUTPUT_TOO_LARGE": _later("The video does not fit into an answer.", "configure a bucket"),
        "UPLOAD_FAILED": _later("The video could not be stored.", retryable=True),
        "DISK_FULL": _later("The worker has no room for the files.", retryable=True),
        "WORKER_STOPPING": _later("The worker is being stopped.", retryable=True),
        "INTERNAL": _later("A bug; the log of the worker tells more.", retryable=True),
    }
)
"""Code -> what it means, in the order of checking."""

WARNINGS: Mapping[str, str] = MappingProxyType(
    {
        "COERCED_INT": "the fraction of a number was cut off",
        "COERCED_STRING": "a text was read as a number",
        "DIMENSION_ROUNDED": "width or height was lowered to a multiple of 32",
        "FRAMES_ROUNDED": "num_frames was lowered to 4n+1",
        "MEDIA_PRECEDENCE": "several sources were given for one picture or video",
        "MEDIA_KIND": "a path held an address and was read as one",
        "PARAM_PRECEDENCE": "size was ignored beside width or height",
        "UNUSED_FIELD": "a field has no effect in this mode",
        "UNKNOWN_FIELD": "a field does not exist; a typing error?",
        "DEFAULT_VIDEO_USED": "the worker's own driving video was used",
        "VALUE_ADAPTED": "a value was changed to what can be computed",
        "FRAMES_CHANGED": "the pose was cut, or its last frame repeated",
        "LICENCE": "a network is not for commercial use",
        "LORA": "parts of a LoRA fit nowhere",
        "POSE": "a decision of the pose stage",
        "NOTE": "anything else that the recipe did and should be known",
        "ATTENTION_FALLBACK": "the attention kernels asked for do not run here",
        "MEMORY_FALLBACK": "the memory did not suffice; a slower plan was used",
        "S3_UPLOAD_FAILED": "the bucket failed; the video is in the answer or on the volume",
        "VOLUME_FAILED": "the volume failed; the video is in the answer or in the bucket",
        "INLINE_TOO_LARGE": "the video does not fit into the answer and went elsewhere",
        "OUTPUT_REENCODED": "the video was encoded anew to fit into the answer",
        "LIKELY_TOO_LARGE": "the video will probably not fit into an answer",
    }
)
"""Code of a warning -> what was done."""
