"""Text encoder, image encoder and VAE in every published naming and format."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pipelines import tiny
from tests.weights import formats
from xicon_infer.models import text, vae, vision
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.detect import detect, refuse_other_kind
from xicon_infer.weights.keymaps import to_vae_names
from xicon_infer.weights.keymaps_encoders import (
    map_image_encoder,
    map_text_encoder,
    sentencepiece_bytes,
)
from xicon_infer.weights.strict import DtypePolicy, load_strict

FLOAT32 = DtypePolicy(torch.float32, keep_fp8=False)
EMBEDDED = "encoder.embed_tokens.weight"


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def load(path, kind, *, num_heads=4):
    checkpoint = open_checkpoint(path)
    found = detect(checkpoint.shapes)
    refuse_other_kind(found, kind, path)
    stored = read_tensors(checkpoint, dtype=torch.float32)
    if kind == "text_encoder":
        state = map_text_encoder(stored, dtype=torch.float32)
        module = on_meta(lambda: text.build_text_encoder(text.config_from_shapes(shapes_of(state))))
    elif kind == "image_encoder":
        state = map_image_encoder(stored)
        config = vision.config_from_shapes(shapes_of(state), num_heads=num_heads)
        module = on_meta(lambda: vision.build_image_encoder(config))
    else:
        state = to_vae_names(stored)
        module = on_meta(lambda: vae.WanVAE(vae.config_from_shapes(shapes_of(state))))
    load_strict(module, state, name=kind, device="cpu", dtype_policy=FLOAT32)
    return found, dict(module.state_dict())


# Text encoder: 256 wide for the blocks of the K types.
TEXT_CONFIG = replace(tiny.tiny_text_config(), d_model=256, d_kv=64, d_ff=256, num_layers=2)
TEXT = {
    name: value.clone()
    for name, value in tiny.seeded_state(
        on_meta(lambda: text.build_text_encoder(TEXT_CONFIG))
    ).items()
    if name != EMBEDDED
}
T5_PARTS = {
    "layer.0.layer_norm": ("norm1", "attn_norm"),
    "layer.0.SelfAttention.q": ("attn.q", "attn_q"),
    "layer.0.SelfAttention.k": ("attn.k", "attn_k"),
    "layer.0.SelfAttention.v": ("attn.v", "attn_v"),
    "layer.0.SelfAttention.o": ("attn.o", "attn_o"),
    "layer.0.SelfAttention.relative_attention_bias": ("pos_embedding.embedding", "attn_rel_b"),
    "layer.1.layer_norm": ("norm2", "ffn_norm"),
    "layer.1.DenseReluDense.wi_0": ("ffn.gate.0", "ffn_gate"),
    "layer.1.DenseReluDense.wi_1": ("ffn.fc1", "ffn_up"),
    "layer.1.DenseReluDense.wo": ("ffn.fc2", "ffn_down"),
}
"""transformers' part of a block -> (Wan's, llama.cpp's)."""


def t5_name(name, naming):
    which = ("wan", "gguf").index(naming)
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    if match is None:
        ends = {
            "shared.weight": ("token_embedding.weight", "token_embd.weight"),
            "encoder.final_layer_norm.weight": ("norm.weight", "enc.output_norm.weight"),
        }
        return ends[name][which]
    start = ("blocks", "enc.blk")[which]
    return f"{start}.{match[1]}.{T5_PARTS[match[2]][which]}.weight"


def t5_linear(name, value):
    return ("SelfAttention" in name or "Dense" in name) and "bias" not in name


def wan_text():
    return {t5_name(name, "wan"): value for name, value in TEXT.items()}


def back(expected):
    """Numbers under Wan's names -> under transformers'."""
    names = {t5_name(name, "wan"): name for name in TEXT}
    return {names[name]: value for name, value in expected.items()}


def wan_fp8(path):
    """Kijai's umt5-xxl-enc-fp8_e4m3fn: plain fp8 in the linear layers, wider elsewhere."""
    linear = {t5_name(n, "wan") for n, v in TEXT.items() if t5_linear(n, v)}
    return back(formats.fp8(wan_text(), path, scale=None, choose=lambda n, v: n in linear))


def comfy_scaled(path, *, scale="scale_weight", marks="kijai"):
    """Comfy-Org's umt5_xxl_fp8_e4m3fn_scaled, with the tokenizer inside."""
    spiece = {"spiece_model": torch.tensor(list(b"sentencepiece"), dtype=torch.uint8)}
    expected = formats.fp8(TEXT | spiece, path, scale=scale, choose=t5_linear, marks=marks)
    assert sentencepiece_bytes(read_tensors(open_checkpoint(path))) == b"sentencepiece"
    return {name: value for name, value in expected.items() if name != "spiece_model"}


def text_gguf(path, kind, *, arch="t5encoder", beside=None):
    fields = {"tokenizer.ggml.tokens": [f"<{n}>" for n in range(40)]}
    state = TEXT | (beside or {})
    expected = formats.write_gguf(
        state, path, kind, arch=arch, choose=t5_linear, fields=fields,
        rename=lambda name: name if name.startswith("dec.") else t5_name(name, "gguf"),
    )  # fmt: skip
    return {name: expected[name] for name in TEXT}


TEXT_FILES = {
    "wan pth": ("m.pth", lambda p: back(formats.pickled(wan_text(), p))),
    "wan bf16": (
        "m.safetensors",
        lambda p: back(formats.plain(wan_text(), p, dtype=torch.bfloat16)),
    ),
    "wan fp8": ("m.safetensors", wan_fp8),
    "transformers fp16": ("m.safetensors", lambda p: formats.plain(TEXT, p, dtype=torch.float16)),
    "transformers, both embeddings": (
        "m.safetensors",
        lambda p: _without(
            formats.plain(TEXT | {EMBEDDED: TEXT["shared.weight"].clone()}, p), EMBEDDED
        ),
    ),
    "transformers shards": (
        "model.safetensors.index.json",
        lambda p: formats.sharded(TEXT, p),
    ),
    "Comfy scaled": ("m.safetensors", comfy_scaled),
    "Comfy mixed": (
        "m.safetensors",
        lambda p: comfy_scaled(p, scale="weight_scale", marks="comfy"),
    ),
    **{
        f"GGUF {kind}": ("m.gguf", lambda p, kind=kind: text_gguf(p, kind))
        for kind in ("F32", "F16", "BF16", *formats.LEGACY, *formats.K_TYPES)
    },
    "GGUF with a decoder": (
        "m.gguf",
        lambda p: text_gguf(
            p, "Q8_0", arch="t5", beside={"dec.blk.0.attn_q.weight": torch.ones(4, 4)}
        ),
    ),
}


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_encoder(tmp_path, name):
    file, write = TEXT_FILES[name]
    expected = write(tmp_path / file)
    found, state = load(tmp_path / file, "text_encoder")
    assert found.naming == {"wa": "wan", "GG": "gguf"}.get(name[:2], "transformers")
    assert found.dims["d_model"] == 256
    assert found.dims["num_layers"] == 2
    state.pop(EMBEDDED, None)  # one tensor under two names
    assert formats.same(state, expected) == []


TOWER_CONFIG = replace(tiny.TINY_VISION, num_layers=tiny.TINY_VISION.num_layers + 1)
TOWER = tiny.seeded_state(on_meta(lambda: vision.build_image_encoder(TOWER_CONFIG)))
POST = {f"post_layernorm.{part}": torch.ones(TOWER_CONFIG.width) for part in ("weight", "bias")}
CLIP_PARTS = (
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.out_proj", "attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("pre_layrnorm", "visual.pre_norm"),
    ("post_layernorm", "visual.post_norm"),
    ("encoder.layers", "visual.transformer"),
)


def expected_tower():
    """What Wan uses: all layers but the last."""
    last = f"encoder.layers.{TOWER_CONFIG.num_layers - 1}."
    return {name: value for name, value in TOWER.items() if not name.startswith(last)}


def official_tower():
    made = {
        "visual.cls_embedding": TOWER["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": TOWER["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": TOWER["embeddings.patch_embedding.weight"],
        "visual.head": torch.ones(4, 4),
    }
    for name, value in (TOWER | POST).items():
        if "self_attn.q_proj" in name:
            rest = [TOWER[name.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
            name, value = name.replace("self_attn.q_proj", "attn.to_qkv"), torch.cat([value, *rest])
        if not name.startswith("embeddings.") and "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in CLIP_PARTS:
                name = name.replace(ours, theirs)
            made[name] = value.clone()
    return made


def wide(state):
    return {name: value.half().float() for name, value in state.items()}


COMFY = {f"vision_model.{name}": value for name, value in (TOWER | POST).items()}
PROJECTION = {"visual_projection.weight": torch.ones(4, 4)}
TEXT_HALF = {"textual.token_embedding.weight": torch.ones(2, 2), "log_scale": torch.ones(())}
IMAGE_FILES = {
    "clip_vision_h": (
        "m.safetensors",
        lambda p: formats.plain(COMFY | PROJECTION, p, dtype=torch.float16),
        wide,
    ),
    "transformers 5": ("m.safetensors", lambda p: formats.plain(TOWER | POST, p), dict),
    "official pth": (
        "m.pth",
        lambda p: formats.pickled(official_tower(), p, beside=TEXT_HALF),
        dict,
    ),
    "Kijai visual fp16": (
        "m.safetensors",
        lambda p: formats.plain(official_tower(), p, dtype=torch.float16),
        wide,
    ),
}


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_image_encoder(tmp_path, name):
    file, write, rounded = IMAGE_FILES[name]
    write(tmp_path / file)
    found, state = load(tmp_path / file, "image_encoder")
    assert found.dims["width"] == TOWER_CONFIG.width
    assert formats.same(state, rounded(expected_tower())) == []


VAE = tiny.tiny_vae_state(replace(tiny.TINY_VAE, dim=8))


def diffusers_vae(name):
    """Returns diffusers' name of a VAE parameter, by the table of the specification."""
    middle = re.fullmatch(r"(encoder|decoder)\.middle\.([012])\.(.+)", name)
    down = re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", name)
    up = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name)
    if middle:
        place = "attentions.0" if middle[2] == "1" else f"resnets.{int(middle[2]) // 2}"
        return f"{middle[1]}.mid_block.{place}.{_residual(middle[3])}"
    if down:
        return f"encoder.down_blocks.{down[1]}.{_residual(down[2])}"
    if up:
        block, inside = divmod(int(up[1]), 4)
        place = "upsamplers.0" if inside == 3 else f"resnets.{inside}"
        return f"decoder.up_blocks.{block}.{place}.{_residual(up[2])}"
    for ours, theirs in (
        ("encoder.conv1.", "encoder.conv_in."),
        ("decoder.conv1.", "decoder.conv_in."),
        (".head.0.", ".norm_out."),
        (".head.2.", ".conv_out."),
    ):
        if ours in name:
            return name.replace(ours, theirs)
    return {"conv1": "quant_conv.", "conv2": "post_quant_conv."}[name[:5]] + name[6:]


def _residual(rest):
    for ours, theirs in (
        ("residual.0.", "norm1."),
        ("residual.2.", "conv1."),
        ("residual.3.", "norm2."),
        ("residual.6.", "conv2."),
        ("shortcut.", "conv_shortcut."),
    ):
        if rest.startswith(ours):
            return theirs + rest.removeprefix(ours)
    return rest


def diffusers_state():
    return {diffusers_vae(name): value for name, value in VAE.items()}


def bf16(state):
    return {name: value.bfloat16().float() for name, value in state.items()}


VAE_FILES = {
    "official pth": ("m.pth", lambda p: formats.pickled(VAE, p), dict),
    "pth nested": ("m.pth", lambda p: formats.pickled(VAE, p, nest=("state_dict",)), dict),
    "Comfy-Org": ("m.safetensors", lambda p: formats.plain(VAE, p), dict),
    "Kijai bf16": ("m.safetensors", lambda p: formats.plain(VAE, p, dtype=torch.bfloat16), bf16),
    "prefix": ("m.safetensors", lambda p: formats.plain(VAE, p, prefix="model."), dict),
    "diffusers": ("m.safetensors", lambda p: formats.plain(diffusers_state(), p), dict),
    "GGUF": ("m.gguf", lambda p: formats.write_gguf(VAE, p, arch="pig"), dict),
}


@pytest.mark.parametrize("name", VAE_FILES)
def test_vae(tmp_path, name):
    file, write, rounded = VAE_FILES[name]
    write(tmp_path / file)
    found, state = load(tmp_path / file, "vae")
    assert found.naming == ("diffusers" if name == "diffusers" else "original")
    assert formats.same(state, rounded(VAE)) == []


def test_a_scaled_vae(tmp_path):
    """Nobody publishes one; the rule that any weight may be fp8 holds here, too."""

    def choose(name, value):
        return value.ndim == 5 and name.startswith("decoder.middle")

    path = tmp_path / "m.safetensors"
    expected = formats.fp8(VAE, path, choose=choose, marks="kijai")
    _, state = load(path, "vae")
    assert formats.same(state, expected) == []
