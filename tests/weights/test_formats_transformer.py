"""Every transformer in every published format loads strictly and gives the numbers of the file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipelines import tiny
from pipelines.loading import transformer_class
from tests.weights import formats
from xicon_infer.models import wan
from xicon_infer.models.wan import WanConfig
from xicon_infer.ops.linear import FP8_DTYPES, Fp8Linear
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.detect import detect, refuse_other_kind
from xicon_infer.weights.keymaps import SAT_TABLE, to_wan_names
from xicon_infer.weights.strict import dit_policy, load_strict

# Rows of 256: the K types of GGUF have blocks of so many.
IMAGE = WanConfig(
    dim=256, ffn_dim=256, num_heads=2, num_layers=2, in_dim=36, text_dim=64, image_dim=64
)
CONFIGS = {
    "wan_t2v": replace(IMAGE, in_dim=16, image_dim=None, num_layers=1),
    "wan_i2v": replace(IMAGE, num_layers=1),
    "wan_flf2v": replace(IMAGE, image_positions=34, num_layers=1),
    "scail": replace(IMAGE, in_dim=20),
    "steady_dancer": IMAGE,
}
STATES = {
    kind: tiny.tiny_transformer_state(transformer_class(kind), config)
    for kind, config in CONFIGS.items()
}


def load(path, kind, *, keep_fp8=False):
    """The way a pipeline goes: opened, recognised, read, renamed, sized, loaded strictly."""
    checkpoint = open_checkpoint(path)
    found = detect(checkpoint.shapes)
    refuse_other_kind(found, kind, path)
    state = to_wan_names(read_tensors(checkpoint, dtype=torch.float32))
    with torch.device("meta"):
        module = transformer_class(kind)(
            wan.config_from_shapes({name: tuple(value.shape) for name, value in state.items()})
        )
    assert module.config == CONFIGS[kind]
    policy = dit_policy(torch.float32, keep_fp8=keep_fp8)
    report = load_strict(module, state, name="transformer", device="cpu", dtype_policy=policy)
    return module, report


def numbers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The float32 numbers that a module computes with, fp8 layers multiplied out."""
    state = dict(module.state_dict())
    for name, layer in module.named_modules():
        if isinstance(layer, Fp8Linear):
            scale = state.pop(f"{name}.scale_weight", torch.ones(1))
            state[f"{name}.weight"] = state[f"{name}.weight"].float() * scale
    return state


WRITERS = {
    "float32": ("m.safetensors", formats.plain, {}),
    "bf16": ("m.safetensors", formats.plain, {"dtype": torch.bfloat16}),
    "fp16, ComfyUI prefix": (
        "m.safetensors",
        formats.plain,
        {"dtype": torch.float16, "prefix": "model.diffusion_model."},
    ),
    "prefix diffusion_model": ("m.safetensors", formats.plain, {"prefix": "diffusion_model."}),
    "prefix model": ("m.safetensors", formats.plain, {"prefix": "model."}),
    "shards": ("diffusion_pytorch_model.safetensors.index.json", formats.sharded, {}),
    "pth": ("m.pth", formats.pickled, {}),
    "pth, before zip": ("m.pt", formats.pickled, {"zipped": False}),
    "pth, nested": (
        "mp_rank_00_model_states.pt",
        formats.pickled,
        {"nest": ("module",), "prefix": "model.diffusion_model."},
    ),
    "Kijai scaled e4m3": ("m.safetensors", formats.fp8, {"marks": "kijai"}),
    "Kijai scaled e5m2": (
        "m.safetensors",
        formats.fp8,
        {"marks": "kijai", "dtype": torch.float8_e5m2},
    ),
    "plain e4m3": ("m.safetensors", formats.fp8, {"scale": None}),
    "plain e5m2": ("m.safetensors", formats.fp8, {"scale": None, "dtype": torch.float8_e5m2}),
    "LightX2V rows": ("m.safetensors", formats.fp8, {"scale": "weight_scale", "per_row": True}),
    "ComfyUI mixed": (
        "m.safetensors",
        formats.fp8,
        {"scale": "weight_scale", "marks": "comfy", "prefix": "model.diffusion_model."},
    ),
    "ComfyUI metadata": (
        "m.safetensors",
        formats.fp8,
        {"scale": "weight_scale", "marks": "comfy metadata", "dtype": torch.float8_e5m2},
    ),
    **{
        f"GGUF {kind}": ("m.gguf", formats.write_gguf, {"kind": kind})
        for kind in ("F32", "F16", "BF16", *formats.LEGACY, *formats.K_TYPES)
    },
    "GGUF, shapes beside": ("m.gguf", formats.write_gguf, {"kind": "Q8_0", "wide": "metadata"}),
    "GGUF, flattened": ("m.gguf", formats.write_gguf, {"kind": "Q4_K", "wide": "flat"}),
    "GGUF, axes dropped": ("m.gguf", formats.write_gguf, {"kind": "Q6_K", "strip_ones": True}),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("format_name", WRITERS)
def test_matrix(tmp_path, kind, format_name):
    file, write, options = WRITERS[format_name]
    expected = write(STATES[kind], tmp_path / file, **options)
    module, _ = load(tmp_path / file, kind)
    assert formats.same(module.state_dict(), expected) == []
    by_folder = file.endswith(".json")
    if by_folder:
        module, _ = load(tmp_path, kind)
        assert formats.same(module.state_dict(), expected) == []


LOSSLESS = [n for n, (_, w, o) in WRITERS.items() if w is not formats.fp8 and not o.get("dtype")]
LOSSLESS = [n for n in LOSSLESS if not n.startswith("GGUF") or n == "GGUF F32"]


@pytest.mark.parametrize("format_name", LOSSLESS)
def test_lossless_formats_give_the_very_numbers(tmp_path, format_name):
    file, write, options = WRITERS[format_name]
    expected = write(STATES["scail"], tmp_path / file, **options)
    assert formats.same(expected, STATES["scail"]) == []


def test_rounding_formats_do_round(tmp_path):
    """The expected numbers of the matrix are those of the file, not those that went in."""
    for format_name in set(WRITERS) - set(LOSSLESS):
        file, write, options = WRITERS[format_name]
        expected = write(STATES["wan_t2v"], tmp_path / file, **options)
        assert formats.same(expected, STATES["wan_t2v"]), format_name


@pytest.mark.parametrize("kind", ["scail", "steady_dancer"])
@pytest.mark.parametrize("format_name", [n for n, w in WRITERS.items() if w[1] is formats.fp8])
def test_fp8_stays_fp8(tmp_path, kind, format_name):
    file, write, options = WRITERS[format_name]
    expected = write(STATES[kind], tmp_path / file, **options)
    module, report = load(tmp_path / file, kind, keep_fp8=True)
    assert len(report.fp8) == 24
    assert formats.same(numbers(module), expected) == []


@pytest.mark.parametrize("kind", ["wan_t2v", "wan_i2v", "wan_flf2v"])
@pytest.mark.parametrize("write", [formats.plain, formats.sharded])
def test_diffusers_layout(tmp_path, kind, write):
    name = "diffusion_pytorch_model.safetensors"
    path = tmp_path / (name if write is formats.plain else f"{name}.index.json")
    renamed = {formats.inverse_diffusers(n): v for n, v in STATES[kind].items()}
    assert renamed.keys() != STATES[kind].keys()
    write(renamed, path)
    assert detect(open_checkpoint(path).shapes).naming == "diffusers"
    module, _ = load(path, kind)
    assert formats.same(module.state_dict(), STATES[kind]) == []


def to_sat(state):
    """The layout of the official SCAIL file, by the table of the specification read backwards."""
    sources = {}
    for pattern, targets in SAT_TABLE:
        for layer in range(CONFIGS["scail"].num_layers):
            source = pattern.replace("\\.", ".").replace(r"(\d+)", str(layer))
            sources.setdefault(source, [target.format(layer) for target in targets])
    made, used = {}, set()
    for source, targets in sources.items():
        for leaf in {n.removeprefix(targets[0]) for n in state if n.startswith(targets[0])}:
            parts = [state[target + leaf] for target in targets]
            made[source + leaf] = parts[0] if len(parts) == 1 else torch.cat(parts)
            used |= {target + leaf for target in targets}
    return made | {name: value for name, value in state.items() if name not in used}


def test_sat_file(tmp_path):
    """The official checkpoint holds other models, too, and nests everything under `module`."""
    sat = to_sat(STATES["scail"])
    beside = {"first_stage_model.conv1.weight": torch.ones(2), "conditioner.a": torch.ones(2)}
    path = tmp_path / "mp_rank_00_model_states.pt"
    formats.pickled(sat, path, nest=("module",), prefix="model.diffusion_model.", beside=beside)
    assert detect(open_checkpoint(path).shapes).naming == "sat"
    module, _ = load(path, "scail")
    assert formats.same(module.state_dict(), STATES["scail"]) == []


SMALL = {
    "condition_embedding_spatial.fc.0.weight",
    "condition_embedding_spatial.fc_phi.weight",
    "condition_embedding_align.proj_p.weight",
    "condition_embedding_align.cross_attn.in_proj_weight",
    "condition_embedding_align.cross_attn.out_proj.weight",
    "condition_embedding_align.ffn_pose.0.weight",
    "patch_embedding_fuse.weight",
    "img_emb.proj.1.weight",
}
"""Weights of linear layers, 1 x 1 and three-dimensional convolutions and packed attention."""


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_small_modules_may_be_fp8_too(tmp_path, scale, per_row):
    def choose(name, value):
        return name in SMALL or formats.is_block_linear(name, value)

    path = tmp_path / "Wan21_SteadyDancer_fp8_e4m3fn_scaled_KJ.safetensors"
    expected = formats.fp8(
        STATES["steady_dancer"], path, scale=scale, per_row=per_row, choose=choose, marks="kijai"
    )
    module, report = load(path, "steady_dancer", keep_fp8=True)
    assert set(report.dequantized) == SMALL
    assert formats.same(numbers(module), expected) == []
    stored = {name: value.dtype for name, value in module.state_dict().items()}
    assert {stored[name] for name in SMALL} == {torch.float32}
    assert {d for n, d in stored.items() if n.startswith("condition")} == {torch.float32}
    assert set(stored.values()) == {torch.float32, FP8_DTYPES[0]}
