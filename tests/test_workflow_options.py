"""What this project does not do: told with node and input, or refused; never left silent."""

from __future__ import annotations

import pytest

from tests.workflow_graphs import load, with_input, with_node
from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow import import_report
from xicon_infer.workflow_nodes import IMPORTED
from xicon_infer.workflow_options import LINKS, VALUES, unsupported

EVERY_VALUE = [
    (kind, name, wanted) for kind, inputs in VALUES.items() for name, wanted in inputs.items()
]
EVERY_LINK = [
    (kind, name, wanted) for kind, inputs in LINKS.items() for name, wanted in inputs.items()
]
TOLD = [
    ("scail_api", 5, "upscale_method", "bicubic"),
    ("scail_api", 5, "crop_position", "top"),
    ("scail_api", 41, "strength_1", 0.5),
    ("scail_api", 41, "tiles", 2),
    ("scail_api", 52, "riflex_freq_index", 6),
    ("scail_api", 56, "normalization", "minmax"),
    ("scail_api", 56, "tile_x", 512),
    ("scail_api", 58, "format", "video/h265-mp4"),
    ("scail_api", 58, "pingpong", True),
    ("scail_api", 58, "loop_count", 3),
    ("scail_api", 58, "trim_to_audio", True),
    ("scail_api", 58, "frame_rate", 30),
    ("scail_api", 2, "select_every_nth", 2),
    ("steady_dancer_api", 37, "body_stick_width", 4),
    ("steady_dancer_api", 39, "noise_aug_strength", 0.1),
    ("wan_i2v_api", 40, "noise_aug_strength", 0.03),
    ("wan_i2v_api", 55, "rope_function", "mocha"),
]
REFUSED = [
    ("wan_t2v_api", 55, "denoise_strength", 0.6),
    ("wan_t2v_api", 55, "start_step", 2),
    ("wan_t2v_api", 55, "end_step", 3),
    ("wan_t2v_api", 55, "samples", ["55", 0]),
    ("wan_t2v_api", 55, "multitalk_embeds", ["40", 0]),
    ("wan_t2v_api", 40, "control_embeds", ["40", 0]),
    ("wan_i2v_api", 40, "temporal_mask", ["5", 3]),
    ("wan_t2v_api", 20, "vace_model", ["10", 0]),
    ("scail_api", 53, "end_step", 4),
    ("scail_api", 2, "meta_batch", ["10", 0]),
]


class Stub:
    """A node without a graph."""

    def __init__(self, kind, **inputs):
        self.id, self.type, self.inputs = "7", kind, inputs


@pytest.mark.parametrize(("graph", "node", "name", "value"), TOLD)
def test_small_differences_are_told(graph, node, name, value):
    before = import_report(load(graph))
    after = import_report(with_input(load(graph), node, name, value))
    new = set(after.warnings) - set(before.warnings)
    assert len(new) == 1
    place = 58 if name == "select_every_nth" else node
    assert new.pop().startswith(f"node {place} ")


@pytest.mark.parametrize(("graph", "node", "name", "value"), REFUSED)
def test_another_film_is_refused(graph, node, name, value):
    with pytest.raises(InvalidRequest, match=f"node '{node}'.*'{name}'") as caught:
        import_report(with_input(load(graph), node, name, value))
    assert caught.value.code == "WORKFLOW_UNSUPPORTED"


@pytest.mark.parametrize(("kind", "name", "wanted"), EVERY_VALUE)
def test_every_value_of_the_table(kind, name, wanted):
    node = Stub(kind)
    for value in (*wanted.values, None, ""):
        assert unsupported([(node, {name: value})]) == []
    if wanted.refused:
        with pytest.raises(InvalidRequest, match=name):
            unsupported([(node, {name: "other"})])
    else:
        (warning,) = unsupported([(node, {name: "other"})])
        assert f"{kind}.{name}" in warning


@pytest.mark.parametrize(("kind", "name", "wanted"), EVERY_LINK)
def test_every_link_of_the_table(kind, name, wanted):
    node = Stub(kind, **{name: ["1", 0]})
    assert unsupported([(Stub(kind), {})]) == []
    if wanted.refused:
        with pytest.raises(InvalidRequest, match=name):
            unsupported([(node, {})])
    else:
        assert f"{kind}.{name}" in unsupported([(node, {})])[0]


def test_only_known_classes_have_rules():
    assert {*VALUES, *LINKS} <= IMPORTED


def test_a_video_that_is_sampled_further_is_refused():
    graph = load("wan_t2v_api")
    first = with_node(graph, 155, "WanVideoSampler", **graph["55"]["inputs"])
    with pytest.raises(InvalidRequest, match="'samples' is connected"):
        import_report(with_input(first, 55, "samples", ["155", 0]))


@pytest.mark.parametrize(
    "name", ["Wan2_2-TI2V-5B_fp8.safetensors", "Wan2_1-VACE_module_14B.safetensors", "wan2.2.gguf"]
)
def test_another_network_is_refused(name):
    with pytest.raises(InvalidRequest) as caught:
        import_report(with_input(load("wan_t2v_api"), 20, "model", name))
    assert caught.value.code == "WORKFLOW_MODEL"


def test_an_unknown_file_is_told():
    changed = with_input(load("wan_t2v_api"), 20, "model", "folder\\my-tune.safetensors")
    imported = import_report(changed)
    assert any("my-tune.safetensors" in warning for warning in imported.warnings)
    assert "preset" not in imported.options


def test_a_model_of_another_mode_is_told():
    changed = with_input(load("wan_t2v_api"), 20, "model", "Wan2_1-I2V-14B-480P_fp8.safetensors")
    assert any("no" in w and "wan_t2v" in w for w in import_report(changed).warnings)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        *(("a | b", True), ("[1] a [2] b", True), ("a (red:1.2) b", True), ("a (red) b: c", True)),
        *(("a, b", False), ("time: (now)", False)),
    ],
)
def test_prompts_with_syntax_are_told(prompt, told):
    changed = with_input(load("wan_t2v_api"), 50, "positive_prompt", prompt)
    assert any("positive_prompt" in w for w in import_report(changed).warnings) is told


@pytest.mark.parametrize("name", ["model", "image_embeds", "text_embeds"])
def test_a_strange_node_on_the_way_is_refused(name):
    graph = with_node(load("wan_t2v_api"), 90, "MyPatch", model=["25", 0], embeds=["40", 0])
    with pytest.raises(InvalidRequest, match="unsupported nodes: MyPatch"):
        import_report(with_input(graph, 55, name, ["90", 0]))


@pytest.mark.parametrize(
    ("graph", "node", "name"),
    [
        ("scail", 42, "ref_image"),
        ("scail", 43, "pose_images"),
        ("wan_i2v", 40, "start_image"),
        ("steady_dancer", 43, "pose_latents_positive"),
    ],
)
def test_a_strange_node_on_the_way_of_pictures_is_refused(graph, node, name):
    changed = with_node(load(f"{graph}_api"), 90, "MyFilter", image=["5", 0])
    with pytest.raises(InvalidRequest, match="unsupported nodes: MyFilter"):
        import_report(with_input(changed, node, name, ["90", 0]))


def test_a_picture_that_is_made_is_refused():
    changed = with_input(load("wan_i2v_api"), 40, "start_image", ["56", 0])
    with pytest.raises(InvalidRequest, match="makes a picture"):
        import_report(changed)


def test_what_comes_after_the_decoder_is_told():
    graph = with_node(load("wan_t2v_api"), 57, "RIFE VFI", frames=["56", 0])
    imported = import_report(with_input(graph, 58, "images", ["57", 0]))
    assert any("RIFE VFI: not translated" in warning for warning in imported.warnings)
    assert imported.fields["output"]["crf"] == 17


def test_side_nodes_are_named():
    graph = with_node(load("wan_t2v_api"), 57, "PreviewImage", images=["56", 0])
    assert import_report(graph).ignored == ("PreviewImage",)


def test_the_number_of_warnings_is_limited():
    graph = {
        str(place): {"class_type": "ImageResizeKJv2", "inputs": {"upscale_method": f"m{place}"}}
        for place in range(300)
    }
    graph["s"] = {"class_type": "WanVideoSampler", "inputs": {}}
    warnings = import_report(graph).warnings
    assert len(warnings) == 101
    assert warnings[-1] == "200 more warnings"
