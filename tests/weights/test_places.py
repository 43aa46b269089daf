"""Where files are searched, in which order, and that nothing on a disk stops the search."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

import pytest

from xicon_infer.runtime import download_dir, models_dirs, usual_models_dirs
from xicon_infer.weights import places
from xicon_infer.weights.manifest import load_manifest
from xicon_infer.weights.places import COMFYUI_FOLDERS, copies, existing, expand, find_all, locate


def by_id(name):
    return next(e for e in load_manifest().files if e.id == name)


def of(component):
    return next(e for e in load_manifest().files if e.component == component)


VAE, LORA = by_id("wan-vae"), by_id("lightx2v-i2v-480p-rank64")


def put(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


PLACES = [
    "Wan-AI/Wan2.1-T2V-14B/Wan2.1_VAE.pth",
    "Wan2.1_VAE.pth",
    "wan_2.1_vae.safetensors",
    "vae/Wan2.1_VAE.pth",
    "vae/wan/Wan2_1_VAE_bf16.safetensors",
    "models/vae/Wan2_1_VAE_fp32.safetensors",
    "models--Wan-AI--Wan2.1-T2V-14B/snapshots/abc123/Wan2.1_VAE.pth",
    "hub/models--Wan-AI--Wan2.1-T2V-14B/snapshots/abc123/Wan2.1_VAE.pth",
    "models--Kijai--WanVideo_comfy/snapshots/f00/Wan2_1_VAE_bf16.safetensors",
    "Wan-AI/Wan2.1-T2V-14B/abc123/Wan2.1_VAE.pth",
    "Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/vae/wan_2.1_vae.safetensors",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers/vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("place", PLACES)
def test_places(tmp_path, place):
    assert locate(VAE, [tmp_path]) is None
    path = put(tmp_path / place)
    assert locate(VAE, [tmp_path]) == path
    assert locate(by_id("clip-vit-h"), [tmp_path]) is None


@pytest.mark.parametrize("component", sorted(COMFYUI_FOLDERS))
def test_every_file_is_found_in_comfyui(tmp_path, component):
    item = of(component)
    for number, folder in enumerate(COMFYUI_FOLDERS[component]):
        for name in item.names:
            comfyui = tmp_path / str(number) / name
            path = put(comfyui / "models" / folder / "deep" / name)
            assert locate(item, [comfyui]) == locate(item, [comfyui / "models"]) == path


def test_every_comfyui_path_of_the_manifest_is_found(tmp_path):
    for item in load_manifest().files:
        for number, place in enumerate(item.comfyui):
            root = tmp_path / item.id / str(number)
            path = put(root / "models" / place)
            assert locate(item, [root]) == path, (item.id, place)


def test_dwpose_of_the_preprocessor_nodes(tmp_path):
    item = by_id("yolox-l")
    path = put(tmp_path / "custom_nodes/comfyui_controlnet_aux/ckpts" / item.repo / "yolox_l.onnx")
    assert locate(item, [tmp_path]) == path


def test_folders_are_searched_in_order(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    late = put(second / "Wan2.1_VAE.pth")
    assert locate(VAE, [first, second]) == late
    early = put(first / "models" / "vae" / "deep" / "wan_2.1_vae.safetensors")
    assert locate(VAE, [first, second]) == early
    assert locate(VAE, [second, first]) == late
    assert locate(VAE, []) is None


def test_the_copy_that_wins_does_not_depend_on_when_it_came(tmp_path):
    names = ["a/Wan2.1_VAE.pth", "b/Wan2.1_VAE.pth", "b/wan_2.1_vae.safetensors", "Wan2.1_VAE.pth"]
    winners = set()
    for number, order in enumerate(itertools.permutations(names)):
        root = tmp_path / str(number)
        for name in order:
            put(root / "vae" / name)
        found = [found.path.relative_to(root / "vae") for found in copies([VAE], [root])]
        winners.add(tuple(map(str, found)))
    # The right form before another one, the shortest path first, then the alphabet.
    assert winners == {
        ("Wan2.1_VAE.pth", "a/Wan2.1_VAE.pth", "b/Wan2.1_VAE.pth", "b/wan_2.1_vae.safetensors")
    }


def test_which_form_was_found_is_told(tmp_path):
    put(tmp_path / "vae" / "Wan2_1_VAE_bf16.safetensors")
    put(tmp_path / "loras" / LORA.own_names[0])
    found = find_all([VAE, LORA, by_id("nlf")], [tmp_path])
    assert {name: item.published.id for name, item in found.items()} == {
        "wan-vae": "wan-vae-bf16",
        "lightx2v-i2v-480p-rank64": "lightx2v-i2v-480p-rank64",
    }
    assert found["wan-vae"].folder == tmp_path
    assert found["wan-vae"].path == locate(VAE, [tmp_path])


def test_empty_files_and_folders_do_not_count(tmp_path):
    put(tmp_path / "Wan2.1_VAE.pth", "")
    (tmp_path / "vae" / "Wan2.1_VAE.pth").mkdir(parents=True)
    assert locate(VAE, [tmp_path]) is None
    path = put(tmp_path / "vae" / "wan_2.1_vae.safetensors")
    assert locate(VAE, [tmp_path]) == path


def test_common_names_are_not_taken_from_other_models(tmp_path):
    tokenizer, small = by_id("umt5-tokenizer"), by_id("wan21-t2v-1.3b-bf16")
    for place in (
        "tokenizer.json",
        "tokenizer/tokenizer.json",
        "text_encoders/tokenizer.json",
        "diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "diffusion_models/diffusion_pytorch_model.safetensors",
    ):
        put(tmp_path / place)
    assert find_all([tokenizer, small, VAE], [tmp_path]) == {}
    path = put(tmp_path / "text_encoders" / "umt5-xxl" / "tokenizer.json")
    assert locate(tokenizer, [tmp_path]) == path


def test_the_main_revision_of_a_cache_comes_first(tmp_path):
    repo = tmp_path / "models--Wan-AI--Wan2.1-T2V-14B"
    for revision in ("aaa", "bbb", "ccc"):
        put(repo / "snapshots" / revision / "Wan2.1_VAE.pth")
    assert locate(VAE, [tmp_path]).parent.name == "aaa"
    put(repo / "refs" / "main", "bbb\n")
    assert locate(VAE, [tmp_path]).parent.name == "bbb"


def test_links_are_followed_and_loops_are_not(tmp_path):
    far = put(tmp_path / "far" / "wan" / "Wan2.1_VAE.pth")
    vae = tmp_path / "models" / "vae"
    vae.mkdir(parents=True)
    (vae / "link").symlink_to(tmp_path / "far")
    (vae / "loop").symlink_to(tmp_path)
    (vae / "self").symlink_to(vae / "self")
    (vae / "gone").symlink_to(tmp_path / "nowhere")
    assert locate(VAE, [tmp_path]) == vae / "link" / "wan" / "Wan2.1_VAE.pth"
    assert far.samefile(locate(VAE, [tmp_path]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_do_not_exist(tmp_path):
    put(tmp_path / "vae" / "closed" / "Wan2.1_VAE.pth")
    (tmp_path / "vae" / "closed").chmod(0)
    try:
        assert locate(VAE, [tmp_path]) is None
    finally:
        (tmp_path / "vae" / "closed").chmod(0o700)


def test_names_that_no_file_can_have_do_no_harm(tmp_path):
    assert existing([Path("a\0b"), tmp_path, tmp_path / "gone", tmp_path]) == [tmp_path]
    assert locate(VAE, [Path("a\0b"), tmp_path / ("x" * 300)]) is None


def test_a_search_is_bounded(tmp_path, monkeypatch, caplog):
    deep = tmp_path / "vae" / "/".join("abcdef")
    put(deep / "Wan2.1_VAE.pth")
    assert locate(VAE, [tmp_path]) is None
    assert locate(VAE, [tmp_path / "vae" / "a", tmp_path]) is None
    monkeypatch.setattr(places, "MAX_DEPTH", 8)
    assert locate(VAE, [tmp_path]) == deep / "Wan2.1_VAE.pth"
    monkeypatch.setattr(places, "MAX_ENTRIES", 3)
    with caplog.at_level(logging.WARNING):
        assert locate(VAE, [tmp_path]) is None
    assert "more than 3 entries" in caplog.text


EXTRA = """
comfyui:
    base_path: {base}
    vae: |
        first/
        {other}
    loras: loras
a111:
    base_path: {other}
    is_default: true
    vae: VAE
    number: 5
relative:
    vae: beside
text: just text
"""


@pytest.fixture
def extra(tmp_path):
    """A ComfyUI whose extra_model_paths.yaml names folders elsewhere."""
    base, other = tmp_path / "base", tmp_path / "other"
    base.mkdir()
    other.mkdir()
    text = EXTRA.format(base=base, other=other)
    return put(tmp_path / "ComfyUI" / "extra_model_paths.yaml", text).parent


def test_extra_model_paths_are_searched_in_their_order(tmp_path, extra):
    expected = [
        tmp_path / "other" / "VAE" / "deep" / "Wan2.1_VAE.pth",  # is_default: before the ComfyUI
        extra / "models" / "vae" / "Wan2.1_VAE.pth",
        tmp_path / "base" / "first" / "Wan2.1_VAE.pth",
        tmp_path / "other" / "Wan2.1_VAE.pth",
        extra / "beside" / "Wan2.1_VAE.pth",
    ]
    for path in reversed(expected):
        put(path)
        assert locate(VAE, [extra]) == path
    found = [found.path for found in copies([VAE], [extra])]
    assert [path for path in found if path in expected] == expected


def test_a_yaml_file_may_stand_in_place_of_a_folder(tmp_path, extra):
    path = put(tmp_path / "base" / "loras" / "x" / LORA.own_names[0])
    put(extra / "models" / "loras" / LORA.own_names[0])
    assert locate(LORA, [extra / "extra_model_paths.yaml"]) == path
    assert locate(VAE, [extra / "extra_model_paths.yaml"]) is None


def test_variables_and_home_in_extra_model_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("XICON_TEST_MODELS", str(tmp_path / "far"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yaml = put(tmp_path / "e.yaml", "a:\n  vae: $XICON_TEST_MODELS/v\nb:\n  vae: ~/w\n")
    late = put(tmp_path / "home" / "w" / "Wan2.1_VAE.pth")
    assert locate(VAE, [yaml]) == late
    early = put(tmp_path / "far" / "v" / "Wan2.1_VAE.pth")
    assert locate(VAE, [yaml]) == early


@pytest.mark.parametrize(
    "text", ["a: [", "- list", "a: {b: [1]}", "", "\x00", "a: &x [*x]", "a:\n  base_path: 5"]
)
def test_a_broken_yaml_stops_nothing(tmp_path, text):
    put(tmp_path / "extra_model_paths.yaml", text)
    path = put(tmp_path / "models" / "vae" / "Wan2.1_VAE.pth")
    assert locate(VAE, [tmp_path]) == path
    assert len(expand([tmp_path])) in (1, 2)


def test_a_broken_yaml_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        expand([put(tmp_path / "extra_model_paths.yaml", "a: [")])
    assert "extra_model_paths.yaml cannot be used" in caplog.text


def test_the_usual_folders(tmp_path):
    home, root = tmp_path / "home", tmp_path / "root"
    usual = usual_models_dirs({}, home=home, root=root)
    assert usual == [
        Path("models"),
        root / "models",
        root / "runpod-volume/huggingface-cache/hub",
        root / "runpod/cache",
        root / "runpod-volume/models",
        root / "workspace/models",
        root / "runpod-volume/ComfyUI",
        root / "workspace/ComfyUI",
        home / "ComfyUI",
        home / "comfy/ComfyUI",
        home / "Documents/ComfyUI",
        root / "ComfyUI",
        root / "opt/ComfyUI",
        home / ".cache/huggingface/hub",
    ]


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/o", "HF_HOME": "/h"}, "/o"),
        ({"HF_HUB_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/o", "HF_HOME": "/h"}, "/c"),
    ],
)
def test_the_hugging_face_cache_is_where_the_hub_library_has_it(environment, cache):
    assert usual_models_dirs(environment, home=Path("home"), root=Path("/"))[-1] == Path(cache)


def test_comfyui_can_be_named(tmp_path):
    for name in ("COMFYUI_PATH", "COMFYUI_DIR", "COMFYUI_HOME"):
        usual = usual_models_dirs({name: "/here"}, home=tmp_path, root=Path("/"))
        assert usual.index(Path("/here")) < usual.index(tmp_path / "ComfyUI")
        assert usual.index(Path("/here")) > usual.index(Path("/workspace/ComfyUI"))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A process that finds nothing in its usual places."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "COMFYUI_", "XDG_", "XICON_MODELS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def test_named_folders_come_first_and_stay(nowhere, tmp_path, monkeypatch):
    assert models_dirs(None) == []
    monkeypatch.setenv("XICON_MODELS_DIR", f"/gone/a{os.pathsep}{os.pathsep}/gone/b")
    assert models_dirs(Path("/gone/x")) == [Path("/gone/x"), Path("/gone/a"), Path("/gone/b")]
    (nowhere / "models").mkdir()
    cache = tmp_path / "home/.cache/huggingface/hub"
    cache.mkdir(parents=True)
    assert models_dirs(None) == [Path("/gone/a"), Path("/gone/b"), Path("models"), cache]
    assert models_dirs(cache)[0] == cache
    assert models_dirs(cache).count(cache) == 1


def test_where_downloads_go(nowhere, monkeypatch):
    assert download_dir(None) == Path("models")
    monkeypatch.setenv("XICON_MODELS_DIR", f"/c/extra_model_paths.yaml{os.pathsep}/a")
    assert download_dir(None) == Path("/a")
    assert download_dir(Path("/x")) == Path("/x")
