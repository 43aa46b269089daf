"""Tensor names of text and image encoder files, brought to the names the modules have.

Each function recognises the naming of a file by its content and knows every name that may occur;
a name it does not know is an error, never skipped. Whether all names are there is checked by the
strict loading that follows. Values change in two places only: fp8 weights are dequantised, and a
joint query-key-value matrix is cut in three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from xicon_infer.errors import WeightsError
from xicon_infer.weights.keymaps import drop_markers, strip_prefix
from xicon_infer.weights.quantized import dequantize_state

State = Mapping[str, torch.Tensor]
_Rename = Callable[[str], "tuple[str, ...] | None"]
"""Returns the new names of a tensor (none: ignored by name), or None if its name is unknown."""

_TOKENIZER = "spiece_model"
"""The tensor in which Comfy-Org's files bring the SentencePiece model, as bytes."""

_T5_EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")
_T5_NORM = "encoder.final_layer_norm.weight"
_T5_PARTS = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
"""Wan's name of a part of a block -> transformers'. All parts have a weight and no bias."""

_GGUF_PARTS = {
    "attn_norm": "norm1",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_o": "attn.o",
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_norm": "norm2",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}
"""llama.cpp's name of a part of a block -> Wan's.

Source: city96/ComfyUI-GGUF: loader.py (T5_SD_MAP)
"""

_CLIP_TOP = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.patch_embedding.weight": "embeddings.patch_embedding.weight",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.pre_norm.weight": "pre_layrnorm.weight",
    "visual.pre_norm.bias": "pre_layrnorm.bias",
    "visual.post_norm.weight": "post_layernorm.weight",
    "visual.post_norm.bias": "post_layernorm.bias",
}
_CLIP_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CLIP_LAYER = re.compile(
    r"encoder\.layers\.(\d+)\."
    r"(layer_norm[12]|mlp\.fc[12]|self_attn\.(?:q|k|v|out)_proj)\.(?:weight|bias)"
)
_CLIP_IGNORED = ("visual_projection.weight", "logit_scale", "text_projection.weight")
"""Of a whole CLIP in transformers' naming, beside `text_model.*` and the counter `position_ids`."""


def map_text_encoder(
    state: State, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a UMT5 file under the names of transformers' UMT5EncoderModel.

    Known are Wan's naming (Wan-AI, Kijai), transformers' (Comfy-Org), each plain, fp8, or fp8
    with scales, and that of GGUF files (llama.cpp). The embedding appears under its two names as
    one tensor.

    Args:
        state: name -> tensor, as the file has them.
        dtype: what fp8 weights become (scaled in float32); other weights keep their dtype.

    Returns:
        name -> tensor; loads with strict=True into `models.text.build_text_encoder`.

    Raises:
        WeightsError: a name fits no naming, or a weight is quantised in another way.
    """
    state = _plain(state, dtype, "text_encoder")
    if "token_embd.weight" in state:
        rename: _Rename = _gguf_text_name
    else:
        rename = _wan_text_name if "token_embedding.weight" in state else _transformers_text_name
    return _rename_all(state, rename, "text_encoder", "umt5-xxl")


def sentencepiece_bytes(state: State) -> bytes | None:
    """Returns the tokenizer inside a text encoder file (`models.tokenizer` reads it), or None.

    Args:
        state: name -> tensor; Comfy-Org's files have a uint8 tensor `spiece_model`.
    """
    spiece = state.get(_TOKENIZER)
    return None if spiece is None else spiece.cpu().numpy().tobytes()


def map_image_encoder(state: State, *, every_layer: bool = False) -> dict[str, torch.Tensor]:
    """Returns the tensors of a CLIP file under the names of transformers' vision tower.

    Known are `clip_vision_h` (transformers 4 and 5: with and without `vision_model.`) and the
    official `visual.*`. The post norm is left out, and so is the last layer: Wan uses the state
    before it. A file without post norm has been cut already and keeps its layers.

    Args:
        state: name -> tensor, as the file has them.
        every_layer: whether to keep the last layer.

    Returns:
        name -> tensor; loads with strict=True into `models.vision.build_image_encoder`.

    Raises:
        WeightsError: a name fits neither naming, or a weight is quantised in an unknown way.
    """
    state = _plain(state, torch.bfloat16, "image_encoder")
    if "visual.cls_embedding" in state:
        state = _unpack_official(state)
        rename = _official_image_name
    else:
        rename = _transformers_image_name
    mapped = _rename_all(state, rename, "image_encoder", "clip_vision_h")
    cut = ["post_layernorm."]
    if "post_layernorm.weight" in mapped and not every_layer:
        layers = [int(match[1]) for key in mapped if (match := _CLIP_LAYER.fullmatch(key))]
        cut.append(f"encoder.layers.{max(layers, default=0)}.")
    return {key: tensor for key, tensor in mapped.items() if not key.startswith(tuple(cut))}


def _wan_text_name(key: str) -> tuple[str, ...] | None:
    if key == "token_embedding.weight":
        return _T5_EMBEDDING
    if key == "norm.weight":
        return (_T5_NORM,)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key)
    if match is None or match[2] not in _T5_PARTS:
        return None
    return (f"encoder.block.{match[1]}.{_T5_PARTS[match[2]]}.weight",)


def _gguf_text_name(key: str) -> tuple[str, ...] | None:
    if key == "token_embd.weight":
        return _T5_EMBEDDING
    if key == "enc.output_norm.weight":
        return (_T5_NORM,)
    if key.startswith("dec.") or key == "output.weight":  # the decoder of a whole T5
        return ()
    match = re.fullmatch(r"enc\.blk\.(\d+)\.(.+)\.weight", key)
    if match is None or match[2] not in _GGUF_PARTS:
        return None
    return (f"encoder.block.{match[1]}.{_T5_PARTS[_GGUF_PARTS[match[2]]]}.weight",)


def _transformers_text_name(key: str) -> tuple[str, ...] | None:
    if key in _T5_EMBEDDING:
        return _T5_EMBEDDING
    match = re.fullmatch(r"encoder\.block\.\d+\.(.+)\.weight", key)
    known = key == _T5_NORM or (match is not None and match[1] in _T5_PARTS.values())
    return (key,) if known else None


def _official_image_name(key: str) -> tuple[str, ...] | None:
    if key in _CLIP_TOP:
        return (_CLIP_TOP[key],)
    if key.startswith("textual.") or key in ("log_scale", "visual.head"):
        return ()
    match = re.fullmatch(r"visual\.transformer\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return None
    layer, part, kind = match.groups()
    part = _CLIP_PARTS.get(part, part)
    name = f"encoder.layers.{layer}.{part}.{kind}"
    return (name,) if _CLIP_LAYER.fullmatch(name) else None


def _transformers_image_name(key: str) -> tuple[str, ...] | None:
    name = key.removeprefix("vision_model.")
    if name in _CLIP_TOP.values() or _CLIP_LAYER.fullmatch(name):
        return (name,)
    ignored = key in _CLIP_IGNORED or key.startswith("text_model.")
    return () if ignored or name == "embeddings.position_ids" else None


def _unpack_official(state: State) -> dict[str, torch.Tensor]:
    """Returns an official CLIP with joint projections cut in three and no axes of size one.

    The order of the three is query, key, value; each becomes a tensor of its own. The class
    embedding [1, 1, C] becomes [C], the position table [1, L, C] becomes [L, C].
    """
    result: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if ".attn.to_qkv." in key:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[key.replace(".attn.to_qkv.", f".self_attn.{letter}_proj.")] = part.clone()
        elif key in ("visual.cls_embedding", "visual.pos_embedding"):
            result[key] = tensor.squeeze()
        else:
            result[key] = tensor
    return result


def _rename_all(
    state: State, rename: _Rename, field: str, expected: str
) -> dict[str, torch.Tensor]:
    """Returns the tensors under their new names.

    Raises:
        WeightsError: some names are unknown; the first are listed.
    """
    result: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        names = rename(key)
        if names is None:
            unknown.append(key)
        for name in names or ():
            result[name] = tensor
    if unknown or not result:
        listed = ", ".join(sorted(unknown)[:5]) or "the file is empty"
        raise WeightsError(
            f"{field}: {len(unknown)} tensor names fit no known naming ({listed}); use a "
            f"{expected} file in Wan, Comfy-Org or transformers naming",
            field=field,
        )
    return result


def _plain(state: State, dtype: torch.dtype, field: str) -> dict[str, torch.Tensor]:
    """Returns the state with floating-point weights and without what only quantisation needs.

    Args:
        state: name -> tensor, with or without a prefix.
        dtype: what fp8 weights become.
        field: what to call the file in an error.

    Raises:
        WeightsError: a scale has no fp8 weight, is no positive number or fits no axis; or a weight
            is of a kind that is not floating point.

    Source: Comfy-Org/ComfyUI: comfy/ops.py (scaled fp8)
    """
    marked = {key: tensor for key, tensor in state.items() if key != _TOKENIZER}
    weights = dequantize_state(drop_markers(strip_prefix(marked)), dtype, field)
    _refuse(field, "scale without a weight", [k for k in weights if k.endswith(".scale_weight")])
    _refuse(
        field,
        "weight that is neither a float nor fp8",
        [
            key
            for key, tensor in weights.items()
            if not tensor.is_floating_point() and not key.endswith("position_ids")
        ],
    )
    return weights


def _refuse(field: str, what: str, keys: Iterable[str]) -> None:
    """Raises a WeightsError that lists the keys, if there are any."""
    if found := sorted(keys):
        raise WeightsError(
            f"{field}: {len(found)} x {what} ({', '.join(found[:5])}); use a bf16 or fp8 file",
            field=field,
        )
