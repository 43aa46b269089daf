"""Graphs from strangers: any JSON is answered, names of nodes mean nothing, size costs little."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workflow_graphs import FILES, NAMES, load, renamed
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import import_graph, import_report
from xicon_infer.workflow_graph import MAX_NODES
from xicon_infer.workflow_nodes import IMPORTED, KNOWN
from xicon_infer.workflow_ui import ui_to_api
from xicon_infer.workflow_widgets import WIDGETS

SECONDS = 5.0
"""Far more than any of them takes, for a machine that does other things as well."""

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
IDS = st.sampled_from([str(number) for number in range(8)])
LINK = st.tuples(IDS, st.integers(-1, 5)).map(list)
SOCKETS = (
    *("model", "image_embeds", "text_embeds", "scheduler", "extra_args", "context_options"),
    *("samples", "images", "image", "embeds", "pose_images", "ref_image", "start_image", "lora"),
    *("prev_lora", "block_swap_args", "vae", "pose_latents_positive", "nlf_poses", "audio", "a"),
)
WIDGET_NAMES = sorted({name for widgets in WIDGETS.values() for name, _ in widgets})
INPUTS = st.dictionaries(st.sampled_from([*SOCKETS, *WIDGET_NAMES]), LINK | LINK | JSON, max_size=6)


def nodes(kinds):
    node = st.fixed_dictionaries({"class_type": st.sampled_from(kinds), "inputs": INPUTS})
    sampler = st.fixed_dictionaries({"class_type": st.just("WanVideoSampler"), "inputs": INPUTS})
    return st.dictionaries(IDS, node, max_size=8).flatmap(
        lambda graph: sampler.map(lambda one: {**graph, "0": one})
    )


def answered(function, *values, **known):
    """Returns what comes back, None for a refusal; anything else raised fails the test."""
    try:
        return function(*values, **known)
    except InvalidRequest as error:
        assert error.code.isupper()
        assert len(error.message) < 2500
        return None


@given(JSON, JSON)
def test_any_json_is_answered(graph, images):
    answered(import_graph, graph, images)
    answered(import_report, graph)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(nodes(sorted(KNOWN)))
def test_any_graph_of_known_nodes_is_answered(graph):
    answered(import_graph, graph, None, input_files=FILES)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(nodes(sorted(IMPORTED)))
def test_any_graph_of_the_importer_is_answered(graph):
    answered(import_report, graph)


@given(JSON, JSON, JSON)
def test_any_ui_export_is_answered(some, links, definitions):
    entries = some if isinstance(some, list) else [some]
    answered(ui_to_api, {"nodes": entries, "links": links, "definitions": definitions})


@given(
    st.lists(
        st.tuples(
            IDS,
            st.sampled_from([*WIDGETS, "Reroute", "SetNode", "GetNode"]),
            st.sampled_from([0, 2, 4]),
            st.lists(JSON, max_size=5),
        ),
        max_size=6,
    ),
    st.lists(
        st.tuples(st.integers(), IDS, st.integers(0, 3), IDS, st.integers(0, 3), st.just("*"))
    ),
)
def test_any_drawing_is_answered(drawn, links):
    graph = {
        "nodes": [
            {
                "id": name,
                "type": kind,
                "mode": mode,
                "widgets_values": values,
                "inputs": [{"name": "a", "type": "*"}] * 3,
                "outputs": [{"type": "*"}] * 3,
            }
            for name, kind, mode, values in drawn
        ],
        "links": [list(link) for link in links],
    }
    flat = answered(ui_to_api, graph)
    if flat:
        answered(import_report, flat)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_names_and_order_of_nodes_mean_nothing(name, seed):
    graph = load(f"{name}_api")
    order = list(graph)
    random.Random(seed).shuffle(order)
    before, after = import_report(graph), import_report(renamed(graph, order))
    assert (before.fields, before.options) == (after.fields, after.options)
    assert before.warnings == after.warnings == ()


def row(kind, name, length, end, start=0):
    """Returns nodes in a row, each fed by the next."""
    return {
        str(place): {
            "class_type": kind,
            "inputs": {name: [str(place + 1) if place < start + length - 1 else end, 0]},
        }
        for place in range(start, start + length)
    }


def sampler(**inputs):
    return {"class_type": "WanVideoSampler", "inputs": inputs}


MANY = MAX_NODES - 10
HOSTILE = {
    "films": {
        "s": sampler(),
        **{
            str(place): {"class_type": "VHS_VideoCombine", "inputs": {"images": ["s", 0]}}
            for place in range(MANY)
        },
    },
    "samplers": {str(place): sampler(samples=[str(place + 1), 0]) for place in range(MANY)},
    "constants": {"s": sampler(cfg=["0", 0]), **row("INTConstant", "value", MANY, "s")},
    "calculators": {
        "s": sampler(cfg=["0", 0]),
        **{
            str(place): {
                "class_type": "SimpleCalculatorKJ",
                "inputs": {"expression": "a*b", "a": [str(place + 1), 0], "b": [str(place + 1), 0]},
            }
            for place in range(30)
        },
        "30": {"class_type": "INTConstant", "inputs": {"value": 1}},
    },
    "pictures": {
        "s": sampler(image_embeds=["e", 0]),
        "e": {"class_type": "WanVideoAddSCAILPoseEmbeds", "inputs": {"pose_images": ["0", 0]}},
        **row("GetImageSizeAndCount", "image", MANY, "e"),
    },
    "sizes": {
        "s": sampler(image_embeds=["e", 0]),
        "e": {"class_type": "WanVideoEmptyEmbeds", "inputs": {"width": ["0", 1]}},
        **{
            str(place): {
                "class_type": "ImageResizeKJv2",
                "inputs": {"width": [str(place + 1), 1], "image": [str(place + 1), 0]},
            }
            for place in range(MANY)
        },
        str(MANY): {"class_type": "LoadImage", "inputs": {"image": "knight.png"}},
    },
    "loras": {
        "s": sampler(model=["m", 0]),
        "m": {"class_type": "WanVideoSetLoRAs", "inputs": {"model": ["l", 0], "lora": ["0", 0]}},
        "l": {"class_type": "WanVideoModelLoader", "inputs": {"model": "Wan2_1-T2V-14B.pt"}},
        **row("WanVideoLoraSelect", "prev_lora", MANY, "l"),
    },
    "files": {
        "s": sampler(),
        **{
            str(place): {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "x" * 900}}
            for place in range(MANY)
        },
    },
    "classes": {
        "s": sampler(),
        **{str(n): {"class_type": f"Strange{n}" * 40, "inputs": {}} for n in range(MANY)},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_large_graphs_are_answered_fast(name):
    for function in (import_graph, import_report):
        start = time.perf_counter()
        answered(function, HOSTILE[name])
        assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize("function", [import_graph, import_report])
def test_a_graph_that_nobody_drew_is_refused(function):
    graph = {str(place): sampler() for place in range(MAX_NODES + 1)}
    with pytest.raises(InvalidRequest, match="at most 10000 are read"):
        function(graph)


@pytest.mark.parametrize("name", ["model", "image_embeds", "text_embeds", "samples"])
def test_a_node_that_feeds_itself_is_refused(name):
    assert answered(import_report, {"s": sampler(**{name: ["s", 0]})}) is None


def test_subgraphs_that_multiply_are_refused():
    levels = [
        {"id": f"S{level}", "nodes": [{"id": n, "type": f"S{level + 1}"} for n in range(30)]}
        for level in range(12)
    ]
    graph = {"nodes": [{"id": 1, "type": "S0"}], "definitions": {"subgraphs": levels}}
    with pytest.raises(InvalidRequest, match="more than 10000 nodes"):
        ui_to_api(graph)


def test_a_reroute_that_many_take_is_followed_once():
    count = MAX_NODES // 2 - 5
    reroutes = [{"id": n, "type": "Reroute", "inputs": [{"name": ""}]} for n in range(count)]
    takers = [{"id": f"x{n}", "type": "End", "inputs": [{"name": "a"}]} for n in range(count)]
    links = [[n, n + 1, 0, n, 0, "*"] for n in range(count - 1)]
    links += [[count + n, 0, 0, f"x{n}", 0, "*"] for n in range(count)]
    start = time.perf_counter()
    ui_to_api({"nodes": reroutes + takers, "links": links})
    assert time.perf_counter() - start < SECONDS
