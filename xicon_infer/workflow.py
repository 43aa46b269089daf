"""ComfyUI workflows: a graph is read and translated to the fields of a request, never run.

`import_graph` is the request's workflow form: graphs in API format of known nodes, with the
checks, the order and the texts of the request contract. `import_report` is what the command line
uses: it reads more kinds of nodes and tells what it left out.

The decision a reader would question: no graph engine, and no half measures. A graph that would
make another film than this project can make is refused; what changes the film little is told.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from xicon_infer.workflow_find import Film, Reading, find_film
from xicon_infer.workflow_graph import (
    Graph,
    Node,
    cut,
    names_text,
    read_nodes,
    refuse,
    shown,
    upstream,
)
from xicon_infer.workflow_media import read_media, read_preview, read_views
from xicon_infer.workflow_models import FILES, base_name, is_available, is_foreign
from xicon_infer.workflow_nodes import IMPORTED, KNOWN, SIDE
from xicon_infer.workflow_options import VALUES, unsupported
from xicon_infer.workflow_translate import (
    PLACEHOLDER,
    Found,
    raw_of,
    read_model,
    read_output,
    read_sampling,
    read_texts,
)
from xicon_infer.workflow_values import UNKNOWN, number_of

_MOST_FILES = 64
_MOST_WARNINGS = 100
_MEDIA = ("image", "video", "pose_video", "end_image")


@dataclass(frozen=True)
class Imported:
    """What a graph says.

    fields: of a native request. options: of the command line, where a request has no such field.
    warnings: what is done otherwise than the graph says. unknown_nodes: "id class" of nodes that
    no table knows and that the film does not need. ignored: classes that only show or say
    something.
    """

    fields: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unknown_nodes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def import_graph(
    graph: object,
    images: object = None,
    *,
    input_files: Collection[str] = (),
    models: Collection[str] | None = None,
    loras: Collection[str] | None = None,
) -> dict[str, Any]:
    """Returns the fields of the native request that a graph in API format stands for.

    Media are {"url": ...}, {"base64": ...} or {"path": ...}; a path without folders is a name of
    `input_files`. A frame rate of 0 in the graph becomes "source". `loras` is always there where
    the graph has a model, so that an empty list means none.

    Args:
        graph: an object or its JSON text.
        images: list of {name, image}, image as base64 or data URI, or None.
        input_files: names of the files that the graph may load.
        models: names of the installed model files; None takes every known network as installed.
        loras: names of the installed LoRAs; None leaves them to the validator.

    Raises:
        InvalidRequest: in this order INVALID_JSON, WORKFLOW_FORMAT, INVALID_TYPE,
            WORKFLOW_UNSUPPORTED, WORKFLOW_PLACEHOLDER, MEDIA_NOT_FOUND, WORKFLOW_MODEL.
    """
    nodes, named_images = _checked(graph, images)
    unknown = {node.type for node in nodes.values()} - KNOWN
    if unknown:
        raise refuse(f"Workflow uses unsupported nodes: {names_text(unknown)}")
    _check_placeholders(nodes)
    found, reading, reached = _translate(nodes, strict=True)
    fields = {
        name: _media(value, named_images, input_files) if name in _MEDIA else value
        for name, value in found.fields.items()
    }
    for value in _files(reading, reached):
        if not is_available(value, models):
            raise refuse(f"Workflow model {shown(value)} is not available", "WORKFLOW_MODEL")
    for name in (lora["name"] for lora in found.fields.get("loras", ())):
        if loras is not None and name not in loras:
            raise refuse(f"Workflow model {shown(name)} is not available", "WORKFLOW_MODEL")
    return fields


def import_report(graph: object) -> Imported:
    """Returns what a graph in API format says, with everything that is left out.

    Media are file names as written in the graph. More kinds of nodes are read than in a request;
    nodes that the film does not depend on are left out.

    Args:
        graph: an object or its JSON text.

    Raises:
        InvalidRequest: as `import_graph`, where the film itself is concerned.
    """
    nodes, _ = _checked(graph, None)
    strange = [node for node in nodes.values() if node.type not in IMPORTED | SIDE]
    found, reading, reached = _translate(nodes, strict=False)
    if reading.sketch and strange:
        # What nothing is connected to could belong anywhere.
        names = names_text({node.type for node in strange})
        raise refuse(f"Workflow uses unsupported nodes: {names}")
    for value in _files(reading, reached):
        if is_foreign(value):
            raise refuse(f"Workflow model {shown(value)} is not available", "WORKFLOW_MODEL")
        if not is_available(value, None):
            message = f"model file {shown(base_name(value))} is not known, the preset's is used"
            reading.warnings.append(message)
    extra = {node.type for node in nodes.values() if node.type in SIDE}
    more = len(reading.warnings) - _MOST_WARNINGS
    warnings = [*dict.fromkeys(reading.warnings)][:_MOST_WARNINGS]
    return Imported(
        fields=found.fields,
        options=found.options,
        warnings=(*warnings, *([f"{more} more warnings"] if more > 0 else [])),
        unknown_nodes=tuple(f"{cut(n.id)} {cut(n.type)}" for n in strange[:_MOST_WARNINGS]),
        ignored=tuple(sorted(extra)),
    )


def _checked(graph: object, images: object) -> tuple[dict[str, Node], dict[str, str]]:
    """Returns the nodes of a graph and the pictures that came with it."""
    if isinstance(graph, str):
        try:
            graph = json.loads(graph)
        except (ValueError, RecursionError):
            raise refuse("Invalid JSON format in 'workflow'", "INVALID_JSON") from None
    if not isinstance(graph, Mapping) or not graph:
        raise refuse("'workflow' must be a non-empty object", "WORKFLOW_FORMAT")
    if isinstance(graph.get("nodes"), list):
        message = "Workflow is in UI format; export it in API format"
        raise refuse(message, "WORKFLOW_FORMAT")
    return _with_images(graph, images)


def _with_images(
    graph: Mapping[str, Any], images: object
) -> tuple[dict[str, Node], dict[str, str]]:
    entries = [] if images is None else images
    pictures: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        image = entry.get("image") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(image, str):
            message = "'images' must be a list of objects with 'name' and 'image' keys"
            raise refuse(message, "INVALID_TYPE", "images")
        pictures[name] = image
    return read_nodes(graph), pictures


def _check_placeholders(nodes: Graph) -> None:
    """Refuses a template whose blanks were not filled in."""
    for node in nodes.values():
        for value in node.inputs.values():
            if isinstance(value, str) and PLACEHOLDER.fullmatch(value):
                message = f"Workflow contains unreplaced placeholder '{cut(value)}'"
                raise refuse(message, "WORKFLOW_PLACEHOLDER")


def _translate(nodes: Graph, *, strict: bool) -> tuple[Found, Reading, set[str]]:
    """Returns what the graph says, how it was read, and the ids of the nodes it depends on."""
    reading, found = Reading(nodes, strict), Found()
    film = find_film(reading)
    reading.used.add(film.sampler.id)
    mode, video = read_media(reading, film, found)
    read_sampling(reading, film, found)
    read_texts(reading, film.sampler, found)
    read_model(reading, film, mode, found)
    read_output(reading, film, found, video)
    read_preview(reading, film, found)
    reached = _reached(reading, film)
    read_views(reading, reached, mode, found)
    reading.warnings += unsupported(_with_values(reading, film, reached))
    return found, reading, reached


def _reached(reading: Reading, film: Film) -> set[str]:
    """Returns the ids of the nodes that the film depends on; of a sketch, of all nodes."""
    if reading.sketch:
        return set(reading.graph)
    ends = [node for node in (film.sampler, film.decode) if node is not None]
    reached = upstream(reading.graph, *ends, *(reading.graph[name] for name in reading.used))
    return reached | ({film.combine.id} if film.combine else set())


def _with_values(
    reading: Reading, film: Film, reached: set[str]
) -> list[tuple[Node, dict[str, Any]]]:
    """Returns the nodes of the film with the inputs that may be unsupported."""
    found = []
    for node in reading.graph.values():
        other = node.type == "VHS_VideoCombine" and node is not film.combine
        if node.id not in reached or other:
            continue
        values = {}
        for name in VALUES.get(node.type, {}):
            value = number_of(raw_of(reading, node, name))
            values[name] = value
        found.append((node, values))
    return found


def _files(reading: Reading, reached: set[str]) -> list[str]:
    """Returns the names of all model files that the film needs, as written.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, more of them than a graph can mean.
    """
    names: dict[str, None] = {}
    for node in reading.graph.values():
        for name in FILES.get(node.type, ()) if node.id in reached else ():
            value = raw_of(reading, node, name)
            if value is UNKNOWN or value is None:
                continue
            names[value if isinstance(value, str) else shown(value)] = None
            if len(names) > _MOST_FILES:
                raise refuse("Workflow names too many model files", "WORKFLOW_FORMAT")
    return list(names)


def _media(
    value: object, pictures: Mapping[str, str], input_files: Collection[str]
) -> dict[str, str]:
    """Returns a file of the graph as media of a request.

    Raises:
        InvalidRequest: MEDIA_NOT_FOUND.
    """
    if isinstance(value, str):
        if value in pictures:
            return {"base64": pictures[value]}
        if value[:5].lower() == "data:":
            return {"base64": value}
        if "://" in value:
            return {"url": value}
        if value.startswith("/") or value in input_files:
            return {"path": value}
    raise refuse(f"Workflow references missing input {shown(value)}", "MEDIA_NOT_FOUND")
