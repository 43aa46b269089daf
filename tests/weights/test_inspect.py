"""Inspection: what a file is, at once, from the header, at the real sizes."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines import tiny
from pipelines.inspect_weights import expected_shapes, inspect_weights
from pipelines.loading import transformer_class
from tests.tiny_models import lora_state, scaled_fp8
from tests.weights import formats
from xicon_infer.errors import WeightsError
from xicon_infer.weights.inspect import inspect_file
from xicon_infer.weights.inspect_text import format_inspection

KEYS = Path(__file__).parents[1] / "golden" / "keys"
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def key_list(name):
    content = json.loads((KEYS / f"{name}_keys.json").read_text())
    return {key: tuple(shape) for key, shape in content.get("keys", content).items()}


def sparse(path, shapes, dtype_of=lambda name: "BF16", metadata=None):
    """Writes a whole safetensors file whose data are a hole: its true length, no disk space."""
    header, position = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, shape in shapes.items():
        dtype = dtype_of(name)
        end = position + torch.Size(shape).numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    return path


REAL = {
    "steady_dancer_14b": ("steady_dancer", 16_396_718_736, 1345, "SteadyDancer transformer, 14B"),
    "wan21_i2v_14b": ("wan_i2v", 16_394_878_784, 1303, "image-to-video transformer, 14B"),
    "wan21_t2v_14b": ("wan_t2v", 14_288_491_584, 1095, "text-to-video transformer, 14B"),
    "wan21_t2v_1_3b": ("wan_t2v", 1_418_996_800, 825, "text-to-video transformer, 1.3B"),
    "scail_14b": ("scail", None, 1305, "SCAIL transformer, 14B"),
}


@pytest.mark.parametrize("name", REAL)
def test_files_of_the_real_size(tmp_path, name):
    kind, parameters, tensors, words = REAL[name]
    path = sparse(tmp_path / "m.safetensors", key_list(name))
    began = time.perf_counter()
    found = inspect_weights(path)
    assert time.perf_counter() - began < 5  # a second or less; the machine may be busy
    assert (found.missing, found.unexpected, found.misshaped) == ((), (), ())
    assert found.problems == ()
    assert found.usable
    assert found.detected.kind == kind
    assert words in found.description
    assert found.tensors == tensors
    assert found.bytes == path.stat().st_size > 2 * found.parameters
    if parameters is not None:
        assert found.parameters == parameters
    assert [(row.name, row.tensors, row.parameters) for row in found.dtypes] == [
        ("bfloat16", tensors, found.parameters)
    ]
    assert "usable      yes" in format_inspection(found)


def test_the_fp8_file_of_steady_dancer(tmp_path):
    """1834 tensors, as counted in the published one: 488 scales and a mark beside 1345."""
    shapes = key_list("steady_dancer_14b")
    new = [
        n for n in shapes if n.startswith("condition") and n.endswith("weight")
        and (len(shapes[n]) == 2 or "ffn_pose" in n)
    ][:8]  # fmt: skip
    blocks = [n for n, s in shapes.items() if n.startswith("blocks.") and len(s) == 2]
    fp8 = {name for name in (*blocks, *new) if name.endswith("weight")}
    assert len(fp8) == 488
    whole = dict(shapes) | {"scaled_fp8": (2,)}
    for name in fp8:
        whole[_scale(name)] = ()
    assert len(whole) == 1834

    def dtype_of(name):
        kind = "F32" if "scale" in name else "BF16"
        return "F8_E4M3" if name in fp8 or name == "scaled_fp8" else kind

    path = sparse(tmp_path / "m.safetensors", whole, dtype_of)
    found = inspect_weights(path)
    assert (found.missing, found.unexpected, found.misshaped) == ((), (), ())
    assert found.parameters == 16_396_718_736
    assert found.quantization == ("float8_e4m3fn: 488 tensors, one scale each",)
    # The hole reads as zeros: the scales are looked at although no weight is.
    assert "scales that are zero" in found.problems[0]
    assert "and 480 more" in found.problems[0]
    assert not found.usable


def _scale(name):
    stem = name.removesuffix("weight")
    return f"{stem}scale_weight" if name.endswith(".weight") else f"{name}.scale_weight"


CONFIG = tiny.TINY_SCAIL
STATE = tiny.tiny_transformer_state(transformer_class("scail"), CONFIG)


def test_what_is_missing_is_named(tmp_path):
    state = {n: v for n, v in STATE.items() if not n.startswith("blocks.0.ffn")}
    state["blocks.0.ffn.0.bias"] = STATE["blocks.0.ffn.0.bias"]
    state |= {"blocks.0.ffn.0.weight": torch.ones(3, 4), "blocks.1.new.weight": torch.ones(2)}
    save_file(state, tmp_path / "m.safetensors")
    found = inspect_weights(tmp_path / "m.safetensors")
    assert found.detected.kind == "scail"
    text = format_inspection(found)
    if found.missing is None:  # the sizes could not be read from so odd a file
        pytest.fail(text)
    assert set(found.missing) == {"blocks.0.ffn.2.weight", "blocks.0.ffn.2.bias"}
    assert found.unexpected == ("blocks.1.new.weight",)
    assert any(n.startswith("blocks.0.ffn.0.weight (3, 4) instead of") for n in found.misshaped)
    assert not found.usable
    assert "missing     2: blocks.0.ffn.2.weight, blocks.0.ffn.2.bias" in text
    assert "unexpected  1: blocks.1.new.weight" in text
    assert text.endswith("usable      no")


def test_a_block_that_is_missing_inside(tmp_path):
    """The highest number says how many blocks there should be, not how many there are."""
    whole = tiny.tiny_transformer_state(transformer_class("scail"), replace(CONFIG, num_layers=3))
    gone = {name for name in whole if name.startswith("blocks.1.")}
    state = {name: value for name, value in whole.items() if name not in gone}
    save_file(state, tmp_path / "m.safetensors")
    found = inspect_weights(tmp_path / "m.safetensors")
    assert set(found.missing) == gone
    assert found.unexpected == ()


@pytest.mark.parametrize(
    ("marks", "scale", "expected"),
    [
        ("kijai", "scale_weight", "float8_e4m3fn: 24 tensors, one scale each"),
        (None, None, "float8_e4m3fn: 24 tensors, no scales"),
        ("comfy", "weight_scale", "float8_e4m3fn, ComfyUI mixed precision: 24 tensors, one scale"),
    ],
)
def test_schemes_of_fp8(tmp_path, marks, scale, expected):
    formats.fp8(STATE, tmp_path / "m.safetensors", marks=marks, scale=scale)
    found = inspect_weights(tmp_path / "m.safetensors")
    assert len(found.quantization) == 1
    assert found.quantization[0].startswith(expected)
    assert found.usable
    assert found.parameters == sum(value.numel() for value in STATE.values())


def test_rows_and_prefix(tmp_path):
    path = tmp_path / "m.safetensors"
    formats.fp8(STATE, path, per_row=True, prefix="model.diffusion_model.")
    found = inspect_weights(path)
    assert found.quantization == ("float8_e4m3fn: 24 tensors, one scale a row",)
    text = format_inspection(found)
    assert "naming      wan, prefix model.diffusion_model." in text
    assert found.usable


def test_bad_scales_are_named_without_reading_weights(tmp_path):
    state = scaled_fp8(STATE)
    state["blocks.1.ffn.2.scale_weight"] = torch.tensor(float("nan"))
    save_file(state, tmp_path / "m.safetensors")
    found = inspect_weights(tmp_path / "m.safetensors")
    assert "blocks.1.ffn.2.scale_weight" in found.problems[0]
    assert found.missing == ()
    assert not found.usable


def test_nan_is_looked_for_on_request(tmp_path):
    state = dict(STATE) | {"blocks.0.norm3.bias": torch.full((CONFIG.dim,), float("nan"))}
    save_file(state, tmp_path / "m.safetensors")
    assert inspect_weights(tmp_path / "m.safetensors").usable
    found = inspect_weights(tmp_path / "m.safetensors", check_finite=True)
    assert found.problems == ("1 tensors hold NaN or infinity: blocks.0.norm3.bias",)


def test_gguf(tmp_path):
    state = {name: value.repeat(1, 2) if formats.is_block_linear(name, value) else value
             for name, value in STATE.items()}  # fmt: skip
    formats.write_gguf(state, tmp_path / "m.gguf", "Q4_K")
    found = inspect_weights(tmp_path / "m.gguf")
    assert found.format == "gguf"
    assert found.quantization == ("GGUF blocks: 24 x Q4_K; dequantised on reading",)
    rows = {row.name: row for row in found.dtypes}
    assert rows["Q4_K"].bytes == rows["Q4_K"].parameters * 144 // 256
    assert rows["F32"].bytes == 4 * rows["F32"].parameters
    assert found.metadata["general.architecture"] == "wan"
    assert len(found.misshaped) == 24  # twice as wide as the model


def test_the_tokenizer_inside(tmp_path):
    text = {n: v.clone() for n, v in tiny.tiny_text_state().items() if "embed_tokens" not in n}
    spiece = torch.zeros(77, dtype=torch.uint8)
    save_file(text | {"spiece_model": spiece}, tmp_path / "m.safetensors")
    found = inspect_weights(tmp_path / "m.safetensors")
    assert found.tokenizer == "SentencePiece model, 77 bytes (spiece_model)"
    assert found.usable
    assert found.parameters == sum(value.numel() for value in text.values())
    save_file(text, tmp_path / "m.safetensors")
    assert inspect_weights(tmp_path / "m.safetensors").tokenizer == ""


@pytest.mark.parametrize("part", ["vae", "vision"])
def test_other_components(tmp_path, part):
    state = tiny.tiny_vae_state() if part == "vae" else tiny.tiny_vision_state()
    torch.save(state, tmp_path / "m.pth")
    found = inspect_weights(tmp_path / "m.pth")
    assert found.format == "torch"
    assert found.usable, found
    assert found.missing == ()


def test_lora(tmp_path):
    state = lora_state(STATE, rank=3)
    state["diffusion_model.blocks.1.norm3.diff"] = torch.ones(CONFIG.dim)
    state["diffusion_model.blocks.1.norm3.diff_b"] = torch.ones(CONFIG.dim)
    state["diffusion_model.blocks.0.self_attn.q.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "m.safetensors", {"ss_network_dim": "3"})
    found = inspect_weights(tmp_path / "m.safetensors")
    assert found.detected.kind == "lora"
    assert found.missing is None  # a LoRA is complete as it is
    lora = found.lora
    assert lora.ranks == {3: 12}
    assert lora.targets["self_attn.q"] == 1
    assert set(lora.targets) >= {"cross_attn.k_img", "ffn.0", "ffn.2"}
    assert lora.blocks == 2
    assert lora.differences == {"diff": 1, "diff_b": 1}
    assert lora.factors == {1.0: 11, 2.0: 1}
    text = format_inspection(found)
    assert "12 pairs of rank 3, in 2 blocks" in text
    assert "ss_network_dim = 3" in text
    assert found.usable


def test_a_lora_with_unknown_keys(tmp_path):
    state = lora_state(STATE) | {"diffusion_model.blocks.0.odd.lora_up.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "m.safetensors")
    found = inspect_weights(tmp_path / "m.safetensors")
    assert "1 unknown keys: diffusion_model.blocks.0.odd.lora_up.weight" in found.problems[0]
    assert not found.usable


def test_an_unknown_checkpoint_is_still_described(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors", {"note": "x" * 300})
    found = inspect_weights(tmp_path / "m.safetensors")
    assert found.detected is None
    assert "unknown checkpoint" in found.problems[0]
    text = format_inspection(found)
    assert "float32" in text
    assert "x" * 100 + "..." in text
    assert "x" * 101 not in text


def test_what_is_no_checkpoint_raises(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="Git LFS pointer"):
        inspect_weights(tmp_path / "m.safetensors")


def test_shards_are_one_file_set(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    formats.sharded(STATE, index)
    found = inspect_weights(index)
    assert found.files == 3
    assert found.bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert "in 3 files" in format_inspection(found)


def test_the_expected_names_may_be_given(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors"
    assert inspect_file(path).missing is None
    shapes = {name: tuple(value.shape) for name, value in STATE.items()}
    assert inspect_file(path, shapes).usable
    assert inspect_file(path, shapes | {"more": (1,)}).missing == ("more",)
    assert inspect_file(path, {}).unexpected == tuple(inspect_file(path).shapes)
    assert expected_shapes("scail", shapes) == shapes
    assert expected_shapes("lora", {}) is None
    assert expected_shapes("scail2", shapes) is None
