"""Nodes that the command line importer reads besides those of a request, and rarer wirings."""

from __future__ import annotations

import json

import pytest

from tests.workflow_graphs import load, with_input, with_node
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import Imported, import_report
from xicon_infer.workflow_cli_command import job_values
from xicon_infer.workflow_graph import cut, link_of, names_text
from xicon_infer.workflow_ui import ui_to_api


def fields(graph):
    return import_report(graph).fields


def test_prompts_of_comfyui_itself():
    graph = with_node(load("wan_t2v_api"), 90, "CLIPTextEncode", text="a cat", clip=["93", 0])
    graph = with_node(graph, 91, "CLIPTextEncode", text="a dog", clip=["93", 0])
    graph = with_node(graph, 92, "WanVideoTextEmbedBridge", positive=["90", 0], negative=["91", 0])
    graph = with_node(graph, 93, "CLIPLoader", clip_name="umt5_xxl_fp16.safetensors", type="wan")
    read = fields(with_input(graph, 55, "text_embeds", ["92", 0]))
    assert (read["prompt"], read["negative_prompt"]) == ("a cat", "a dog")
    graph["92"]["inputs"].pop("negative")
    read = fields(with_input(graph, 55, "text_embeds", ["92", 0]))
    assert "negative_prompt" not in read
    graph["90"]["class_type"] = "MyEncoder"
    with pytest.raises(InvalidRequest, match="MyEncoder"):
        import_report(with_input(graph, 55, "text_embeds", ["92", 0]))


def test_a_single_prompt_and_guidance_beside_it():
    graph = with_node(load("wan_t2v_api"), 90, "WanVideoTextEncodeSingle", prompt="a cat")
    graph = with_node(graph, 91, "WanVideoApplyNAG", original_text_embeds=["90", 0])
    imported = import_report(with_input(graph, 55, "text_embeds", ["91", 0]))
    assert imported.fields["prompt"] == "a cat"
    assert any("WanVideoApplyNAG" in warning for warning in imported.warnings)


def test_a_prompt_may_come_from_a_text_node():
    graph = with_node(load("wan_t2v_api"), 90, "StringConstantMultiline", string="42")
    assert fields(with_input(graph, 50, "positive_prompt", ["90", 0]))["prompt"] == "42"


def test_the_older_node_for_pictures():
    graph = with_node(
        load("wan_i2v_api"),
        40,
        "WanVideoImageClipEncode",
        image=["1", 0],
        generation_width=640,
        generation_height=320,
        num_frames=33,
        adjust_resolution=True,
        vae=["10", 0],
    )
    imported = import_report(graph)
    read = imported.fields
    assert (read["mode"], read["image"]) == ("wan_i2v", "knight.png")
    assert (read["width"], read["height"], read["num_frames"]) == (640, 320, 33)
    assert any("adjust_resolution" in warning for warning in imported.warnings)


@pytest.mark.parametrize(
    ("kind", "keep", "word"),
    [
        ("ImageResizeKJv2", "pad_edge", "pad"),
        ("ImageResizeKJv2", "total_pixels", "resize"),
        ("ImageResizeKJv2", False, "stretch"),
        ("ImageResizeKJ", True, "resize"),
        ("ImageResizeKJ", False, "stretch"),
        ("ImageResizeKJ", None, "stretch"),
    ],
)
def test_ways_to_keep_the_proportion(kind, keep, word):
    graph = load("wan_i2v_api")
    graph["5"]["class_type"] = kind
    assert fields(with_input(graph, 5, "keep_proportion", keep))["image_resize"] == word


def test_a_side_of_zero_follows_the_picture():
    imported = import_report(with_input(load("wan_i2v_api"), 5, "width", 0))
    assert "width" not in imported.fields
    assert imported.fields["height"] == 688


def test_a_size_that_one_resize_takes_from_another():
    graph = with_input(load("flf2v_api"), 40, "width", ["8", 1])
    assert fields(graph)["width"] == 496
    wrong = with_input(graph, 40, "width", ["8", 2])
    assert "width" not in fields(wrong)


def test_a_size_of_the_drawn_pose():
    graph = with_input(load("steady_dancer_api"), 40, "width", ["31", 1])
    graph = with_node(graph, 31, "GetImageSizeAndCount", image=["37", 0])
    graph["34"]["inputs"]["images"] = ["2", 0]
    assert fields(graph)["width"] == 480


def test_a_length_that_cannot_be_known_is_told():
    graph = with_node(load("wan_t2v_api"), 90, "MyCounter")
    imported = import_report(with_input(graph, 40, "num_frames", ["90", 0]))
    assert "num_frames" not in imported.fields
    assert any("WanVideoEmptyEmbeds.num_frames" in warning for warning in imported.warnings)


def test_loras_by_name_and_strange_ones():
    graph = with_node(load("wan_t2v_api"), 24, "WanVideoLoraSelectByName", lora_name="mine")
    assert fields(graph)["loras"] == [{"name": "mine", "strength": 1.0}]
    graph = with_node(load("wan_t2v_api"), 24, "MyLoras")
    with pytest.raises(InvalidRequest, match="MyLoras"):
        import_report(graph)


def test_sound_of_something_else_is_told():
    graph = with_node(load("scail_api"), 90, "LoadAudio", audio="song.mp3")
    imported = import_report(with_input(graph, 58, "audio", ["90", 0]))
    assert imported.fields["output"]["audio"] == "auto"
    assert any("VHS_VideoCombine.audio" in warning for warning in imported.warnings)


def test_films_of_comfyui_itself():
    graph = with_node(load("wan_t2v_api"), 58, "CreateVideo", images=["56", 0], fps=30)
    graph = with_node(graph, 59, "SaveVideo", video=["58", 0], filename_prefix="x")
    read = fields(graph)
    assert read["fps"] == 30
    assert "crf" not in read.get("output", {})


def test_a_scheduler_that_nothing_takes_belongs_to_a_sketch():
    graph = {
        "1": {"class_type": "WanVideoSamplerv2", "inputs": {"cfg": 2, "seed": 3}},
        "2": {"class_type": "WanVideoScheduler", "inputs": {"steps": 7}},
    }
    assert fields(graph)["steps"] == 7
    graph["1"]["inputs"]["model"] = ["3", 0]
    graph["3"] = {"class_type": "WanVideoModelLoader", "inputs": {}}
    assert "steps" not in fields(graph)


@pytest.mark.parametrize(
    ("fields", "options", "preset"),
    [
        ({"mode": "wan_i2v"}, {"end_image": "e.png"}, "flf2v-fp8"),
        ({"mode": "wan_i2v"}, {"end_image": "e.png", "preset": "bf16"}, "flf2v-bf16"),
        ({"mode": "wan_i2v"}, {"preset": "flf2v-bf16"}, "bf16"),
        ({"mode": "wan_i2v"}, {"preset": "flf2v-fp8"}, "fp8"),
    ],
)
def test_weights_fit_the_pictures(fields, options, preset):
    warnings: list[str] = []
    assert job_values(Imported(fields, options), warnings)["preset"] == preset
    assert warnings[0].startswith(f"preset {preset} is used")


def test_values_that_the_command_line_words_otherwise():
    base = {"mode": "steady_dancer", "condition_guide_scale": 0.0}
    assert "condition_guide_scale" in job_values(Imported(base), [])
    assert "condition_guide_scale" not in job_values(Imported({**base, "pose_video": "p"}), [])
    assert job_values(Imported({"mode": "wan_t2v", "shift": 0}), [])["shift"] == 0.01
    swapped = job_values(Imported({"mode": "wan_t2v", "blocks_to_swap": 48}), [])
    assert (swapped["memory"], swapped["blocks_to_swap"]) == ("stream", 40)
    assert "memory" not in job_values(Imported({"mode": "wan_t2v", "blocks_to_swap": 0}), [])
    with pytest.raises(InvalidRequest, match="data URI"):
        job_values(Imported({"mode": "wan_i2v", "image": "data:image/png;base64,AA"}), [])


@pytest.mark.parametrize(
    ("value", "link"),
    [
        (["1", 0], ("1", 0)),
        ([1, 2], ("1", 2)),
        (["1"], None),
        (["1", "0"], None),
        (["1", True], None),
        ([True, 0], None),
        ([["1", 0], 0], None),
        ("1", None),
    ],
)
def test_what_a_link_is(value, link):
    assert link_of(value) == link


def test_many_names_are_cut():
    assert names_text({"b", "a"}) == "a, b"
    assert names_text({f"n{place:02}" for place in range(30)}).endswith("n19 and 10 more")
    assert cut("x" * 65) == "x" * 61 + "..."


def test_links_that_are_none_are_passed_over():
    graph = load("wan_t2v_ui")
    before = json.dumps(ui_to_api(graph))
    graph["links"] += [
        None,
        5,
        [],
        [1, 2],
        {"id": 3},
        [9, "a", None, 1, 0],
        [9, "55", "0", "56", 0],
    ]
    assert json.dumps(ui_to_api(graph)) == before
