"""Quantised checkpoints: which scale belongs to which weight, and what must not be in them.

A stored fp8 weight stands for `weight * scale`. Kijai's and Comfy-Org's files, ComfyUI's newer
mixed-precision files, diffusers and LightX2V spell the name of the scale in different ways; a
scale is found from the weight it belongs to, whatever kind of layer that is. A scale that is not
a positive number makes the layer useless without any other sign, so it is always refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, dequantize

QUANTIZED_FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""Layer formats of ComfyUI's mixed-precision files that can be read, and their dtypes."""

MARKERS = ("scaled_fp8", "comfy_quant", "input_scale", "scale_input")
"""Last parts of names that say how a file was quantised, and hold no weight."""

SHOWN = 8
"""How many names an error lists before it counts the rest."""

_PIECE = 2**22
"""Numbers that are looked at at a time."""


def list_names(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def scale_names(key: str) -> tuple[str, ...]:
    """Returns the names under which the scale of a tensor may be stored.

    The last ones are for parameters that are not called `weight`, as the packed
    `cross_attn.in_proj_weight` of SteadyDancer.
    """
    names = [f"{key}.scale_weight", f"{key}.weight_scale", f"{key}_scale"]
    if key.endswith("weight"):
        stem = key.removesuffix("weight")
        names = [f"{stem}scale_weight", f"{stem}weight_scale", *names]
    return tuple(names)


def find_scales(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """Returns the name of each fp8 tensor that has a scale -> the name of the scale.

    Args:
        dtypes: dtype by tensor name.
    """
    found: dict[str, str] = {}
    for key, dtype in dtypes.items():
        if dtype in FP8_DTYPES:
            name = next((scale for scale in scale_names(key) if scale in dtypes), None)
            if name is not None:
                found[key] = name
    return found


def check_scales(name: str, state: Mapping[str, Tensor], scales: Mapping[str, str]) -> None:
    """Refuses scales that are not one positive finite number, or one for each row.

    Tensors on the meta device have no values; of those the shape alone is checked.

    Args:
        name: of the component or file, for the message.
        state: holds the weights and their scales.
        scales: from `find_scales`.

    Raises:
        WeightsError: some scales are odd; the first are named.
    """
    odd, shaped = [], []
    for key, scale_name in scales.items():
        scale = state[scale_name]
        rows = state[key].shape[0] if state[key].ndim else 1
        if scale.numel() != 1 and (scale.shape[0] != rows or scale.numel() != rows):
            shaped.append(f"{scale_name} {tuple(scale.shape)} for {rows} rows")
        elif not scale.is_meta and not bool(_is_positive(scale).all()):
            odd.append(scale_name)
    if shaped:
        raise WeightsError(f"{name}: scales of a wrong shape: {list_names(shaped)}")
    if odd:
        raise WeightsError(
            f"{name}: scales that are zero, negative or not finite: {list_names(odd)}. The file is "
            "damaged; fetch it again or use another file of this model."
        )


def check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    """Refuses tensors that hold NaN or infinity, whatever their dtype. Reads every number.

    Raises:
        WeightsError: some do; the first are named.
    """
    odd = not_finite(state)
    if odd:
        raise WeightsError(
            f"{name}: {len(odd)} tensors hold NaN or infinity: {list_names(odd)}. The file is "
            "damaged; fetch it again or use another file of this model."
        )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold NaN or infinity."""
    return [key for key, value in state.items() if not _is_finite(value)]


def dequantize_state(
    state: Mapping[str, Tensor], dtype: torch.dtype, name: str
) -> dict[str, Tensor]:
    """Returns the state with its fp8 tensors in `dtype` and without their scales.

    Args:
        state: name -> tensor, as `keymaps.drop_markers` leaves it.
        dtype: what fp8 tensors become, scaled in float32 and rounded once.
        name: of the component, for messages.

    Raises:
        WeightsError: a scale is odd (see `check_scales`).
    """
    scales = find_scales({key: value.dtype for key, value in state.items()})
    check_scales(name, state, scales)
    used = set(scales.values())
    made = {}
    for key, value in state.items():
        if key in used:
            continue
        if value.dtype in FP8_DTYPES:
            scale = state[scales[key]].float() if key in scales else None
            value = dequantize(value, scale, dtype)
        made[key] = value
    return made


def check_metadata(
    path: Path, metadata: Mapping[str, str], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Refuses ComfyUI mixed-precision files with layers in other formats than fp8.

    Args:
        path: of the file, for messages.
        metadata: of the safetensors header.
        dtypes: dtype by tensor name.

    Raises:
        WeightsError: the metadata cannot be read, a layer has another format, or its weight is
            stored as something else than the metadata say.
    """
    if "_quantization_metadata" not in metadata:
        return
    try:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        formats = {layer: settings["format"] for layer, settings in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: unreadable quantisation metadata: {error}") from error
    for layer, name in formats.items():
        check_format(f"{path}: layer {layer}", name)
        stored = dtypes.get(f"{layer}.weight", QUANTIZED_FORMATS[name])
        if stored != QUANTIZED_FORMATS[name]:
            raise WeightsError(
                f"{path}: layer {layer} should be {name} by the metadata of the file, but is "
                f"stored as {_short(stored)}. Use another file of this model."
            )


def check_format(place: str, name: object) -> None:
    """Refuses the format of a layer if it is not one of `QUANTIZED_FORMATS`."""
    if name not in QUANTIZED_FORMATS:
        raise WeightsError(
            f"{place} is quantised as {name}, allowed: {', '.join(QUANTIZED_FORMATS)}. Use another "
            "file of this model."
        )


def check_layer_mark(name: str, tensor: Tensor) -> None:
    """Refuses the mark of a layer (`<layer>.comfy_quant`, JSON in bytes) that names no fp8 format.

    Raises:
        WeightsError: the mark cannot be read, or names another format.
    """
    if tensor.is_meta:
        return
    try:
        found = json.loads(bytes(tensor.flatten().tolist()))["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{name}: unreadable quantisation mark: {error!r}") from error
    check_format(f"{name}: the layer", found)


def refuse_integers(path: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuses files whose weights are stored as integers (quanto, LightX2V's int8).

    Raises:
        WeightsError: some are; the first are named.
    """
    found = [
        key
        for key, dtype in dtypes.items()
        if dtype == torch.int8 and key.endswith(("weight", "weight._data"))
    ]
    if found:
        raise WeightsError(
            f"{path}: {len(found)} weights are quantised as int8, which cannot be read: "
            f"{list_names(found)}. Use a bf16, fp8 or GGUF file of this model."
        )


def _is_positive(scale: Tensor) -> Tensor:
    wide = scale.float()
    return wide.isfinite() & (wide > 0)


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all numbers are finite; fp8 is judged by its bits, which is exact."""
    if not tensor.dtype.is_floating_point:
        return True
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), _PIECE):
        piece = flat[first : first + _PIECE]
        if tensor.dtype in FP8_DTYPES:
            magnitude = piece.view(torch.uint8) & 0x7F
            # e4m3fn has no infinity and one NaN; e5m2 has both, in its highest exponent.
            limit = 0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C
            finite = bool((magnitude < limit).all())
        else:
            finite = bool(piece.isfinite().all())
        if not finite:
            return False
    return True


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
