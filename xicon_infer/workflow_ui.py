"""From a ComfyUI UI export to API format: what ComfyUI's own "Save (API format)" would write.

Reroutes, Set and Get nodes, primitives, muted and bypassed nodes, notes and subgraphs are gone
from the result; links end at nodes that compute something. For the command line importer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xicon_infer.workflow_graph import MAX_NODES, cut, refuse
from xicon_infer.workflow_widgets import widget_inputs

_MUTED, _BYPASSED = 2, 4
_VIRTUAL = ("Reroute", "ReroutePrimitive|pysssss", "SetNode", "GetNode", "PrimitiveNode")
_NOTES = (
    *("Note", "MarkdownNote", "Label", "Label (rgthree)"),
    *("Fast Groups Muter (rgthree)", "Fast Groups Bypasser (rgthree)"),
)
_MAX_DEPTH = 16
_INLET = "#in"
_INSIDE, _OUTSIDE = "-10", "-20"
"""Ids of the ends of a subgraph: where its inputs come from and its outputs go to."""


class _Origin(NamedTuple):
    node: str
    slot: int


@dataclass
class _Flat:
    """All nodes of an export with unique ids, and for each input where it comes from.

    nodes: id -> node. origins: (id, position of the input) -> origin. setters: name of a SetNode
    -> its id, by subgraph. scopes: id -> prefix of the subgraph it is in. outlets: (id of a
    subgraph node, output) -> origin inside it. values: (id, input) -> value that a widget of a
    subgraph node has. resolved: origins that were looked up.
    """

    nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: dict[tuple[str, int], _Origin] = field(default_factory=dict)
    scopes: dict[str, str] = field(default_factory=dict)
    setters: dict[tuple[str, str], str] = field(default_factory=dict)
    outlets: dict[tuple[str, int], _Origin] = field(default_factory=dict)
    values: dict[tuple[str, int], Any] = field(default_factory=dict)
    subgraphs: set[str] = field(default_factory=set)
    resolved: dict[_Origin, Any] = field(default_factory=dict)


class Converted(NamedTuple):
    """A graph in API format, and what could not be read exactly."""

    graph: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]


def is_ui(graph: object) -> bool:
    """Returns True for a UI export: it has a list of nodes."""
    return isinstance(graph, Mapping) and isinstance(graph.get("nodes"), list)


def ui_to_api(graph: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns a UI export in API format.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, the export is damaged or without end.
    """
    return convert(graph).graph


def convert(graph: Mapping[str, Any]) -> Converted:
    """Returns a UI export in API format, and warnings about widgets that are not known.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, the export is damaged or without end.
    """
    flat = _Flat()
    _add(flat, graph, _definitions(graph), "", 0)
    warnings: list[str] = []
    result: dict[str, dict[str, Any]] = {}
    for name, node in flat.nodes.items():
        if _is_real(flat, name):
            inputs = widget_inputs(node, warnings)
            inputs |= _linked_inputs(flat, name, node)
            result[name] = {"class_type": str(node["type"]), "inputs": inputs}
    return Converted(result, tuple(dict.fromkeys(warnings)))


def _definitions(graph: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns id -> subgraph."""
    definitions = graph.get("definitions")
    listed = definitions.get("subgraphs") if isinstance(definitions, Mapping) else None
    found = [one for one in _entries(listed) if isinstance(one, Mapping)]
    return {one["id"]: one for one in found if isinstance(one.get("id"), str)}


def _entries(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _add(
    flat: _Flat,
    graph: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
    prefix: str,
    depth: int,
) -> None:
    """Adds the nodes of a graph and, with longer ids, those of the subgraphs in it."""
    if depth > _MAX_DEPTH:
        raise refuse("Workflow has subgraphs in one another without end", "WORKFLOW_FORMAT")
    for node in _entries(graph.get("nodes")):
        kind = node.get("type") if isinstance(node, Mapping) else None
        if not isinstance(kind, str) or not isinstance(node.get("id"), str | int):
            raise refuse("Workflow has a node without id or type", "WORKFLOW_FORMAT")
        name = prefix + _text(node["id"])
        flat.nodes[name] = node
        flat.scopes[name] = prefix
        if len(flat.nodes) > MAX_NODES:
            raise refuse(f"Workflow has more than {MAX_NODES} nodes", "WORKFLOW_FORMAT")
        title = _first_value(node)
        if kind == "SetNode" and isinstance(title, str) and _mode(node) not in (_MUTED,):
            flat.setters[prefix, title] = name
        if kind in definitions:
            flat.subgraphs.add(name)
            _own_values(flat, name, node)
            _add(flat, definitions[kind], definitions, f"{name}:", depth + 1)
    for link in _entries(graph.get("links")):
        _add_link(flat, link, prefix)


def _add_link(flat: _Flat, link: object, prefix: str) -> None:
    """Notes where a link comes from; links are lists, in newer exports objects."""
    if isinstance(link, Mapping):
        names = ("origin_id", "origin_slot", "target_id", "target_slot")
        parts = [link.get(name) for name in names]
    elif isinstance(link, list) and len(link) >= 5:
        parts = link[1:5]
    else:
        return
    if not all(isinstance(part, str | int) and not isinstance(part, bool) for part in parts):
        return
    origin, from_slot, target, to_slot = parts
    if not isinstance(from_slot, int) or not isinstance(to_slot, int):
        return
    outer = prefix[:-1]
    start = _Origin(prefix + _text(origin), from_slot)
    if _text(origin) == _INSIDE:
        start = _Origin(outer + _INLET, from_slot)
    if _text(target) == _OUTSIDE:
        flat.outlets[outer, to_slot] = start
    else:
        flat.origins[prefix + _text(target), to_slot] = start


def _own_values(flat: _Flat, name: str, node: Mapping[str, Any]) -> None:
    """Notes the values that widgets on the outside of a subgraph have, by input."""
    properties = node.get("properties")
    proxies = properties.get("proxyWidgets") if isinstance(properties, Mapping) else None
    inputs = [entry for entry in _entries(node.get("inputs")) if isinstance(entry, Mapping)]
    names = [entry.get("name") for entry in inputs]
    positions = {one: slot for slot, one in enumerate(names) if isinstance(one, str)}
    shown = [entry.get("name") for entry in inputs if isinstance(entry.get("widget"), Mapping)]
    if isinstance(proxies, list):
        pairs = [pair for pair in proxies if isinstance(pair, list) and len(pair) == 2]
        shown = [pair[1] if _text(pair[0]) == "-1" else None for pair in pairs]
    for widget, value in zip(shown, _entries(node.get("widgets_values")), strict=False):
        if isinstance(widget, str) and widget in positions:
            flat.values[name, positions[widget]] = value


def _text(value: object) -> str:
    try:
        return str(value)[:100]
    except ValueError:  # an integer with more digits than Python prints
        return "?"


def _mode(node: Mapping[str, Any]) -> object:
    return node.get("mode")


def _first_value(node: Mapping[str, Any]) -> Any:
    values = node.get("widgets_values")
    return values[0] if isinstance(values, list) and values else None


def _is_real(flat: _Flat, name: str) -> bool:
    """Returns True for a node that computes something and is switched on, with all around it."""
    node = flat.nodes[name]
    if node["type"] in (*_VIRTUAL, *_NOTES) or name in flat.subgraphs:
        return False
    return not any(_mode(flat.nodes[one]) in (_MUTED, _BYPASSED) for one in _around(flat, name))


def _around(flat: _Flat, name: str) -> Iterator[str]:
    """Yields a node and the subgraph nodes it is in."""
    while name:
        yield name
        name = flat.scopes[name][:-1]


def _linked_inputs(flat: _Flat, name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns input -> [node, slot], or the value of a primitive; links to nothing are left out."""
    found = {}
    for slot, entry in enumerate(_entries(node.get("inputs"))):
        label = entry.get("name") if isinstance(entry, Mapping) else None
        if isinstance(label, str) and (name, slot) in flat.origins:
            value = _resolve(flat, flat.origins[name, slot])
            if value is not None:
                found[label] = list(value) if isinstance(value, list) else value
    return found


def _resolve(flat: _Flat, origin: _Origin) -> Any:
    """Returns [node, slot] of the node that computes an output, or a primitive's value, or None.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, the links form a circle.
    """
    seen: dict[_Origin, None] = {}
    here: _Origin | None = origin
    value: Any = None
    while here is not None and here not in flat.resolved:
        if here in seen:
            message = f"Workflow links form a circle at node '{cut(here.node)}'"
            raise refuse(message, "WORKFLOW_FORMAT")
        seen[here] = None
        value, here = _step(flat, here)
    if here is not None:
        value = flat.resolved[here]
    flat.resolved.update(dict.fromkeys(seen, value))
    return value


def _step(flat: _Flat, origin: _Origin) -> tuple[Any, _Origin | None]:
    """Returns what an output gives, or where to look further."""
    if origin.node.endswith(_INLET):
        outer = origin.node.removesuffix(_INLET), origin.slot
        return flat.values.get(outer), flat.origins.get(outer)
    node = flat.nodes.get(origin.node)
    if node is None:
        return None, None
    if _is_real(flat, origin.node):
        return [origin.node, origin.slot], None
    if node["type"] == "PrimitiveNode":
        return _first_value(node), None
    return None, _before(flat, origin, node)


def _before(flat: _Flat, origin: _Origin, node: Mapping[str, Any]) -> _Origin | None:
    """Returns where the output of a node that computes nothing comes from."""
    name, kind = origin.node, node["type"]
    mode = _mode(node)
    if mode == _MUTED:
        return None
    if kind == "GetNode":
        setter = flat.setters.get((flat.scopes[name], str(_first_value(node))))
        return flat.origins.get((setter, 0)) if setter is not None else None
    if kind in _VIRTUAL:
        return flat.origins.get((name, 0))
    if mode == _BYPASSED:
        return _bypass(flat, origin, node)
    if name in flat.subgraphs:
        return flat.outlets.get((name, origin.slot))
    return None


def _bypass(flat: _Flat, origin: _Origin, node: Mapping[str, Any]) -> _Origin | None:
    """Returns the input that a bypassed node passes on: the same place or the first of the type."""
    outputs, inputs = _entries(node.get("outputs")), _entries(node.get("inputs"))
    if not 0 <= origin.slot < len(outputs):
        return None
    wanted = _kind(outputs[origin.slot])
    slots = [slot for slot, entry in enumerate(inputs) if _kind(entry) in (wanted, "*")]
    if origin.slot in slots:
        slots.insert(0, origin.slot)
    linked = [slot for slot in slots if (origin.node, slot) in flat.origins]
    return flat.origins[origin.node, linked[0]] if linked else None


def _kind(entry: object) -> str | None:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    return kind if isinstance(kind, str) else None
