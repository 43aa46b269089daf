"""Requests of the worker: from what the platform hands over to a checked `Request`.

Four forms mean the same: native, the nested and the flat one of older workers, and a ComfyUI
graph. `parse_request` turns each into one object, and refuses with the exact texts of the
contract. It opens nothing and asks nobody; it takes milliseconds.

The table of fields is `xicon_infer.request_fields`; `xicon_infer.request_job` turns a request
into the options of a `Job`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.address import check_url
from xicon_infer.request_field import DRIVEN
from xicon_infer.request_form import (
    BESIDE_WORKFLOW,
    check_action,
    check_containers,
    check_nested,
    check_unknown,
    check_version,
    choose_form,
    main_names,
    read_input,
    request_id,
)
from xicon_infer.request_job import adaptations, to_job_values
from xicon_infer.request_media import read_media, require_media
from xicon_infer.request_resolve import check_prompt, read_loras, read_mode, resolve_fields
from xicon_infer.request_types import (
    ROLES,
    Findings,
    Form,
    Media,
    Request,
    RequestContext,
    RequestError,
    RequestWarning,
)
from xicon_infer.request_values import refuse, to_object, to_text
from xicon_infer.settings import Settings

__all__ = [
    "Media",
    "Request",
    "RequestContext",
    "RequestError",
    "RequestWarning",
    "parse_request",
    "to_job_values",
]

_S3_NAMES = ("accessId", "accessSecret", "bucketName", "endpointUrl")
_MAX_S3_CHARACTERS = 2048


def parse_request(event: Mapping[str, Any], settings: Settings, context: RequestContext) -> Request:
    """Returns the request of a job.

    Args:
        event: {id, input, ...} as the SDK hands it over.
        settings: of the worker.
        context: what the worker has.

    Raises:
        RequestError: the first fault, with the others that could be found.
    """
    job_id = request_id(event)
    raw = read_input(event)
    form = choose_form(raw)
    if form == "action":
        action = check_action(raw)
        return Request(job_id, form, action, {"action": action})
    findings = Findings()
    check_version(raw, findings)
    fields = _graph_fields(raw, context, findings) if form == "workflow" else main_names(raw)
    resolved, media = _resolve(fields, raw, form, settings, context, findings)
    s3 = _read_s3(event, settings, findings)
    findings.raise_first()
    mode = resolved["mode"]
    return Request(
        id=job_id,
        form=form,
        resolved=resolved,
        media=media,
        warnings=tuple(findings.warnings),
        adaptations=adaptations(resolved, fields, settings.max_frames),
        dry_run=resolved["dry_run"],
        timeout_s=resolved["timeout_s"],
        metadata=resolved["metadata"],
        response_format=resolved["response_format"],
        preset=settings.preset_for(mode),
        memory=settings.memory,
        frame_limit=settings.max_frames,
        s3=s3,
    )


def _resolve(
    fields: Mapping[str, Any],
    raw: Mapping[str, Any],
    form: Form,
    settings: Settings,
    context: RequestContext,
    findings: Findings,
) -> tuple[dict[str, Any], dict[str, Media]]:
    """Returns the resolved fields and the media, in the order of checks of the contract."""
    mode, certain = read_mode(fields, settings, context, findings)
    bad: set[str] = set()
    if form == "legacy_nested":
        bad = check_nested(fields, findings, lenient=settings.legacy_lenient)
    elif form != "workflow":
        bad = check_containers(fields, findings)
    names = frozenset(context.input_files if form == "workflow" else ())
    media, faulty = read_media(fields, mode, settings, findings, names)
    if certain:
        require_media(media, bad | faulty, mode, form, context, findings)
        check_prompt(fields, mode, findings)
    own_rate = form == "workflow" and fields.get("fps") == "source"
    if own_rate:  # only a graph can ask for the rate of the driving video itself
        fields = {name: value for name, value in fields.items() if name != "fps"}
    resolved = resolve_fields(fields, mode, form, settings, findings)
    if own_rate and mode in DRIVEN:
        resolved["fps"] = "source"
    resolved["loras"] = read_loras(fields.get("loras", []), context, findings)
    strict = settings.strict_input or resolved["strict"]
    check_unknown(raw, findings, strict=strict, form=form)
    described = {role: media[role].as_json() if role in media else None for role in ROLES}
    return {**resolved, **described}, media


def _graph_fields(
    raw: Mapping[str, Any], context: RequestContext, findings: Findings
) -> dict[str, Any]:
    """Returns the native fields that a ComfyUI graph stands for, and those given beside it.

    Raises:
        RequestError: the graph cannot be read as a request.
    """
    from xicon_infer.workflow import import_graph

    try:
        found = import_graph(
            raw["workflow"],
            raw.get("images"),
            input_files=context.input_files,
            models=context.models,
            loras=context.loras,
        )
    except InvalidRequest as error:
        raise RequestError(error) from error
    fields = {name: value for name, value in found.items() if value is not None}
    beside = {name: raw[name] for name in BESIDE_WORKFLOW if name in raw}
    if isinstance(beside.get("output"), Mapping):
        beside["output"] = {**fields.get("output", {}), **beside["output"]}
    return fields | beside


def _read_s3(
    event: Mapping[str, Any], settings: Settings, findings: Findings
) -> Mapping[str, str] | None:
    """Returns the bucket of a request where the worker allows one; its address is checked."""
    given = event.get("s3Config")
    if given is None or not settings.allow_request_s3:
        return None
    with findings.collect():
        values = to_object("s3Config", given)
        missing = [name for name in _S3_NAMES if not values.get(name)]
        if missing:
            raise refuse("MISSING_FIELD", f"Missing '{missing[0]}' in s3Config", "s3Config")
        read = {
            name: to_text(f"s3Config.{name}", values[name], _MAX_S3_CHARACTERS)
            for name in _S3_NAMES
        }
        check_url(read["endpointUrl"], "s3Config", settings)
        return read
    return None
