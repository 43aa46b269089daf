"""A ComfyUI graph in API format as plain data: nodes, links, and how they are followed.

A graph is text from a stranger. Nothing of it is run; links are followed in loops that remember
where they were, so that a circle or ten thousand nodes cost no more than a look at each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xicon_infer.errors import InvalidRequest

MAX_NODES = 10_000
"""Graphs that somebody drew have hundreds."""

MAX_ROW = 500
"""Nodes that are followed one after another; keeps the time of reading short."""

_SHOWN_CHARACTERS = 64
_KEPT_CHARACTERS = 61
_MOST_NAMES = 20

# Stopped early, so that a message never holds the text of a large value.
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=lambda value: type(value).__name__)


class Link(NamedTuple):
    """Where an input comes from: the id of a node and the number of its output."""

    node: str
    slot: int


@dataclass(frozen=True)
class Node:
    """One node: its id, its class, and input -> literal or link as written."""

    id: str
    type: str
    inputs: Mapping[str, Any] = field(repr=False)


Graph = Mapping[str, Node]
Look = Callable[[Node, Link], str | None]


def refuse(
    message: str, code: str = "WORKFLOW_UNSUPPORTED", field: str = "workflow"
) -> InvalidRequest:
    """Returns the error about a workflow."""
    return InvalidRequest(message, field=field, code=code)


def shown(value: object) -> str:
    """Returns a value as JSON text, cut to 61 characters if longer than 64; never fails."""
    if isinstance(value, str):
        value = value[: _SHOWN_CHARACTERS + 1]
    text = ""
    try:
        for piece in _ENCODER.iterencode(value):
            text += piece[: _SHOWN_CHARACTERS + 1]
            if len(text) > _SHOWN_CHARACTERS:
                break
    except (ValueError, TypeError, RecursionError):
        # An integer too long to print, a key that is no text, a nest too deep.
        text += "..."
    return cut(text)


def cut(text: str) -> str:
    """Returns a text, cut to 61 characters if longer than 64."""
    text = text[: _SHOWN_CHARACTERS + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_KEPT_CHARACTERS] + "..."


def names_text(names: set[str]) -> str:
    """Returns names in alphabetical order, separated by commas; only the first 20 of many."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_NAMES
    listed = ", ".join(cut(name) for name in ordered[:_MOST_NAMES])
    return f"{listed} and {more} more" if more > 0 else listed


def link_of(value: object) -> Link | None:
    """Returns the link that an input is, or None if it is a literal."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    node, slot = value
    if isinstance(node, bool) or not isinstance(node, str | int):
        return None
    if isinstance(slot, bool) or not isinstance(slot, int):
        return None
    return Link(_id_text(node), slot)


def _id_text(node: str | int) -> str:
    try:
        return str(node)
    except ValueError:  # more digits than Python prints
        return "?"


def read_nodes(graph: Mapping[str, Any]) -> dict[str, Node]:
    """Returns the nodes of a graph in API format, in its order.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, naming the first node that is none.
    """
    if len(graph) > MAX_NODES:
        message = f"Workflow has {len(graph)} nodes; at most {MAX_NODES} are read"
        raise refuse(message, "WORKFLOW_FORMAT")
    nodes = {}
    for key, value in graph.items():
        kind = value.get("class_type") if isinstance(value, Mapping) else None
        inputs = value.get("inputs") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or not isinstance(inputs, Mapping):
            message = f"Workflow node '{cut(str(key))}' has no class_type or inputs"
            raise refuse(message, "WORKFLOW_FORMAT")
        nodes[str(key)] = Node(str(key), kind, inputs)
    return nodes


def at(graph: Graph, link: Link) -> Node:
    """Returns the node that a link comes from.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, there is no such node.
    """
    if link.node not in graph:
        raise refuse(f"Workflow links to missing node '{cut(link.node)}'", "WORKFLOW_FORMAT")
    return graph[link.node]


def source(graph: Graph, node: Node, *names: str) -> tuple[Node, Link] | None:
    """Returns node and link of the first of these inputs that is a link, or None."""
    for name in names:
        link = link_of(node.inputs.get(name))
        if link is not None:
            return at(graph, link), link
    return None


def linked(node: Node, name: str) -> bool:
    """Returns True if the input comes from another node."""
    return link_of(node.inputs.get(name)) is not None


def chain(graph: Graph, start: tuple[Node, Link] | None, step: Look) -> Iterator[tuple[Node, Link]]:
    """Yields nodes from a first one upwards, as long as `step` names the input to follow.

    Args:
        graph: all nodes.
        start: the first node and the link that led to it.
        step: (node, link that led to it) -> name of the input to follow, or None to stop.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, the links form a circle or a row without end.
    """
    seen: set[Link] = set()
    while start is not None:
        node, link = start
        check_row(node, link, seen)
        yield node, link
        name = step(node, link)
        start = None if name is None else source(graph, node, name)


def check_row(node: Node, link: Link, seen: set[Link]) -> None:
    """Adds a link to those that were followed.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, it is one of them, or they are too many.
    """
    if link in seen:
        message = f"Workflow links form a circle at node '{cut(node.id)}'"
        raise refuse(message, "WORKFLOW_FORMAT")
    if len(seen) >= MAX_ROW:
        message = f"Workflow has more than {MAX_ROW} nodes in a row at node '{cut(node.id)}'"
        raise refuse(message, "WORKFLOW_FORMAT")
    seen.add(link)


def upstream(graph: Graph, *starts: Node) -> set[str]:
    """Returns the ids of these nodes and of everything they depend on."""
    seen = {node.id for node in starts}
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        for value in node.inputs.values():
            link = link_of(value)
            if link is not None and link.node in graph and link.node not in seen:
                seen.add(link.node)
                waiting.append(graph[link.node])
    return seen


def used_outputs(graph: Graph) -> set[str]:
    """Returns the ids of all nodes whose outputs some node takes."""
    links = (link_of(value) for node in graph.values() for value in node.inputs.values())
    return {link.node for link in links if link is not None}
