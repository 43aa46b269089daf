"""The JSON Schema of a request's `input`, made from the table of fields.

It describes well-formed requests: no unknown names, numbers as numbers. The worker also takes
numbers as text and warns of unknown names; what depends on the worker, such as installed LoRAs
or allowed hosts, is in no schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from xicon_infer.job_fields import MAX_LORA_STRENGTH
from xicon_infer.request_field import RequestField
from xicon_infer.request_fields import FLAT_KEYS, NESTED, OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.request_form import ACTIONS, BESIDE_WORKFLOW
from xicon_infer.request_types import MEDIA_KINDS
from xicon_infer.settings_table import MODES, OTHER_MODES

Schema: TypeAlias = "dict[str, Any]"

_NATIVE_MARKS = ("mode", "api_version", "image", "video", "pose_video")
_SOURCE = "^$|^/|^([Hh][Tt][Tt][Pp][Ss]?|[Dd][Aa][Tt][Aa]):"
"""Of a text whose key does not tell whether it is an address, a path or base64."""

_SIZE = r"^\s*[0-9]+\s*[xX*]\s*[0-9]+\s*$"


def request_schema() -> Schema:
    """Returns the schema (draft 2020-12)."""
    properties: Schema = {"action": {"enum": [*ACTIONS, None]}, "workflow": _workflow()}
    for field in REQUEST_FIELDS:
        properties[field.name] = _property(field)
        for other in field.spellings:
            properties[other] = {"$ref": f"#/properties/{field.name}"}
    properties |= {key: {"$ref": "#/$defs/media"} for key in FLAT_KEYS}
    properties |= {outer: _nested(outer, key) for outer, key in NESTED.values()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "xicon-infer request",
        "description": "The object `input` of a job.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": {"media": _media(""), "source": _media(_SOURCE)},
        **_forms(),
    }


def _forms() -> Schema:
    """Returns what each form requires, in the order in which the form is chosen."""
    picture = _given(NESTED["image"][1], text=True)
    nested = {
        "allOf": [
            _given("videos"),
            {"anyOf": [_given("prompt", text=True), _given("positive_prompt", text=True)]},
            {"required": ["images"], "properties": {"images": {"type": "object", **picture}}},
        ]
    }
    flat_image = [_given(key, text=True) for key in FLAT_KEYS if key.startswith("image")]
    flat = _choose(_any_given(FLAT_KEYS), {"anyOf": flat_image}, nested)
    native = _choose(_any_given(_NATIVE_MARKS), _native(flat_image), flat)
    beside = {
        "propertyNames": {"enum": ["workflow", "images", *BESIDE_WORKFLOW]},
        "properties": {"images": {"type": ["array", "null"]}},
    }
    workflow = _choose(_given("workflow"), beside, native)
    return _choose(_given("action"), {}, workflow)


def _choose(condition: Schema, then: Schema, otherwise: Schema) -> Schema:
    return {"if": condition, "then": then, "else": otherwise}


def _native(flat_image: list[Schema]) -> Schema:
    pictured = {"anyOf": [_given("image"), *flat_image, _given("images")]}
    no_picture = {"required": ["mode"], "properties": {"mode": _mode("wan_t2v", "pose_only")}}
    spoken = {"anyOf": [_given("prompt", text=True), _given("positive_prompt", text=True)]}
    text_alone = {"required": ["mode"], "properties": {"mode": _mode("wan_t2v")}}
    return {
        "allOf": [
            _choose(no_picture, {}, pictured),
            {"if": text_alone, "then": spoken},
        ]
    }


def _given(name: str, *, text: bool = False) -> Schema:
    """Returns a schema of objects in which a name is not null, and as a text not empty."""
    refused: list[Any] = [None, ""] if text else [None]
    return {"required": [name], "properties": {name: {"not": {"enum": refused}}}}


def _any_given(names: tuple[str, ...]) -> Schema:
    return {"anyOf": [_given(name) for name in names]}


def _property(field: RequestField) -> Schema:
    makers: dict[str, Callable[[RequestField], Schema]] = {
        "integer": _number,
        "number": _number,
        "boolean": _boolean,
        "choice": _choice,
        "text": _text,
        "url": _text,
        "media": lambda _: {"$ref": "#/$defs/source"},
        "object": _object,
        "loras": _loras,
        "size": lambda _: {"type": ["string", "null"], "pattern": _SIZE},
    }
    return {"description": field.help, **makers[field.kind](field)}


def _number(field: RequestField) -> Schema:
    low = -1 if field.name == "seed" else int(field.low)
    # A limit of the worker may be lower, and is no part of the contract.
    high = {} if field.limit else {"maximum": int(field.high)}
    number = {"type": [field.kind, "null"], "minimum": low, **high}
    return {"anyOf": [number, {"const": "auto"}]} if field.auto else number


def _boolean(field: RequestField) -> Schema:
    return {"enum": [True, False, *(["auto"] if field.auto else []), None]}


def _choice(field: RequestField) -> Schema:
    if field.name == "mode":
        return _mode(*MODES, null=True)
    more = ["sageattn"] if field.name == "attention_mode" else []
    return {"enum": [*field.choices, *more, None]}


def _text(field: RequestField) -> Schema:
    text: Schema = {"type": ["string", "null"], "maxLength": int(field.high)}
    if field.kind == "url":
        return {**text, "pattern": "^https://"}
    return {**text, "pattern": "^[A-Za-z0-9._-]*$"} if field.name == "filename_prefix" else text


def _object(field: RequestField) -> Schema:
    if field.name != "output":
        return {"type": ["object", "null"]}
    inside = {one.name: _property(one) for one in OUTPUT_FIELDS}
    return {"type": ["object", "null"], "properties": inside, "additionalProperties": False}


def _loras(field: RequestField) -> Schema:
    strength = {
        "type": ["number", "null"],
        "minimum": -MAX_LORA_STRENGTH,
        "maximum": MAX_LORA_STRENGTH,
    }
    entry = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 1}, "strength": strength},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {"type": ["array", "null"], "items": entry, "maxItems": int(field.high)}


def _mode(*modes: str, null: bool = False) -> Schema:
    """Returns a schema of every spelling of some modes: any case, dashes, short names."""
    names = [*modes, *(other for other, mode in OTHER_MODES.items() if mode in modes)]
    patterns = "|".join("".join(_letter(letter) for letter in name) for name in names)
    kind = ["string", "null"] if null else "string"
    return {"type": kind, "pattern": f"^({patterns})$"}


def _letter(letter: str) -> str:
    if letter == "_":
        return "[-_]"
    return f"[{letter}{letter.upper()}]" if letter.isalpha() else letter


def _media(pattern: str) -> Schema:
    text = {"type": "string", **({"pattern": pattern} if pattern else {})}
    return {
        "description": "URL, data URI, path, or an object with exactly one of url, base64, path",
        "anyOf": [
            {"type": "null"},
            text,
            {
                "type": "object",
                "properties": {kind: {"type": "string"} for kind in MEDIA_KINDS},
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
            },
        ],
    }


def _nested(outer: str, key: str) -> Schema:
    inner = {"type": ["object", "null"], "properties": {key: {"$ref": "#/$defs/source"}}}
    if outer != "images":
        return {**inner, "additionalProperties": False}
    pairs = {
        "type": "array",
        "items": {"type": "object", "required": ["name", "image"]},
    }
    return {"anyOf": [{**inner, "additionalProperties": False}, pairs]}


def _workflow() -> Schema:
    return {"description": "ComfyUI graph in API format", "type": ["object", "string", "null"]}
