"""What a request of the worker is, once it is understood."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from xicon_infer.errors import InvalidRequest

Form = Literal["native", "legacy_nested", "legacy_flat", "workflow", "action"]
MediaKind = Literal["url", "base64", "path", "default"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("url", "base64", "path")
ROLES: tuple[str, ...] = ("image", "video", "pose_video")


class RequestError(InvalidRequest):
    """The request is refused; `errors` are the other faults that could be found."""

    def __init__(self, first: InvalidRequest, others: tuple[InvalidRequest, ...] = ()) -> None:
        super().__init__(first.message, field=first.field, code=first.code)
        self.errors = others


@dataclass(frozen=True)
class Media:
    """One picture or video of a request; the value has no meaning for kind "default"."""

    kind: MediaKind
    value: str | None = field(repr=False)

    def as_json(self) -> dict[str, str | None]:
        """Returns {kind, value}."""
        return {"kind": self.kind, "value": self.value}


@dataclass(frozen=True)
class RequestWarning:
    """Something that was repaired or left out: a code for programs, a sentence, the field."""

    code: str
    message: str
    field: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """Returns {code, message, field}."""
        return {"code": self.code, "message": self.message, "field": self.field}


@dataclass(frozen=True)
class RequestContext:
    """What this worker has.

    default_driving_video: there is one. loras: names of installed LoRA files. input_files: names
    of the files below the input roots, for workflows. modes: those that are loaded. models: names
    of all installed model files, for workflows; None leaves them unchecked.
    """

    default_driving_video: bool = False
    loras: Collection[str] = ()
    input_files: Collection[str] = ()
    modes: Collection[str] = ()
    models: Collection[str] | None = None


@dataclass(frozen=True)
class Request:
    """One request that passed every check.

    id: of the job. form: how it was written. action: "health", or None for a video to make.
    resolved: every field by its main name, with defaults; media as {kind, value}; seed None is
    drawn when the job runs. media: the same, role -> `Media`, those that are absent left out.
    warnings: of the validation, in the order found. adaptations: what this worker does otherwise
    than the fields say; to be told with the result. preset: weights wanted, None for the first.
    memory: full, balanced, low or auto. frame_limit: most frames of a video. s3: bucket of the
    request, where the worker allows that.
    """

    id: str
    form: Form
    action: str | None = None
    resolved: Mapping[str, Any] = field(default_factory=dict, repr=False)
    media: Mapping[str, Media] = field(default_factory=dict)
    warnings: tuple[RequestWarning, ...] = ()
    adaptations: tuple[RequestWarning, ...] = ()
    dry_run: bool = False
    timeout_s: int = 0
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)
    response_format: str = "standard"
    preset: str | None = None
    memory: str = "auto"
    frame_limit: int = 0
    s3: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def mode(self) -> str:
        """The mode, "" for an action."""
        return str(self.resolved.get("mode", ""))

    @property
    def output(self) -> Mapping[str, Any]:
        """The options of the result."""
        return self.resolved.get("output", {})


class Findings:
    """Collects faults and warnings, so that a request learns of all its faults at once."""

    def __init__(self) -> None:
        self.errors: list[InvalidRequest] = []
        self.warnings: list[RequestWarning] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps the refusal that is raised inside, and goes on after it."""
        try:
            yield
        except InvalidRequest as error:
            self.errors.append(error)

    def warn(self, code: str, message: str, name: str) -> None:
        """Adds a warning about a field."""
        self.warnings.append(RequestWarning(code, message, name))

    def raise_first(self) -> None:
        """Raises the first fault with the others attached.

        Raises:
            RequestError: if there is any.
        """
        if self.errors:
            raise RequestError(self.errors[0], tuple(self.errors[1:]))
