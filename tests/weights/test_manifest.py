"""The manifest: honest entries, presets, and finding files where people keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.weights.manifest import (
    COMFYUI_FOLDERS,
    MANIFEST_NAME,
    fetch_command,
    files_for,
    load_manifest,
    locate,
    manifest_path,
    missing_message,
    presets,
)

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


def test_scail_needs_one_file_of_each_component():
    assert presets()["scail"] == ("fp8", "bf16")
    for preset in presets()["scail"]:
        components = [e.component for e in files_for("scail", preset)]
        assert sorted(components) == sorted(COMPONENTS)
    fp8, bf16 = (files_for("scail", preset) for preset in ("fp8", "bf16"))
    differing = {e.component for e in set(fp8) ^ set(bf16)}
    assert differing == {"transformer"}
    assert "fp8_e4m3fn_scaled" in entry("transformer").path


def test_pose_needs_a_detector_keypoints_and_bodies():
    assert presets()["pose"] == ("default", "commercial", "light")
    ids = {preset: [e.id for e in files_for("pose", preset)] for preset in presets()["pose"]}
    assert ids == {
        "default": ["yolov10m", "vitpose-h-model", "vitpose-h-data", "nlf"],
        "commercial": ["yolov10m", "vitpose-h-model", "vitpose-h-data", "rtmw3d"],
        "light": ["yolov10m", "vitpose-l", "nlf"],
    }
    for preset in presets()["pose"]:
        assert {e.component for e in files_for("pose", preset)} == POSE_COMPONENTS


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
    names = [name for item in load_manifest().files for name in item.names]
    assert len(set(names)) == len(names)
    assert not any(name == "tokenizer.json" for name in names)  # too common to be searched for


@pytest.mark.parametrize(
    ("pipeline", "preset", "message"),
    [
        ("dance", "fp8", "'dance', weights are listed for scail, pose"),
        ("scail", "int4", "scail has fp8, bf16"),
        ("pose", "fp8", "pose has default, commercial, light"),
    ],
)
def test_unknown_presets(pipeline, preset, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        files_for(pipeline, preset)
    assert caught.value.field == ("pipeline" if pipeline == "dance" else "preset")


PLACES = [
    "Wan-AI/Wan2.1-T2V-14B/Wan2.1_VAE.pth",
    "Wan2.1_VAE.pth",
    "wan_2.1_vae.safetensors",
    "vae/Wan2.1_VAE.pth",
    "vae/wan/Wan2_1_VAE_bf16.safetensors",
    "models/vae/Wan2_1_VAE_fp32.safetensors",
    "models--Wan-AI--Wan2.1-T2V-14B/snapshots/abc123/Wan2.1_VAE.pth",
    "hub/models--Wan-AI--Wan2.1-T2V-14B/snapshots/abc123/Wan2.1_VAE.pth",
]


@pytest.mark.parametrize("place", PLACES)
def test_places(tmp_path, place):
    assert locate(entry(), [tmp_path]) is None
    path = put(tmp_path / place)
    assert locate(entry(), [tmp_path]) == path
    assert locate(entry("image_encoder"), [tmp_path]) is None


@pytest.mark.parametrize("component", sorted(COMPONENTS | POSE_COMPONENTS))
def test_every_file_is_found_in_comfyui(tmp_path, component):
    item = entry(component)
    for number, folder in enumerate(COMFYUI_FOLDERS[component]):
        for name in item.names:
            comfyui = tmp_path / str(number) / name
            path = put(comfyui / "models" / folder / "deep" / name)
            assert locate(item, [comfyui]) == locate(item, [comfyui / "models"]) == path


def test_folders_are_searched_in_order(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    late = put(second / "Wan2.1_VAE.pth")
    assert locate(entry(), [first, second]) == late
    early = put(first / "models" / "vae" / "deep" / "wan_2.1_vae.safetensors")
    assert locate(entry(), [first, second]) == early
    assert locate(entry(), [second, first]) == late
    assert locate(entry(), []) is None


def test_empty_files_and_folders_do_not_count(tmp_path):
    put(tmp_path / "Wan2.1_VAE.pth", "")
    (tmp_path / "vae" / "Wan2.1_VAE.pth").mkdir(parents=True)
    assert locate(entry(), [tmp_path]) is None
    path = put(tmp_path / "vae" / "wan_2.1_vae.safetensors")
    assert locate(entry(), [tmp_path]) == path


def test_another_tokenizer_is_not_taken(tmp_path):
    put(tmp_path / "tokenizer.json")
    put(tmp_path / "text_encoders" / "tokenizer.json")
    assert locate(entry("tokenizer"), [tmp_path]) is None
    path = put(tmp_path / "text_encoders" / "umt5-xxl" / "tokenizer.json")
    assert locate(entry("tokenizer"), [tmp_path]) == path


def test_missing_message_says_where_to_get_it(tmp_path):
    text = missing_message(entry(), [tmp_path])
    for part in ("vae", "Wan2.1_VAE.pth", "Wan-AI/Wan2.1-T2V-14B", str(tmp_path)):
        assert part in text
    assert "no folder" in missing_message(entry(), [])


def test_a_file_published_elsewhere_is_named_by_its_address():
    text = missing_message(by_id("nlf"), [])
    assert "https://github.com/isarandi/nlf/releases/download/v0.3.2/nlf_l_multi" in text
    assert "Hugging Face" not in text
    assert [e.id for e in load_manifest().files if e.url] == ["nlf"]


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


def test_the_fetch_command_puts_files_where_they_are_found(tmp_path):
    entries = [e for e in load_manifest().files if e.id in ("yolov10m", "nlf", "wan-vae")]
    command = fetch_command(entries, str(tmp_path))
    assert command.count(" && ") == 2
    for step in command.split(" && "):
        words = step.split()
        if words[0] == "hf":
            assert words[:2] == ["hf", "download"]
            made = Path(words[words.index("--local-dir") + 1]) / words[3]
        else:
            assert words[0] == "curl"
            made = Path(words[words.index("-o") + 1])
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(b"content")
    assert all(locate(entry, [tmp_path]) for entry in entries)
