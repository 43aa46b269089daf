"""Every option of a graph: changing it changes the field, in every mode; nothing gets lost."""

from __future__ import annotations

import pytest

from tests.workflow_graphs import FILES, LORA, load, with_input, with_node
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import import_graph, import_report

LIST = [{"name": "first.safetensors", "strength": 0.5}, {"name": LORA, "strength": 1}]
COMMON = [
    (20, "attention_mode", "sageattn_3", "attention_mode", "sage"),
    (20, "attention_mode", "comfy", "attention_mode", "auto"),
    (21, "blocks_to_swap", 33, "blocks_to_swap", 33),
    (23, "strength", 0.25, "loras", [{**LIST[0], "strength": 0.25}, LIST[1]]),
    (23, "strength", 0, "loras", LIST[1:]),
    (
        24,
        "lora",
        "a/b\\c.safetensors",
        "loras",
        [LIST[0], {"name": "c.safetensors", "strength": 1}],
    ),
    (50, "positive_prompt", "she waves", "prompt", "she waves"),
    (50, "positive_prompt", "", "prompt", ""),
    (50, "negative_prompt", "rain", "negative_prompt", "rain"),
    (51, "context_schedule", "static_standard", "context_schedule", "static_standard"),
    (51, "context_frames", 65, "context_frames", 65),
    (51, "context_stride", 12, "context_stride", 12),
    (51, "context_overlap", 8, "context_overlap", 8),
    (51, "freenoise", True, "freenoise", True),
    (51, "fuse_method", "linear", "fuse_method", "linear"),
    (56, "enable_vae_tiling", False, "vae_tiling", False),
    (58, "crf", 30, "output.crf", 30),
    (58, "filename_prefix", "a b\\c d%date%", "output.filename_prefix", "cd"),
]
OWN = [
    (55, "steps", 9, "steps", 9),
    (55, "steps", "9", "steps", 9),
    (55, "cfg", 4.5, "cfg", 4.5),
    (55, "shift", 5.000000000000001, "shift", 5.0),
    (55, "seed", -1, "seed", -1),
    (55, "seed", 2**64 - 1, "seed", 2**64 - 1),
    (55, "scheduler", "lcm/beta", "scheduler", "lcm/beta"),
]
PICTURE = [
    (1, "image", "end.png", "image", {"path": "end.png"}),
    (5, "keep_proportion", "crop", "image_resize", "crop"),
    (5, "width", 333, "width", 320),
    (5, "height", 555, "height", 544),
    (5, "divisible_by", 4, "width", 500),
]
DRIVEN = [
    (2, "video", "https://example.com/d.mp4", "video", {"url": "https://example.com/d.mp4"}),
    (2, "force_rate", 12, "fps", 12),
    (2, "force_rate", 0, "fps", "source"),
    (2, "frame_load_cap", 0, "max_frames", 0),
    (2, "skip_first_frames", 7, "skip_frames", 7),
    (2, "select_every_nth", 2, "select_every_nth", 2),
    (43, "start_percent", 0.3, "pose_start", 0.3),
    (43, "end_percent", 0.7, "pose_end", 0.7),
]
SCAIL = [
    (3, "value", 640, "width", 640),
    (4, "value", "300", "height", 288),
    (37, "draw_face", False, "draw_face", False),
    (37, "draw_hands", True, "draw_hands", True),
    (37, "dw_poses", None, "draw_face", False),
    (42, "strength", 0.4, "ref_strength", 0.4),
    (43, "strength", 2, "pose_strength", 2),
    (53, "scheduler", "unipc", "scheduler", "unipc"),
    (53, "steps", 20, "steps", 20),
    (53, "shift", 9, "shift", 9),
    (54, "value", 6, "cfg", 6),
    (55, "cfg", 3, "cfg", 3),
    (55, "seed", 99, "seed", 99),
    (40, "num_frames", 33, "num_frames", 33),
    (40, "width", 448, "width", 448),
    (40, "width", ["35", 1], "width", 200),
    (58, "audio", None, "output.audio", "none"),
    (59, "save_output", False, "output.return_pose_video", None),
]
SETTINGS = [
    (54, "steps", 9, "steps", 9),
    (54, "cfg", 4.5, "cfg", 4.5),
    (54, "shift", 8, "shift", 8),
    (54, "seed", 77, "seed", 77),
    (54, "scheduler", "deis", "scheduler", "deis"),
    (40, "num_frames", 33, "num_frames", 33),
    (58, "audio", None, "output.audio", "none"),
    (59, "save_output", False, "output.return_pose_video", None),
]
LENGTH = [
    (40, "num_frames", 33, "num_frames", 33),
    (40, "width", 448, "width", 448),
    (58, "frame_rate", 30, "fps", 30),
]
CASES = (
    [("scail_api", *case) for case in (*COMMON[1:], *DRIVEN, *SCAIL, *PICTURE[:2])]
    + [("steady_dancer_api", *case) for case in (*COMMON, *DRIVEN, *PICTURE, *SETTINGS)]
    + [("wan_i2v_api", *case) for case in (*COMMON, *OWN, *PICTURE, *LENGTH)]
    + [("wan_t2v_api", *case) for case in (*COMMON, *OWN, *LENGTH) if case[3] != "loras"]
)


def fields_of(graph):
    """Returns the fields as the command line importer reads them, media as in a request."""
    fields = dict(import_report(graph).fields)
    for name in ("image", "video", "pose_video"):
        if name in fields:
            fields[name] = {"url" if "://" in fields[name] else "path": fields[name]}
    return fields


def look(fields, name):
    outer, _, inner = name.partition(".")
    return fields[outer].get(inner) if inner else fields.get(outer)


@pytest.mark.parametrize(("graph", "node", "name", "value", "field", "expected"), CASES)
def test_an_input_becomes_its_field_and_no_other(graph, node, name, value, field, expected):
    before = fields_of(load(graph))
    after = fields_of(with_input(load(graph), node, name, value))
    assert look(after, field) == expected
    assert look(before, field) != expected
    partners = {"steps", "width", "height", "draw_face", "draw_hands"} | {field.partition(".")[0]}
    for other in set(before) - partners:
        assert after[other] == before[other], other


@pytest.mark.parametrize("name", ["scail_api", "wan_i2v_api", "wan_t2v_api"])
def test_a_request_reads_the_same(name):
    assert import_graph(load(name), input_files=FILES) == fields_of(load(name))


def test_modes():
    names = ("scail", "steady_dancer", "wan_i2v", "wan_t2v")
    assert [import_report(load(f"{name}_api")).fields["mode"] for name in names] == list(names)
    assert import_report(load("flf2v_api")).fields["mode"] == "wan_i2v"


def test_the_end_picture_is_an_option_of_the_command_line():
    imported = import_report(load("flf2v_api"))
    assert imported.options["end_image"] == "end.png"
    assert imported.options["preset"] == "flf2v-bf16"
    changed = import_report(with_input(load("flf2v_api"), 7, "image", "other.png"))
    assert changed.options["end_image"] == "other.png"


@pytest.mark.parametrize(
    ("graph", "file", "preset"),
    [
        ("scail", "Wan21-14B-SCAIL-preview_comfy_bf16.safetensors", "bf16"),
        ("steady_dancer", "Wan21_I2V_SteadyDancer_fp16-Q6_K.gguf", "gguf"),
        ("wan_i2v", "wan2.1_i2v_720p_14B_fp8_scaled.safetensors", "fp8-720p"),
        ("wan_t2v", "wan2.1_t2v_14B_bf16.safetensors", "bf16"),
    ],
)
def test_the_transformer_chooses_the_preset(graph, file, preset):
    changed = with_input(load(f"{graph}_api"), 20, "model", file)
    assert import_report(changed).options["preset"] == preset


def test_options_of_the_command_line():
    graph = load("scail_api")
    assert import_report(graph).options["clip_preprocess"] == "stretch"
    centre = with_input(graph, 41, "crop", "center")
    assert import_report(centre).options["clip_preprocess"] == "center"
    light = with_input(graph, 30, "vitpose_model", "vitpose-l-wholebody.onnx")
    assert import_report(light).options["keypoint_model"] == "vitpose-l"
    free = with_input(graph, 37, "ref_dw_pose", None)
    assert import_report(free).options["align"] == "off"
    late = with_input(graph, 42, "start_percent", 0.25)
    assert import_report(late).options["ref_start"] == 0.25
    early = with_input(graph, 42, "end_percent", 0.75)
    assert import_report(early).options["ref_end"] == 0.75


def test_two_strengths_of_steady_dancer():
    changed = with_input(load("steady_dancer_api"), 43, "pose_strength_temporal", 0.3)
    imported = import_report(changed)
    assert "pose_strength" not in imported.fields
    assert imported.options["pose_strength_spatial"] == 0.8
    assert imported.options["pose_strength_temporal"] == 0.3


def test_a_graph_without_a_negative_pose_has_no_condition_guidance():
    graph = load("steady_dancer_api")
    assert import_report(graph).fields["condition_guide_scale"] == 0.0
    guided = with_input(graph, 43, "pose_latents_negative", ["39", 0])
    assert "condition_guide_scale" not in import_report(guided).fields


def test_a_video_of_poses_is_no_driving_video():
    graph = with_input(load("scail_api"), 43, "pose_images", ["6", 0])
    fields = import_report(graph).fields
    assert fields["pose_video"] == "dance.mp4"
    assert "video" not in fields


def test_a_size_may_come_from_the_loaded_video():
    graph = with_input(load("steady_dancer_api"), 2, "custom_width", 484)
    graph = with_input(graph, 2, "custom_height", 832)
    for side, slot in (("width", 1), ("height", 2)):
        graph = with_input(graph, 40, side, ["31", slot])
    fields = import_report(graph).fields
    assert (fields["width"], fields["height"]) == (488, 832)


def test_a_size_that_only_a_file_knows_is_left_out():
    graph = with_input(load("steady_dancer_api"), 40, "width", ["31", 1])
    imported = import_report(graph)
    assert "width" not in imported.fields
    assert any("--width" in warning for warning in imported.warnings)


def test_a_linked_scheduler_wins_over_the_sampler():
    graph = load("wan_t2v_api")
    graph = with_node(graph, 90, "WanVideoScheduler", scheduler="lcm", steps=12, shift=8)
    linked = import_report(with_input(graph, 55, "scheduler", ["90", 3])).fields
    assert (linked["scheduler"], linked["steps"], linked["shift"]) == ("lcm", 12, 8)
    steps = import_report(with_input(graph, 55, "steps", ["90", 1])).fields
    assert (steps["scheduler"], steps["steps"]) == ("unipc", 12)


def test_loras_of_several_slots():
    graph = with_node(
        load("wan_t2v_api"),
        24,
        "WanVideoLoraSelectMulti",
        lora_0="a",
        strength_0=0.5,
        lora_1="none",
        lora_2="b",
        strength_2=0,
        lora_3="c",
        prev_lora=["23", 0],
    )
    found = import_report(graph).fields["loras"]
    assert [(lora["name"], lora["strength"]) for lora in found] == [
        ("first.safetensors", 0.5),
        ("a", 0.5),
        ("c", 1.0),
    ]


def test_a_graph_without_loras_has_none():
    graph = with_input(load("wan_t2v_api"), 55, "model", ["22", 0])
    assert import_report(graph).fields["loras"] == []


def test_what_is_not_connected_does_not_count():
    graph = load("wan_t2v_api")
    graph = with_node(graph, 91, "WanVideoLoraSelect", lora="stray", strength=1)
    graph = with_node(graph, 92, "WanVideoContextOptions", context_frames=33)
    assert import_report(graph).fields == import_report(load("wan_t2v_api")).fields


def test_the_film_is_what_the_decoder_feeds():
    """A preview that comes first in the graph, saved as well, is not the film."""
    graph = load("scail_api")
    first = {"59": graph["59"], **{name: one for name, one in graph.items() if name != "59"}}
    assert import_report(first).fields["output"]["crf"] == 17
    temporary = with_input(first, 58, "save_output", False)
    assert import_report(temporary).fields["output"]["crf"] == 17


def test_of_two_writers_the_one_that_saves_is_the_film():
    graph = with_node(load("wan_t2v_api"), 60, "VHS_VideoCombine", images=["56", 0], crf=40)
    both = with_input(graph, 60, "save_output", False)
    assert import_report(both).fields["output"]["crf"] == 17
    other = with_input(with_input(graph, 58, "save_output", False), 60, "save_output", True)
    assert import_report(other).fields["output"]["crf"] == 40


def test_defaults_of_the_nodes_fill_what_a_graph_leaves_out():
    graph = with_node(load("wan_t2v_api"), 51, "WanVideoContextOptions")
    graph["55"]["inputs"] = {
        name: value for name, value in graph["55"]["inputs"].items() if isinstance(value, list)
    }
    fields = import_report(graph).fields
    assert (fields["steps"], fields["cfg"], fields["shift"]) == (30, 6.0, 5.0)
    assert (fields["scheduler"], fields["seed"]) == ("unipc", 0)
    assert (fields["context_frames"], fields["context_overlap"]) == (81, 16)


def test_numbers_that_the_graph_cannot_tell_are_left_out_with_a_warning():
    graph = with_node(load("wan_t2v_api"), 90, "CreateCFGScheduleFloatList")
    imported = import_report(with_input(graph, 55, "cfg", ["90", 0]))
    assert "cfg" not in imported.fields
    assert imported.unknown_nodes == ("90 CreateCFGScheduleFloatList",)
    assert any("WanVideoSampler.cfg" in warning for warning in imported.warnings)


def test_a_template_is_read_but_for_its_blanks():
    graph = with_input(load("scail_api"), 3, "value", "{{width}}")
    imported = import_report(with_input(graph, 1, "image", "{{picture}}"))
    assert "width" not in imported.fields
    assert "image" not in imported.fields
    assert sum("fill it in" in warning for warning in imported.warnings) == 2


def test_several_unconnected_nodes_of_a_sketch_are_refused():
    graph = {
        "1": {"class_type": "WanVideoSampler", "inputs": {}},
        "2": {"class_type": "WanVideoContextOptions", "inputs": {"context_frames": 33}},
        "3": {"class_type": "WanVideoContextOptions", "inputs": {"context_frames": 65}},
    }
    with pytest.raises(InvalidRequest, match="several WanVideoContextOptions nodes"):
        import_report(graph)
    del graph["3"]
    assert import_report(graph).fields["context_frames"] == 33


def test_strange_nodes_in_a_sketch_are_refused():
    graph = {
        "1": {"class_type": "WanVideoSampler", "inputs": {}},
        "2": {"class_type": "WanVideoAddSCAIL2ConditionEmbeds", "inputs": {}},
    }
    with pytest.raises(InvalidRequest, match="unsupported nodes: WanVideoAddSCAIL2"):
        import_report(graph)
