"""Every error this package raises on purpose.

    XiconError
    ├── InvalidRequest       a field of the request is wrong                 exit code 2
    ├── MediaError           an image, video or track cannot be used         exit code 3
    ├── PoseError            nobody to animate, or a pose that cannot be     exit code 4
    ├── WeightsError         a model file is missing, wrong or damaged       exit code 5
    ├── BackendUnavailable   a device or kernel that was asked for           exit code 6
    ├── OutOfMemory          the device or host memory does not suffice      exit code 6
    └── Cancelled            the caller asked to stop                        exit code 130

A message names the field, the value received, what is allowed and what to do. Anything that is
not an ``XiconError`` is a bug (exit code 1).
"""

from __future__ import annotations

from typing import ClassVar


class XiconError(Exception):
    """The root of the tree; catch this to catch every deliberate error.

    Args:
        message: one or two sentences for the user.
        field: the request field or option concerned, or None.
        code: a stable upper-case word for programs; the class default if None.
    """

    default_code: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code or self.default_code


class InvalidRequest(XiconError):
    """A request field is missing, unknown, of the wrong type or out of range."""

    default_code = "INVALID_REQUEST"
    exit_code = 2


class MediaError(XiconError):
    """An input file cannot be read, or an output file cannot be written."""

    default_code = "MEDIA_CORRUPT"
    exit_code = 3


class PoseError(XiconError):
    """The driving motion cannot be used."""

    default_code = "NO_PERSON_DETECTED"
    exit_code = 4


class WeightsError(XiconError):
    """A checkpoint is missing, unreadable, or does not fit the model."""

    default_code = "MODEL_MISSING"
    exit_code = 5


class BackendUnavailable(XiconError):
    """A device, precision or attention kernel that was asked for cannot be used here."""

    default_code = "BACKEND_UNAVAILABLE"
    exit_code = 6


class OutOfMemory(XiconError):
    """The job does not fit into the memory of the device."""

    default_code = "GPU_OOM"
    exit_code = 6


class Cancelled(XiconError):
    """The caller asked to stop; nothing was written."""

    default_code = "CANCELLED"
    exit_code = 130
