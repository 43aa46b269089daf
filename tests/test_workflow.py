"""Graphs in a request: the checks of the contract in their order, with their texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workflow_graphs import FILES, load, with_input, with_node
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import import_graph
from xicon_infer.workflow_nodes import IMPORTED, KNOWN, SIDE

CASES = json.loads((Path(__file__).parent / "golden/serving/cases.json").read_text())["cases"]
GOLDEN = [case for case in CASES if "workflow" in (case["job"].get("input") or "")]
SAMPLER = {"9": {"class_type": "WanVideoSampler", "inputs": {}}}
SHAPE = "'images' must be a list of objects with 'name' and 'image' keys"


def refused(graph, images=None, **known):
    with pytest.raises(InvalidRequest) as caught:
        import_graph(graph, images, **known)
    return f"{caught.value.message} [{caught.value.code}]"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
def test_golden_cases(case):
    given, expected = case["job"]["input"], case["expect"]
    known = {"input_files": case["context"].get("input_files", ())}
    if expected["outcome"] == "reject":
        assert refused(given["workflow"], given.get("images"), **known) == expected["error"]
        return
    fields = import_graph(given["workflow"], given.get("images"), **known)
    for name, value in expected["resolved"].items():
        if isinstance(value, dict):
            value = {value["kind"]: value["value"]}
        assert fields[name] == value, name


def test_there_are_golden_cases_of_both_outcomes():
    assert {case["expect"]["outcome"] for case in GOLDEN} == {"accept", "reject"}


@pytest.mark.parametrize("text", ["{", "nonsense", "[" * 100_000, '{"a": 1,}'])
def test_text_must_be_json(text):
    assert refused(text) == "Invalid JSON format in 'workflow' [INVALID_JSON]"


def test_a_graph_may_be_text():
    graph = load("scail_api")
    known = {"input_files": FILES}
    assert import_graph(json.dumps(graph), **known) == import_graph(graph, **known)


@pytest.mark.parametrize("graph", [{}, [], None, 5, "{}", "[1]", "null"])
def test_it_must_be_an_object_with_nodes(graph):
    assert refused(graph) == "'workflow' must be a non-empty object [WORKFLOW_FORMAT]"


def test_ui_exports_are_refused():
    message = "Workflow is in UI format; export it in API format [WORKFLOW_FORMAT]"
    assert refused(load("scail_ui")) == message


@pytest.mark.parametrize(
    "images", [{}, "x", [1], [{}], [{"name": "a"}], [{"name": 1, "image": "x"}], [None]]
)
def test_images_have_names(images):
    assert refused(SAMPLER, images) == f"{SHAPE} [INVALID_TYPE]"


@pytest.mark.parametrize(
    "node", [None, 3, {}, {"class_type": "A"}, {"class_type": 1, "inputs": {}}, {"inputs": {}}]
)
def test_every_node_has_a_class_and_inputs(node):
    message = "Workflow node '1' has no class_type or inputs [WORKFLOW_FORMAT]"
    assert refused({"1": node, **SAMPLER}) == message


def test_unknown_classes_are_named_sorted_and_once():
    graph = {
        str(place): {"class_type": kind, "inputs": {}}
        for place, kind in enumerate(("KSampler", "CLIPTextEncode", "KSampler"))
    }
    message = "Workflow uses unsupported nodes: CLIPTextEncode, KSampler [WORKFLOW_UNSUPPORTED]"
    assert refused({**graph, **SAMPLER}) == message


def test_a_blank_of_a_template_is_named():
    graph = with_input(load("scail_api"), 3, "value", "{{width}}")
    message = "Workflow contains unreplaced placeholder '{{width}}' [WORKFLOW_PLACEHOLDER]"
    assert refused(graph) == message
    fine = with_input(load("scail_api"), 50, "positive_prompt", "a {{width}} b")
    assert import_graph(fine, input_files=FILES)["prompt"] == "a {{width}} b"


def test_there_is_a_sampler():
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
    assert refused(graph) == "Workflow has no WanVideoSampler [WORKFLOW_UNSUPPORTED]"


@pytest.mark.parametrize(("missing", "name"), [("knight.png", "image"), ("dance.mp4", "video")])
def test_files_are_there(missing, name):
    files = [file for file in FILES if file != missing]
    message = f'Workflow references missing input "{missing}" [MEDIA_NOT_FOUND]'
    assert refused(load("scail_api"), input_files=files) == message
    assert import_graph(load("scail_api"), input_files=FILES)[name] == {"path": missing}


def test_pictures_come_with_the_request_or_from_a_url_or_a_path():
    graph = load("wan_i2v_api")
    images = [{"name": "knight.png", "image": "AAAA"}, {"name": "b", "image": "BBBB"}]
    assert import_graph(graph, images)["image"] == {"base64": "AAAA"}
    places = {
        "https://example.com/a.png": {"url": "https://example.com/a.png"},
        "ftp://example.com/a.png": {"url": "ftp://example.com/a.png"},
        "/volume/a.png": {"path": "/volume/a.png"},
        "data:image/png;base64,AAAA": {"base64": "data:image/png;base64,AAAA"},
        "knight.png [input]": {"base64": "AAAA"},
    }
    for name, media in places.items():
        assert import_graph(with_input(graph, 1, "image", name), images)["image"] == media


@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}, True, "../knight.png", "C:\\a.png"])
def test_what_is_no_file_name_is_a_missing_file(value):
    graph = with_input(load("wan_i2v_api"), 1, "image", value)
    if value is None:
        assert "image" not in import_graph(graph)
        return
    assert refused(graph, input_files=FILES).endswith("[MEDIA_NOT_FOUND]")


def test_model_files_are_there():
    graph = load("wan_t2v_api")
    installed = ["models/wan2.1_t2v_1.3B_fp16.safetensors", "Wan2.1_VAE.pth", "umt5_xxl.pth"]
    assert import_graph(graph, models=installed)["mode"] == "wan_t2v"
    message = 'Workflow model "Wan2_1-T2V-1_3B_bf16.safetensors" is not available [WORKFLOW_MODEL]'
    assert refused(graph, models=installed[1:]) == message
    mine = with_input(graph, 20, "model", "Mine\\own.safetensors")
    assert import_graph(mine, models=[*installed, "own.safetensors"])["mode"] == "wan_t2v"
    message = 'Workflow model "Mine\\\\own.safetensors" is not available [WORKFLOW_MODEL]'
    assert refused(mine) == message


@pytest.mark.parametrize(
    ("node", "name"), [(10, "model_name"), (11, "clip_name"), (30, "vitpose_model"), (33, "url")]
)
def test_every_kind_of_model_file_counts(node, name):
    graph = with_input(load("scail_api"), node, name, "strange.bin")
    message = 'Workflow model "strange.bin" is not available [WORKFLOW_MODEL]'
    assert refused(graph, input_files=FILES) == message


def test_loras_are_compared_where_the_installed_ones_are_known():
    graph = load("wan_t2v_api")
    names = [lora["name"] for lora in import_graph(graph)["loras"]]
    assert import_graph(graph, loras=names)["loras"] == import_graph(graph)["loras"]
    message = 'Workflow model "first.safetensors" is not available [WORKFLOW_MODEL]'
    assert refused(graph, loras=names[1:]) == message


def test_the_checks_have_their_order():
    """Each repair brings the next error of the contract to light."""
    graph = {
        "1": {"class_type": "LoadImage"},
        "2": {"class_type": "Strange", "inputs": {}},
        "3": {"class_type": "INTConstant", "inputs": {"value": "{{w}}"}},
    }
    assert "'images' must be" in refused(graph, 5)
    assert "node '1' has no class_type" in refused(graph, [])
    graph["1"]["inputs"] = {"image": "lost.png"}
    assert "unsupported nodes: Strange" in refused(graph)
    del graph["2"]
    assert "placeholder" in refused(graph)
    graph["3"]["inputs"]["value"] = 1
    assert "no WanVideoSampler" in refused(graph)
    graph |= {
        "4": {"class_type": "WanVideoSampler", "inputs": {}},
        "5": {"class_type": "WanVideoAddSCAILPoseEmbeds", "inputs": {}},
        "6": {"class_type": "WanVideoVAELoader", "inputs": {"model_name": "strange.pt"}},
    }
    assert "missing input" in refused(graph)
    assert "strange.pt" in refused(graph, input_files=["lost.png"])


def test_a_picture_for_the_end_is_more_than_a_request_can_say():
    assert "'end_image'" in refused(load("flf2v_api"), input_files=FILES)


def test_what_cannot_be_known_is_refused():
    graph = with_input(load("scail_api"), 55, "cfg", ["1", 0])
    message = "Workflow node '55' (WanVideoSamplerv2): 'cfg' does not lead to a constant"
    assert refused(graph, input_files=FILES) == f"{message} [WORKFLOW_UNSUPPORTED]"


def test_a_link_to_nothing_is_refused():
    graph = with_input(load("scail_api"), 55, "cfg", ["404", 0])
    message = "Workflow links to missing node '404' [WORKFLOW_FORMAT]"
    assert refused(graph, input_files=FILES) == message


def test_two_films_are_refused():
    graph = load("wan_t2v_api")
    second = with_node(graph, 155, "WanVideoSampler", **graph["55"]["inputs"])
    both = with_node(second, 158, "VHS_VideoCombine", images=["155", 0])
    message = "Workflow makes several films (samplers 155, 55); keep one of them"
    assert refused(both) == f"{message} [WORKFLOW_UNSUPPORTED]"


def test_the_lists_of_classes_do_not_overlap():
    assert len(KNOWN) == 38
    assert KNOWN < IMPORTED
    assert not IMPORTED & SIDE
