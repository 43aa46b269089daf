"""One model offered as another is refused with the reason; another size is not."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from pipelines import tiny
from pipelines.inspect_weights import expected_shapes
from xicon_infer.errors import WeightsError
from xicon_infer.weights.detect import Detected, Kind, describe, detect, refuse_other_kind

KEYS = Path(__file__).parents[1] / "golden" / "keys"
PATH = Path("/models/some file.safetensors")


def key_list(name):
    content = json.loads((KEYS / f"{name}_keys.json").read_text())
    return {key: tuple(shape) for key, shape in content.get("keys", content).items()}


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


I2V = key_list("wan21_i2v_14b")
TEXT = shapes_of(tiny.tiny_text_state())
SHAPES = {
    "wan_t2v": key_list("wan21_t2v_14b"),
    "wan_i2v": I2V,
    "wan_flf2v": I2V | {"img_emb.emb_pos": (1, 514, 1280)},
    "scail": key_list("scail_14b"),
    "scail2": key_list("scail_14b") | {"patch_embedding_mask.weight": (5120, 28, 1, 2, 2)},
    "steady_dancer": key_list("steady_dancer_14b"),
    "vae": shapes_of(tiny.tiny_vae_state()),
    "text_encoder": TEXT,
    "image_encoder": shapes_of(tiny.tiny_vision_state()),
    "lora": {"diffusion_model.blocks.0.ffn.0.lora_down.weight": (4, 8)},
}
FOUND = {kind: detect(shapes) for kind, shapes in SHAPES.items()}


def refusal(found, wanted):
    with pytest.raises(WeightsError) as caught:
        refuse_other_kind(found, wanted, PATH)
    return caught.value


def test_every_kind_is_covered():
    assert set(SHAPES) == set(get_args(Kind))
    assert {kind: found.kind for kind, found in FOUND.items()} == {kind: kind for kind in SHAPES}


@pytest.mark.parametrize(("offered", "wanted"), list(itertools.product(SHAPES, SHAPES)))
def test_every_pairing(offered, wanted):
    if offered == wanted:
        refuse_other_kind(FOUND[offered], wanted, PATH)
        return
    error = refusal(FOUND[offered], wanted)
    assert "some file.safetensors" in error.message
    assert describe(FOUND[offered]) in error.message  # what it is
    components = {
        "vae": "vae", "text_encoder": "text_encoder", "image_encoder": "image_encoder",
        "lora": "loras",
    }  # fmt: skip
    assert error.field == components.get(wanted, "transformer")
    assert error.message.startswith(f"{error.field}: ")
    assert (
        re.search(r"Use \S+ from \S+\.$", error.message) or "weights_manifest.json" in error.message
    )
    if offered not in components and wanted not in components:
        assert "It lacks " in error.message or "It has " in error.message


def test_a_plain_file_as_steady_dancer():
    message = refusal(FOUND["wan_i2v"], "steady_dancer").message
    assert "a Wan2.1 image-to-video transformer, 14B (40 layers, width 5120, 36 input" in message
    for part in ("condition_embedding_spatial.*", "condition_embedding_align.*",
                 "patch_embedding_fuse.*", "patch_embedding_ref_c.*"):  # fmt: skip
        assert part in message
    assert "SteadyDancer" in message.split("Use ")[1]  # the right file
    assert "img_emb" not in message
    assert "It lacks img_emb.*" in refusal(FOUND["wan_t2v"], "steady_dancer").message


def test_a_plain_file_as_scail():
    message = refusal(FOUND["wan_i2v"], "scail").message
    assert "It lacks patch_embedding_pose.*. Use " in message
    assert "SCAIL" in message.split("Use ")[1]
    message = refusal(FOUND["steady_dancer"], "scail").message
    assert "It lacks patch_embedding_pose.*. It has condition_embedding_spatial.*" in message


@pytest.mark.parametrize("kind", [k for k in SHAPES if k not in ("scail2", "lora", "wan_flf2v")])
def test_the_names_in_a_message_are_those_the_files_have(kind):
    """Each pattern of the transformer's marks stands for tensors of the real key list."""
    message = refusal(FOUND["vae" if kind != "vae" else "lora"], kind).message
    assert "It lacks" not in message
    if kind in ("wan_t2v", "vae", "text_encoder", "image_encoder"):
        return
    named = refusal(FOUND["wan_t2v"], kind).message.split("It lacks ")[1].split(". Use")[0]
    lacking = set(SHAPES[kind]) - set(SHAPES["wan_t2v"])
    for pattern in named.split(". ")[0].split(", "):
        start = pattern.replace("blocks.*.", "blocks.0.").removesuffix("*")
        assert any(name.startswith(start) for name in lacking), pattern


def test_several_kinds_may_do():
    wanted = ("wan_i2v", "wan_flf2v")
    refuse_other_kind(FOUND["wan_i2v"], wanted, PATH)
    refuse_other_kind(FOUND["wan_flf2v"], wanted, PATH)
    message = refusal(FOUND["scail"], wanted).message
    assert "image-to-video transformer or Wan2.1 first-and-last-frame transformer is" in message


def test_another_size_is_told_and_not_refused():
    small = detect(key_list("wan21_t2v_1_3b"))
    refuse_other_kind(small, "wan_t2v", PATH)
    assert describe(small) == (
        "Wan2.1 text-to-video transformer, 1.3B (30 layers, width 1536, 16 input channels)"
    )
    assert "14B (40 layers" in describe(FOUND["wan_t2v"])


@pytest.mark.parametrize(
    ("kind", "channels"), [("wan_t2v", 36), ("wan_t2v", 48), ("wan_i2v", 48), ("scail", 36)]
)
def test_variants_with_other_channels(kind, channels):
    """Wan2.2 I2V has 36 channels and no image keys: by its names it is a text model."""
    found = FOUND[kind]
    other = replace(found, dims=found.dims | {"in_dim": channels})
    message = refusal(other, kind).message
    assert f"takes {channels} channels instead of" in message


def test_english_t5_is_no_umt5():
    found = replace(FOUND["text_encoder"], dims=FOUND["text_encoder"].dims | {"vocab_size": 32128})
    message = refusal(found, "text_encoder").message
    assert "English T5, not UMT5" in message
    assert "umt5" in message.split("Use ")[1]


def test_words_for_every_kind():
    words = [describe(found) for found in FOUND.values()]
    assert len(set(words)) == len(words)
    assert describe(FOUND["vae"]) == "video VAE (16 latent channels, width 16)"
    assert "2 layers" in describe(FOUND["text_encoder"])


def test_sizes_of_one_kind_only():
    dims = FOUND["steady_dancer"].dims
    assert (dims["in_dim_fuse"], dims["in_dim_c"], dims["align_dim"]) == (68, 16, 128)
    assert FOUND["wan_flf2v"].dims["image_tokens"] == 514
    assert not {"in_dim_fuse", "image_tokens"} & FOUND["wan_i2v"].dims.keys()


@pytest.mark.parametrize("name", ["steady_dancer_14b", "scail_14b", "wan21_i2v_14b"])
def test_the_classes_have_the_names_of_the_published_lists(name):
    shapes = key_list(name)
    assert expected_shapes(detect(shapes).kind, shapes) == shapes


def test_steady_dancer_adds_the_listed_tensors():
    content = json.loads((KEYS / "steady_dancer_14b_new_keys.json").read_text())
    new = content["not_in_plain_wan21_i2v_14b"]
    assert len(new) == 42
    assert set(key_list("steady_dancer_14b")) - set(I2V) == set(new)


def test_gguf_text_encoder():
    block = "enc.blk.0."
    shapes = {
        "token_embd.weight": (256384, 4096),
        f"{block}attn_q.weight": (4096, 4096),
        f"{block}attn_rel_b.weight": (32, 64),
        f"{block}ffn_gate.weight": (10240, 4096),
    }
    found = detect(shapes)
    assert found == Detected(
        "text_encoder", "gguf", "",
        {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 1,
         "num_heads": 64, "num_buckets": 32},
    )  # fmt: skip
