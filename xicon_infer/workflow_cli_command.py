"""From the fields of a request to a command line that makes the same film.

Only what differs from the defaults is written. What a request may repair and the command line
refuses, such as a width of 420, is repaired here, with a warning.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, make_job
from xicon_infer.job_field import Field
from xicon_infer.job_fields import FIELDS
from xicon_infer.request_field import PIPELINES
from xicon_infer.request_fields import OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.workflow import Imported
from xicon_infer.workflow_graph import cut
from xicon_infer.workflow_models import base_name

MEDIA = ("image", "end_image", "video", "pose_video")
_MIN_SHIFT = 0.01
_AUDIO = {"auto": "source", "none": "none"}
_OPTIONS = {option.name: option for option in FIELDS}
_TO_OPTION = {
    field.name: field.option for field in (*REQUEST_FIELDS, *OUTPUT_FIELDS) if field.option
}
_DIFFERENT = ("mode", "attention_mode", "blocks_to_swap", "vae_tiling", "shift", *MEDIA)
"""Fields whose option has other values. Of the attention kernels only 8-bit ones are passed on, for
they change the numbers; which of the others is fastest the machine knows better."""

_ALWAYS = ("pipeline", "loras")
"""Options that are written even if they are the default."""


def job_values(imported: Imported, warnings: list[str]) -> dict[str, Any]:
    """Returns option -> value for `make_job`, only of options that the pipeline reads.

    Args:
        imported: what the graph says; media are file names.
        warnings: gets one for each value that is repaired.
    """
    fields = dict(imported.fields)
    pipeline = PIPELINES.get(str(fields.get("mode")), "scail")
    output = fields.pop("output", {})
    values: dict[str, Any] = {"pipeline": pipeline}
    for name, value in (*fields.items(), *output.items()):
        if name in _TO_OPTION and name not in _DIFFERENT:
            values[_TO_OPTION[name]] = value
    values |= imported.options
    values |= _different(fields)
    if "audio" in output:
        values["audio"] = _AUDIO[output["audio"]]
    values |= {name: _file(fields[name], warnings) for name in MEDIA if name in fields}
    if "end_image" in values:
        values["end_image"] = _file(values["end_image"], warnings)
    values["output"] = f"{output.get('filename_prefix') or 'out'}.mp4"
    if "pose_video" in values:
        # There is no varied pose beside a pose video to guide away from.
        values.pop("condition_guide_scale", None)
    _match_end(values, warnings)
    used = {name: value for name, value in values.items() if _OPTIONS[name].used_by(pipeline)}
    return {name: _floored(name, value, pipeline, warnings) for name, value in used.items()}


def _different(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a request calls otherwise."""
    values: dict[str, Any] = {}
    blocks = fields.get("blocks_to_swap")
    if isinstance(blocks, int) and not isinstance(blocks, bool) and blocks > 0:
        values |= {"memory": "stream", "blocks_to_swap": min(blocks, 40)}
    if fields.get("attention_mode") == "sage":
        values["attention"] = "auto8"
    if fields.get("vae_tiling") is True:
        values["tile"] = True
    shift = fields.get("shift")
    if shift is not None:
        values["shift"] = _MIN_SHIFT if shift == 0 else shift
    return values


def _file(value: object, warnings: list[str]) -> object:
    """Returns the name of a local file; of a URL the end.

    Raises:
        InvalidRequest: the file itself stands in the graph.
    """
    if not isinstance(value, str):
        return value
    if value[:5].lower() == "data:":
        message = "the graph holds a file as a data URI; save it and name it in the graph"
        raise InvalidRequest(message, field="workflow", code="WORKFLOW_UNSUPPORTED")
    if "://" not in value:
        return value
    name = base_name(value) or "download"
    warnings.append(f"{cut(value)}: the command line reads files; download it as {name}")
    return name


def _match_end(values: dict[str, Any], warnings: list[str]) -> None:
    """Makes preset and end picture of wan_i2v agree: other weights start and end with pictures."""
    both = str(values.get("preset", "")).startswith("flf2v")
    if values["pipeline"] != "wan_i2v" or both == ("end_image" in values):
        return
    precision = "bf16" if "bf16" in str(values.get("preset")) else "fp8"
    values["preset"] = precision if both else f"flf2v-{precision}"
    warnings.append(
        f"preset {values['preset']} is used: the model of the graph is the one "
        + ("with" if both else "without")
        + " a picture for the end"
    )


def _floored(name: str, value: Any, pipeline: str, warnings: list[str]) -> Any:
    """Returns a size lowered to the multiple that the pipeline needs."""
    multiple = _OPTIONS[name].multiple_for(pipeline)
    if multiple == 1 or isinstance(value, bool) or not isinstance(value, int):
        return value
    below = value - value % multiple
    if below != value:
        warnings.append(f"{name} {value} is lowered to {below}: a multiple of {multiple} is needed")
    return below


def checked_job(values: Mapping[str, Any]) -> Job:
    """Returns the job that the values describe.

    Raises:
        InvalidRequest: a value is of the wrong type or out of range.
    """
    return make_job(values)


def command(values: Mapping[str, Any]) -> str:
    """Returns the command line for option -> value, quoted for a shell."""
    words = ["xicon-infer", "run"]
    for option in FIELDS:
        if option.name in values:
            words += _words(option, values[option.name], values["pipeline"])
    return shlex.join(words)


def _words(option: Field, value: Any, pipeline: str) -> list[str]:
    """Returns the words of one option, none for a default."""
    default = option.default_for(pipeline)
    # True equals 1; both are no default of the same option.
    same = isinstance(value, bool) == isinstance(default, bool) and value == default
    if option.name not in _ALWAYS and same:
        return []
    flag = option.flags[0]
    if option.kind == "switch":
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if option.kind == "loras":
        named = [f"{lora['name']}:{_number(lora['strength'])}" for lora in value] or ["none"]
        return [f"{flag}={text}" for text in named]
    # Joined by "=", so that a prompt may begin with a dash.
    return [f"{flag}={_number(value)}"]


def _number(value: object) -> str:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value)) if whole and isinstance(value, float) else str(value)
