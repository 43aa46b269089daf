"""Where things are in a ComfyUI graph: the sampler of the film, its embeds, pictures and videos.

Links decide. A graph in which the sampler has no model is a sketch, as people write them by hand:
there a node that nothing takes the output of is still meant, if it is the only one of its kind.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow_graph import (
    Graph,
    Link,
    Node,
    chain,
    cut,
    link_of,
    linked,
    names_text,
    refuse,
    source,
    used_outputs,
)
from xicon_infer.workflow_nodes import (
    COMBINES,
    DRAWERS,
    IMAGE_STEPS,
    IMPORTED,
    PICTURES,
    POSE_STEPS,
    SAMPLERS,
    VIDEOS,
)
from xicon_infer.workflow_values import Memo

_MOST_SAMPLERS = 8
_MOST_COMBINES = 64
_MOST_POSE_STEPS = 16
"""More of them is no graph that somebody drew; the limits keep the time of reading short."""

EMBEDS: Mapping[str, str] = {
    "WanVideoAddSCAILPoseEmbeds": "scail",
    "WanVideoAddSCAILReferenceEmbeds": "scail",
    "WanVideoAddSteadyDancerEmbeds": "steady_dancer",
    "WanVideoImageToVideoEncode": "wan_i2v",
    "WanVideoImageClipEncode": "wan_i2v",
    "WanVideoEmptyEmbeds": "wan_t2v",
}
"""Class -> mode it stands for; the first in this order that a graph has decides."""

_ADDING = tuple(name for name in EMBEDS if name.startswith("WanVideoAdd"))
"""Classes that add to embeds they are given."""


@dataclass
class Reading:
    """A graph that is being read.

    strict: as the request contract says; else as the command line importer does. sketch: nothing
    gives the sampler a model. used: ids of nodes something was read from. warnings: so far.
    """

    graph: Graph
    strict: bool
    sketch: bool = False
    used: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    memo: Memo = field(default_factory=dict)

    def of(self, *types: str) -> list[Node]:
        """Returns all nodes of these classes."""
        return [node for node in self.graph.values() if node.type in types]


@dataclass(frozen=True)
class Film:
    """The nodes that make the film: sampler, decoder, and what writes the file."""

    sampler: Node
    decode: Node | None
    combine: Node | None
    between: tuple[str, ...] = ()


def find_film(reading: Reading) -> Film:
    """Returns the sampler whose film is the result, with its decoder and writer.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, no sampler, or several films.
    """
    samplers = reading.of(*SAMPLERS)
    if not samplers:
        raise refuse("Workflow has no WanVideoSampler")
    if len(samplers) > _MOST_SAMPLERS:
        message = f"Workflow has {len(samplers)} samplers; keep the one that makes the film"
        raise refuse(message)
    takers = _takers(reading.graph)
    paths = [(sampler, *_downstream(reading.graph, sampler, takers)) for sampler in samplers]
    last = [path for path in paths if not path[2]] or paths
    ending = [path for path in last if any(node.type in COMBINES for node in path[1])] or last
    saving = [path for path in ending if _saves(path[1])] or ending
    if len(saving) > 1:
        ids = names_text({path[0].id for path in saving})
        raise refuse(f"Workflow makes several films (samplers {ids}); keep one of them")
    sampler, after, _ = saving[0]
    if len(samplers) > 1 and reading.strict is False:
        others = names_text({node.id for node in samplers} - {sampler.id})
        reading.warnings.append(f"samplers {others} are left out: only one film is made")
    reading.sketch = not linked(sampler, "model")
    return _film(reading, sampler, after)


def _takers(graph: Graph) -> dict[str, list[Node]]:
    """Returns id -> the nodes that take an output of it."""
    takers: dict[str, list[Node]] = {}
    for node in graph.values():
        links = {link.node for value in node.inputs.values() if (link := link_of(value))}
        for name in links:
            takers.setdefault(name, []).append(node)
    return takers


def _downstream(
    graph: Graph, sampler: Node, takers: Mapping[str, list[Node]]
) -> tuple[list[Node], bool]:
    """Returns what depends on a sampler, nearest first, and whether another sampler does."""
    found: list[Node] = []
    seen, waiting, feeds = {sampler.id}, [sampler], False
    for node in waiting:
        for taker in takers.get(node.id, ()):
            if taker.id in seen:
                continue
            seen.add(taker.id)
            if taker.type in SAMPLERS:
                feeds = True
                continue
            found.append(taker)
            waiting.append(taker)
    return found, feeds


def _saves(nodes: Iterable[Node]) -> bool:
    return any(node.type in COMBINES and node.inputs.get("save_output", True) for node in nodes)


def _film(reading: Reading, sampler: Node, after: list[Node]) -> Film:
    """Returns the film of a sampler: of several writers the nearest to the decoder, then saved."""
    combines = [node for node in after if node.type in COMBINES]
    if not combines and reading.sketch:
        combines = alone(reading, COMBINES)
    if len(combines) > _MOST_COMBINES:
        raise refuse(f"Workflow writes {len(combines)} films; keep the one that is meant")
    ranked = []
    for node in combines:
        steps = list(chain(reading.graph, source(reading.graph, node, "images"), _image_step))
        direct = bool(steps) and steps[-1][0].type in ("WanVideoDecode", *SAMPLERS)
        near = after.index(node) if node in after else 0
        ranked.append((not direct, not _saves([node]), near, node))
    # Equal ranks are told apart by content, so that the names of nodes do not matter.
    ranked.sort(key=lambda one: (*one[:3], content(one[3])))
    combine = ranked[0][3] if ranked else None
    decodes = [node for node in after if node.type == "WanVideoDecode"]
    if not decodes and reading.sketch:
        decodes = alone(reading, ["WanVideoDecode"])
    between: set[str] = set()
    if ranked and ranked[0][0]:
        before = {node.id for node in _upstream_in(reading.graph, ranked[0][3], after)}
        between = {node.type for node in after if node.id in before} - {"WanVideoDecode", *COMBINES}
        between.discard("WanVideoSamplerFromSettings")
    decodes.sort(key=content)
    return Film(sampler, decodes[0] if decodes else None, combine, tuple(sorted(between)))


def _upstream_in(graph: Graph, start: Node, allowed: list[Node]) -> list[Node]:
    ids = {node.id for node in allowed}
    found, seen = [start], {start.id}
    for node in found:
        for value in node.inputs.values():
            link = link_of(value)
            if link and link.node in ids and link.node not in seen:
                seen.add(link.node)
                found.append(graph[link.node])
    return found


def content(node: Node) -> str:
    """Returns what a node says apart from ids, as a key to sort by."""
    literals = {
        str(name): "link" if link_of(value) else value for name, value in node.inputs.items()
    }
    try:
        return node.type + json.dumps(literals, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError):
        return node.type


def alone(reading: Reading, types: Collection[str], *, taken: bool = False) -> list[Node]:
    """Returns the nodes of these classes that nothing takes the output of.

    Args:
        reading: the graph.
        types: classes.
        taken: those too that something takes an output of.
    """
    found = reading.of(*types)
    if taken or not found:
        return found
    used = used_outputs(reading.graph)
    return [node for node in found if node.id not in used]


def only_one(nodes: list[Node]) -> Node | None:
    """Returns the only node, or None for none.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, nodes that differ: none of them is connected.
    """
    if len({content(node) for node in nodes}) > 1:
        what = names_text({node.type for node in nodes})
        ids = names_text({node.id for node in nodes})
        raise refuse(f"Workflow has several {what} nodes ({ids}); connect the one to use")
    return nodes[0] if nodes else None


def find_embeds(reading: Reading, sampler: Node) -> dict[str, Node]:
    """Returns class -> node of the embeds that the sampler is given.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, an embed that this project does not know.
    """
    found: dict[str, Node] = {}
    start = source(reading.graph, sampler, "image_embeds")
    for node, _ in chain(reading.graph, start, _embed_step):
        if node.type not in EMBEDS:
            raise refuse(f"Workflow uses unsupported nodes: {cut(node.type)}")
        found.setdefault(node.type, node)
    if reading.sketch:
        for name in EMBEDS:
            lone = None if name in found else only_one(alone(reading, [name]))
            if lone is not None:
                found[name] = lone
    return found


def _embed_step(node: Node, _: Link) -> str | None:
    return "embeds" if node.type in _ADDING else None


def _image_step(node: Node, _: Link) -> str | None:
    return IMAGE_STEPS.get(node.type)


def image_chain(reading: Reading, start: tuple[Node, Link] | None) -> list[tuple[Node, Link]]:
    """Returns the nodes from where a picture is taken back to where it is loaded or made."""
    return list(chain(reading.graph, start, _image_step))


def find_picture(reading: Reading, node: Node | None, *names: str) -> list[tuple[Node, Link]]:
    """Returns the way of a picture to its loader, the loader last; empty if nothing is connected.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, the picture is made by something else.
    """
    start = source(reading.graph, node, *names) if node else None
    steps = image_chain(reading, start)
    if steps and steps[-1][0].type not in PICTURES:
        raise refuse_maker(steps[-1][0], "a picture")
    return steps


def find_video(reading: Reading, node: Node | None, *names: str) -> tuple[Node | None, Node | None]:
    """Returns the loader of the video behind pose pictures, and the node that draws them.

    No drawing node means that the video shows poses already.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, the pictures come from something else.
    """
    drawer = None
    steps = image_chain(reading, source(reading.graph, node, *names) if node else None)
    for _ in range(_MOST_POSE_STEPS):
        if not steps:
            return None, drawer
        last = steps[-1][0]
        if last.type in VIDEOS:
            return last, drawer
        if last.type in DRAWERS:
            drawer = last
        if last.type == "WanVideoEncode":
            inputs: tuple[str, ...] = ("image", "driving_video")
        else:
            inputs = POSE_STEPS.get(last.type, ())
        if not inputs:
            raise refuse_maker(last, "the driving video")
        steps = image_chain(reading, source(reading.graph, last, *inputs))
    raise refuse("Workflow links form a circle", "WORKFLOW_FORMAT")


def refuse_maker(node: Node, what: str) -> InvalidRequest:
    """Returns the error about a node that makes what has to be loaded."""
    if node.type not in IMPORTED:
        return refuse(f"Workflow uses unsupported nodes: {cut(node.type)}")
    place = f"Workflow node '{cut(node.id)}' ({cut(node.type)})"
    return refuse(f"{place} makes {what}; only a file that is loaded is supported")
