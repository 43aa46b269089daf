"""UI exports: the same graph drawn in the browser gives the same request."""

from __future__ import annotations

import copy

import pytest

from tests.workflow_graphs import NAMES, load
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import import_report
from xicon_infer.workflow_nodes import DEFAULTS, IMPORTED, KNOWN
from xicon_infer.workflow_ui import convert, is_ui, ui_to_api
from xicon_infer.workflow_widgets import WIDGETS, widget_inputs

WITHOUT_WIDGETS = {"PoseDetectionVitPoseToDWPose"}


def node_of(graph, number):
    return next(node for node in graph["nodes"] if node["id"] == number)


def changed(name, number, **values):
    graph = load(f"{name}_ui")
    node_of(graph, number).update(values)
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_mean_the_same(name):
    drawn, exported = convert(load(f"{name}_ui")), import_report(load(f"{name}_api"))
    imported = import_report(drawn.graph)
    assert drawn.warnings == ()
    assert imported.fields == exported.fields
    assert imported.options == exported.options
    assert imported.warnings == exported.warnings == ()


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_told_from_an_api_graph(name):
    assert is_ui(load(f"{name}_ui"))
    assert not is_ui(load(f"{name}_api"))


def test_only_nodes_that_compute_are_left():
    graph = ui_to_api(load("scail_ui"))
    kinds = {node["class_type"] for node in graph.values()}
    assert not kinds & {"SetNode", "GetNode", "Reroute", "Note", "MarkdownNote"}
    assert {"70", "71", "72"}.isdisjoint(graph)


def test_links_end_at_the_node_that_computes():
    graph = ui_to_api(load("scail_ui"))
    assert graph["5"]["inputs"]["width"] == ["3", 0]
    assert graph["42"]["inputs"]["ref_image"] == ["5", 0]
    assert graph["55"]["inputs"]["model"] == ["25", 0]
    assert "feta_args" not in graph["52"]["inputs"]


def test_a_bypassed_node_that_is_switched_on_counts():
    graph = ui_to_api(changed("scail", 70, mode=0))
    assert graph["55"]["inputs"]["model"] == ["70", 0]
    told = import_report(graph).warnings
    assert any("WanVideoSetRadialAttention" in warning for warning in told)


def test_a_muted_node_gives_nothing():
    graph = ui_to_api(changed("scail", 70, mode=2))
    assert "model" not in graph["55"]["inputs"]


def test_a_bypassed_lora_is_not_used():
    graph = ui_to_api(changed("scail", 23, mode=4))
    assert [lora["strength"] for lora in import_report(graph).fields["loras"]] == [1]


def test_bypassing_takes_the_input_of_the_same_type():
    graph = {
        "nodes": [
            {"id": 1, "type": "LoadImage", "outputs": [{"type": "IMAGE"}]},
            {"id": 2, "type": "LoadMask", "outputs": [{"type": "MASK"}]},
            {
                "id": 3,
                "type": "Filter",
                "mode": 4,
                "inputs": [{"name": "m", "type": "MASK"}, {"name": "i", "type": "IMAGE"}],
                "outputs": [{"type": "IMAGE"}, {"type": "OTHER"}],
            },
            {"id": 4, "type": "End", "inputs": [{"name": "a"}, {"name": "b"}]},
        ],
        "links": [
            [1, 2, 0, 3, 0, ""],
            [2, 1, 0, 3, 1, ""],
            [3, 3, 0, 4, 0, ""],
            [4, 3, 1, 4, 1, ""],
        ],
    }
    assert ui_to_api(graph)["4"]["inputs"] == {"a": ["1", 0]}


def test_a_subgraph_is_laid_flat():
    graph = ui_to_api(load("steady_dancer_ui"))
    assert graph["56"]["inputs"]["samples"] == ["90:55", 0]
    inputs = graph["90:54"]["inputs"]
    assert inputs["model"] == ["25", 0]
    assert (inputs["steps"], inputs["scheduler"]) == (5, "unipc")
    assert (inputs["seed"], inputs["shift"]) == (12, 3)
    assert inputs["cfg"] == 2.5
    assert "90" not in graph


def test_values_on_the_outside_of_a_subgraph_count():
    graph = ui_to_api(changed("steady_dancer", 90, widgets_values=[17, "lcm"]))
    assert import_report(graph).fields["steps"] == 17
    plain = changed("steady_dancer", 90, properties={}, widgets_values=[2.5, 19, "lcm"])
    assert import_report(ui_to_api(plain)).fields["steps"] == 19


def test_a_muted_subgraph_is_gone():
    graph = ui_to_api(changed("steady_dancer", 90, mode=2))
    assert not [name for name in graph if name.startswith("90")]


def test_get_nodes_read_the_set_node_of_their_own_graph():
    inner = {
        "id": "S",
        "nodes": [
            {"id": 1, "type": "SetNode", "widgets_values": ["x"], "inputs": [{"name": "v"}]},
            {"id": 2, "type": "GetNode", "widgets_values": ["x"]},
            {"id": 3, "type": "INTConstant", "widgets_values": [5]},
        ],
        "links": [
            {"id": 1, "origin_id": 3, "origin_slot": 0, "target_id": 1, "target_slot": 0},
            {"id": 2, "origin_id": 2, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }
    graph = {
        "nodes": [
            {"id": 7, "type": "S"},
            {"id": 8, "type": "GetNode", "widgets_values": ["x"]},
            {"id": 9, "type": "End", "inputs": [{"name": "a"}, {"name": "b"}]},
        ],
        "links": [[1, 7, 0, 9, 0, "*"], [2, 8, 0, 9, 1, "*"]],
        "definitions": {"subgraphs": [inner]},
    }
    assert ui_to_api(graph)["9"]["inputs"] == {"a": ["7:3", 0]}


def test_control_words_plots_and_previews_are_no_values():
    node = {"type": "WanVideoSamplerv2", "widgets_values": [6, 11, "randomize", False, True]}
    values = {"cfg": 6, "seed": 11, "force_offload": False, "add_noise_to_samples": True}
    assert widget_inputs(node, []) == values
    node["widgets_values"].remove("randomize")
    assert widget_inputs(node, []) == values
    node = {"type": "WanVideoScheduler", "widgets_values": ["lcm", 4, 5, 0, -1, "<img src='x'>"]}
    assert widget_inputs(node, [])["end_step"] == -1
    node = {"type": "VHS_LoadVideo", "widgets_values": {"video": "a", "videopreview": {}}}
    assert widget_inputs(node, []) == {"video": "a"}


def test_names_beside_the_values_win_over_the_table():
    names = ["positive_prompt", "new_switch", "negative_prompt"]
    node = {
        "type": "WanVideoTextEncode",
        "inputs": [{"name": name, "widget": {"name": name}} for name in names],
        "widgets_values": ["a", True, "b"],
    }
    warnings = []
    values = {"positive_prompt": "a", "new_switch": True, "negative_prompt": "b"}
    assert widget_inputs(node, warnings) == values
    assert warnings == []


def test_widgets_of_another_version_are_told():
    node = {"id": 3, "type": "WanVideoEmptyEmbeds", "widgets_values": ["wide", 480, 81, 7, 8]}
    warnings = []
    assert widget_inputs(node, warnings) == {"height": 480, "num_frames": 81}
    assert warnings == [
        "node 3 WanVideoEmptyEmbeds: its widgets are not those of the version known here; read: "
        "height, num_frames"
    ]


def test_older_exports_have_fewer_widgets():
    node = {"type": "WanVideoTextEncode", "widgets_values": ["a", "b", True]}
    assert widget_inputs(node, []) == {
        "positive_prompt": "a",
        "negative_prompt": "b",
        "force_offload": True,
    }


def test_every_known_class_has_its_widgets():
    assert KNOWN - WIDGETS.keys() == WITHOUT_WIDGETS
    assert WIDGETS.keys() <= IMPORTED | {"ImageConcatMulti"}
    for kind, inputs in DEFAULTS.items():
        widgets = {name for name, _ in WIDGETS.get(kind, ())}
        if kind not in ("VHS_VideoCombine", "VHS_LoadVideoFFmpeg", "VHS_LoadVideoFFmpegPath"):
            assert set(inputs) <= widgets, kind


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"nodes": [{"id": 1}]}, "without id or type"),
        ({"nodes": [3]}, "without id or type"),
        ({"nodes": [{"id": [], "type": "A"}]}, "without id or type"),
        (
            {
                "nodes": [{"id": 1, "type": "S"}],
                "definitions": {"subgraphs": [{"id": "S", "nodes": [{"id": 1, "type": "S"}]}]},
            },
            "without end",
        ),
        (
            {
                "nodes": [
                    {"id": 1, "type": "Reroute", "inputs": [{"name": ""}]},
                    {"id": 2, "type": "End", "inputs": [{"name": "a"}]},
                ],
                "links": [[1, 1, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]],
            },
            "circle",
        ),
    ],
)
def test_damaged_exports_are_refused(graph, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        ui_to_api(graph)
    assert caught.value.code == "WORKFLOW_FORMAT"


def test_the_export_is_not_changed():
    graph = load("steady_dancer_ui")
    before = copy.deepcopy(graph)
    ui_to_api(graph)
    assert graph == before
