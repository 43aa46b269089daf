"""The manifest: honest entries, presets, alternatives, and messages that lead to the files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import jsonschema
import pytest

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.weights.manifest import (
    COMFYUI_FOLDERS,
    MANIFEST_NAME,
    fetch_command,
    files_for,
    load_manifest,
    locate,
    locate_named,
    manifest_path,
    missing_message,
    presets,
)
from xicon_infer.weights.places import GENERIC_NAMES

ROOT = Path(__file__).parents[2]
COMPONENTS = {"transformer", "vae", "text_encoder", "tokenizer", "image_encoder", "lora"}
POSE_COMPONENTS = {"pose_detector", "pose_keypoints", "pose_body"}


def entry(component="vae"):
    return next(e for e in load_manifest().files if e.component == component)


def by_id(name):
    return next(e for e in load_manifest().files if e.id == name)


def put(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_it_is_found_at_the_repository_root():
    assert manifest_path() == ROOT / MANIFEST_NAME
    assert json.loads((ROOT / MANIFEST_NAME).read_text())["format"] == 1


def test_it_follows_its_schema_and_the_schema_refuses():
    schema = json.loads((ROOT / "weights_manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = json.loads((ROOT / MANIFEST_NAME).read_text())
    validator.validate(content)
    changes = [
        {"licence": ""},
        {"bytes": 0},
        {"sha256": "ABC"},
        {"path": "../x"},
        {"names": []},
        {"component": "unet"},
        {"used_by": [], "instead_of": []},
        {"more": 1},
        {"url": "http://x"},
    ]
    for change in changes:
        wrong = {**content, "files": [{**content["files"][0], **change}]}
        assert list(validator.iter_errors(wrong)), change
    assert list(validator.iter_errors({**content, "format": 2}))


def test_it_is_written_as_lock_writes_it():
    """So that a lock shows in a diff as the values that changed, nothing else."""
    text = (ROOT / MANIFEST_NAME).read_text()
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


VIDEO = {
    "scail": ("fp8", "bf16", "low-memory", "tiny"),
    "steady_dancer": ("fp8", "bf16", "gguf", "low-memory", "tiny"),
    "wan_i2v": (
        "fp8",
        "bf16",
        "fp8-720p",
        "bf16-720p",
        "flf2v-fp8",
        "flf2v-bf16",
        "low-memory",
        "tiny",
    ),
    "wan_t2v": ("fp8", "bf16", "1.3b", "low-memory", "tiny"),
}


def test_presets():
    assert presets() == {**VIDEO, "pose": ("default", "commercial", "light", "dwpose")}


@pytest.mark.parametrize("pipeline", VIDEO)
def test_a_video_preset_has_one_file_of_each_component(pipeline):
    for preset in VIDEO[pipeline]:
        components = sorted(e.component for e in files_for(pipeline, preset))
        wanted = set(COMPONENTS)
        if pipeline == "wan_t2v":
            wanted.remove("image_encoder")
        if preset == "1.3b":
            wanted.remove("lora")
        assert components == ([] if preset == "tiny" else sorted(wanted)), preset


def test_scail_presets_differ_in_what_they_say():
    fp8, bf16, low = (set(files_for("scail", p)) for p in ("fp8", "bf16", "low-memory"))
    assert {e.component for e in fp8 ^ bf16} == {"transformer"}
    assert {e.component for e in fp8 ^ low} == {"text_encoder"}
    assert "fp8_e4m3fn_scaled" in entry("transformer").path


def test_every_preset_has_its_own_files():
    for pipeline, names in VIDEO.items():
        sets = {frozenset(e.id for e in files_for(pipeline, preset)) for preset in names}
        assert len(sets) == len(names), pipeline


def test_low_memory_is_the_smallest():
    for pipeline, names in VIDEO.items():
        kinds = {e.component: e.id for e in files_for(pipeline, "low-memory")}
        assert kinds["text_encoder"] == "umt5-xxl-fp8-scaled"
        assert kinds["transformer"].endswith(("fp8", "gguf"))
        assert "bf16" in names or pipeline == "pose"


def test_pose_needs_a_detector_and_keypoints():
    ids = {preset: [e.id for e in files_for("pose", preset)] for preset in presets()["pose"]}
    assert ids == {
        "default": ["yolov10m", "vitpose-h-model", "vitpose-h-data", "nlf"],
        "commercial": ["yolov10m", "vitpose-h-model", "vitpose-h-data", "rtmw3d"],
        "light": ["yolov10m", "vitpose-l", "nlf"],
        "dwpose": ["yolox-l", "dwpose"],
    }
    for preset in presets()["pose"]:
        found = {e.component for e in files_for("pose", preset)}
        # SteadyDancer draws in two dimensions.
        assert found == POSE_COMPONENTS - ({"pose_body"} if preset == "dwpose" else set())


def test_every_form_of_a_content_is_an_entry():
    vae = by_id("wan-vae")
    assert [e.id for e in vae.alternatives] == [
        "wan-vae-comfy",
        "wan-vae-fp32",
        "wan-vae-bf16",
        "wan-vae-diffusers",
    ]
    assert vae.names[0] == "Wan2.1_VAE.pth"
    assert vae.names[1:4] == (
        "wan_2.1_vae.safetensors",
        "Wan2_1_VAE_fp32.safetensors",
        "Wan2_1_VAE_bf16.safetensors",
    )
    assert vae.own_names == ("Wan2.1_VAE.pth",)
    assert by_id("umt5-xxl-fp8").instead_of == ("umt5-xxl-bf16", "umt5-xxl-fp8-scaled")
    assert len(by_id("umt5-xxl-bf16").alternatives) == 4
    assert len(by_id("clip-vit-h").alternatives) == 2


def test_hashes_say_who_stated_them():
    pinned = [e for e in load_manifest().files if e.sha256]
    assert len(pinned) >= 20
    for item in pinned:
        assert item.size_bytes
        assert item.pin_source
    assert len({e.sha256 for e in pinned}) == len(pinned)


def test_licences_that_bind_a_business_are_named():
    assert "non-commercial" in by_id("nlf").licence
    assert not [e.id for e in files_for("pose", "commercial") if "non-commercial" in e.licence]
    assert by_id("yolov10m").licence == "AGPL-3.0"
    assert "research only" in by_id("rtmw3d").licence_source


def test_unknown_values_are_null_not_guessed():
    for item in load_manifest().files:
        assert item.licence
        assert item.licence_source
        assert item.repo.count("/") == 1
        assert item.size_bytes is None or item.size_bytes > 0
        assert item.sha256 is None or len(item.sha256) == 64
        assert item.component in COMFYUI_FOLDERS


def test_names_lead_to_one_file_each():
    names = [name for item in load_manifest().files for name in item.own_names]
    assert len(set(names)) == len(names)
    assert not GENERIC_NAMES & set(names)  # too common to be searched for


@pytest.mark.parametrize(
    ("pipeline", "preset", "message"),
    [
        ("dance", "fp8", "'dance', weights are listed for scail, steady_dancer, wan_i2v"),
        ("scail", "int4", "scail has fp8, bf16, low-memory, tiny"),
        ("pose", "fp8", "pose has default, commercial, light, dwpose"),
    ],
)
def test_unknown_presets(pipeline, preset, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        files_for(pipeline, preset)
    assert caught.value.field == ("pipeline" if pipeline == "dance" else "preset")


def test_missing_message_says_where_to_get_it(tmp_path):
    text = missing_message(entry(), [tmp_path])
    for part in ("vae", "Wan2.1_VAE.pth", "Wan-AI/Wan2.1-T2V-14B", str(tmp_path)):
        assert part in text
    assert "no folder that exists" in missing_message(entry(), [tmp_path / "gone"])


def test_a_file_published_elsewhere_is_named_by_its_address():
    text = missing_message(by_id("nlf"), [])
    assert "https://github.com/isarandi/nlf/releases/download/v0.3.2/nlf_l_multi" in text
    assert "Hugging Face" not in text
    assert [e.id for e in load_manifest().files if e.url] == [
        "taew2-1",
        "taew2-1-safetensors",
        "nlf",
    ]


def test_downloads_go_where_comfyui_looks_and_never_meet(tmp_path):
    targets = {item.target: item for item in load_manifest().files}
    assert len(targets) == len(load_manifest().files)
    assert by_id("wan-vae").target == "vae/Wan2.1_VAE.pth"
    assert by_id("wan-vae-diffusers").target.startswith("Wan2.1-T2V-14B-Diffusers/")
    for target, item in targets.items():
        path = put(tmp_path / item.id / target)
        assert locate(item, [tmp_path / item.id]) == path


def broken(change):
    content = json.loads((ROOT / MANIFEST_NAME).read_text())
    change(content)
    return json.dumps(content)


def edit(**values):
    return lambda content: content["files"][0].update(values)


BROKEN = {
    "not json": ("{", "not a weights manifest"),
    "no files": (broken(lambda c: c.pop("files")), "not a weights manifest"),
    "list": ("[]", "not a weights manifest"),
    "field missing": (broken(lambda c: c["files"][0].pop("repo")), "'repo'"),
    "format": (broken(lambda c: c.update(format=2)), "format 2"),
    "id twice": (broken(lambda c: c["files"].append(c["files"][0])), "occurs twice"),
    "preset": (broken(edit(used_by=["scail/int4"])), "scail/int4"),
    "unused": (broken(edit(used_by=[])), "used_by"),
    "tiny needs nothing": (broken(edit(used_by=["scail/tiny"])), "scail/tiny"),
    "alternative of another kind": (broken(edit(instead_of=["wan-vae"])), "instead_of"),
    "alternative of itself": (broken(edit(instead_of=["scail-14b-fp8"])), "instead_of"),
    "unknown alternative": (broken(edit(instead_of=["x"])), "instead_of"),
    "pinned by nobody": (broken(edit(bytes=5)), "pin_source"),
    "comfyui": (broken(edit(comfyui=["/x"])), "stay inside"),
    "licence": (broken(edit(licence="")), "licence"),
    "component": (broken(edit(component="unet")), "unet"),
    "sha256": (broken(edit(sha256="abc")), "64 lower-case"),
    "bytes": (broken(edit(bytes=0)), "positive number or null"),
    "climbing": (broken(edit(names=["../x"])), "stay inside"),
    "address": (broken(edit(url="ftp://x/y")), "https://"),
    "absolute": (broken(edit(path="/etc/x")), "stay inside"),
    "no names": (broken(edit(names=[])), "stay inside"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifests(tmp_path, case):
    content, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message):
        load_manifest(put(tmp_path / "m.json", content))


def test_the_fetch_command_names_the_files(tmp_path):
    command = fetch_command([by_id("yolov10m"), by_id("nlf")], str(tmp_path / "two words"))
    words = shlex.split(command)
    assert words[:3] == ["xicon-infer", "weights", "pull"]
    assert words[3:] == ["yolov10m", "nlf", "--models-dir", str(tmp_path / "two words")]


def test_a_file_can_be_found_by_its_name(tmp_path):
    known = by_id("lightx2v-i2v-480p-rank64")
    name = known.own_names[0]
    assert locate_named("lora", name, [tmp_path]) is None
    other = put(tmp_path / "loras" / by_id("lightx2v-i2v-480p-rank64-original").own_names[0])
    assert locate_named("lora", name, [tmp_path]) is None  # that name was asked for, no other
    assert locate(known, [tmp_path]) == other
    pulled = put(tmp_path / known.repo / known.path)
    assert locate_named("lora", name, [tmp_path]) == pulled
    mine = put(tmp_path / "models" / "loras" / "deep" / "mine.safetensors")
    assert locate_named("lora", "mine.safetensors", [tmp_path]) == mine
    assert locate_named("vae", "mine.safetensors", [tmp_path]) is None
