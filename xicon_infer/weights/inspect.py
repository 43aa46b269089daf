"""What a weights file is, told from its header: format, sizes, model, what is missing.

Weights are not read, but for the scales of fp8 layers and the alphas of a LoRA, which are a few
numbers; a file of any size is inspected at once. `inspect_file` knows no model: what a model
expects is given to it (`pipelines.inspect_weights` does) as names and shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES
from xicon_infer.ops.lora_keys import read_lora
from xicon_infer.weights.checkpoint import Checkpoint, open_checkpoint, read_tensors
from xicon_infer.weights.detect import Detected, Kind, describe, detect
from xicon_infer.weights.keymaps import to_vae_names, to_wan_names
from xicon_infer.weights.keymaps_encoders import map_image_encoder, map_text_encoder
from xicon_infer.weights.quantized import (
    MARKERS,
    check_scales,
    find_scales,
    list_names,
    not_finite,
)

_T = TypeVar("_T")

Shapes = Mapping[str, tuple[int, ...]]

_TOKENIZERS = ("spiece_model",)
"""Tensors that hold a tokenizer."""

_GGUF_TOKENIZER = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class DtypeRow:
    """The tensors of one dtype or GGUF type: how many, their numbers, their bytes in the file."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LoraSummary:
    """What a LoRA changes.

    ranks: rank -> pairs of it. targets: kind of layer, as "self_attn.q" -> how many. blocks: how
    many blocks it touches. differences: "diff", "diff_b", "diff_m" -> how many. factors: what the
    pairs are multiplied by besides the strength (alpha / rank) -> how many.
    """

    ranks: dict[int, int]
    targets: dict[str, int]
    blocks: int
    differences: dict[str, int]
    factors: dict[float, int]


@dataclass(frozen=True)
class Inspection:
    """What a file is.

    files: how many hold it. bytes: of all of them. parameters: numbers that are weights; scales,
    marks and tokenizers are none. detected: the model, None if it is unknown. description: the
    model in words. quantization: one line for each scheme. shapes: of the weights, under the
    names that our modules use; empty if they cannot be mapped. missing, unexpected, misshaped:
    against the model of this kind and size; None where nothing was compared. problems: what is
    wrong besides.
    """

    path: Path
    format: str
    files: int
    bytes: int
    tensors: int
    parameters: int
    dtypes: tuple[DtypeRow, ...]
    detected: Detected | None
    description: str
    quantization: tuple[str, ...]
    metadata: dict[str, str]
    tokenizer: str
    lora: LoraSummary | None
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None
    unexpected: tuple[str, ...] | None = None
    misshaped: tuple[str, ...] | None = None

    @property
    def usable(self) -> bool:
        """Returns whether nothing is known to be wrong with the file."""
        odd = (self.missing, self.unexpected, self.misshaped)
        return self.detected is not None and not self.problems and not any(odd)


def inspect_file(
    path: Path, expected: Shapes | None = None, *, check_finite: bool = False
) -> Inspection:
    """Returns what a file is.

    Args:
        path: as `open_checkpoint` takes it.
        expected: shape by name of the tensors that the model has; None compares nothing.
        check_finite: also reads every weight and looks for NaN and infinity; slow.

    Raises:
        WeightsError: the file cannot be opened as a checkpoint at all.
    """
    checkpoint = open_checkpoint(path)
    problems: list[str] = []
    detected = _attempt(lambda: detect(checkpoint.shapes), problems)
    lora = None
    shapes: dict[str, tuple[int, ...]] = {}
    if detected is not None and detected.kind == "lora":
        lora = _attempt(lambda: _summarize_lora(checkpoint), problems)
    elif detected is not None:
        kind = detected.kind
        shapes = _attempt(lambda: _model_shapes(checkpoint, kind), problems) or {}
        _attempt(lambda: _check_scales(checkpoint), problems)
    if check_finite and (odd := _find_nonfinite(checkpoint)):
        problems.append(f"{len(odd)} tensors hold NaN or infinity: {list_names(odd)}")
    found = Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        files=len(set(checkpoint.files.values())),
        bytes=sum(file.stat().st_size for file in set(checkpoint.files.values())),
        tensors=len(checkpoint.shapes),
        parameters=sum(_numel(checkpoint.shapes[name]) for name in _weights(checkpoint)),
        dtypes=_dtype_table(checkpoint),
        detected=detected,
        description="unknown" if detected is None else describe(detected),
        quantization=_schemes(checkpoint),
        metadata=dict(checkpoint.metadata),
        tokenizer=_tokenizer(checkpoint),
        lora=lora,
        shapes=shapes,
        problems=tuple(problems),
    )
    return found if expected is None else compare(found, expected)


def compare(found: Inspection, expected: Shapes) -> Inspection:
    """Returns the inspection with what is missing, unexpected and mis-shaped against a model.

    Args:
        found: from `inspect_file`.
        expected: shape by name of the tensors that the model has.
    """
    shapes = found.shapes
    return replace(
        found,
        missing=tuple(name for name in expected if name not in shapes),
        unexpected=tuple(name for name in shapes if name not in expected),
        misshaped=tuple(
            f"{name} {tuple(shapes[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != tuple(shape)
        ),
    )


def _attempt(work: Callable[[], _T], problems: list[str]) -> _T | None:
    """Returns what `work` returns; where it refuses, notes why and returns None."""
    try:
        return work()
    except WeightsError as error:
        problems.append(error.message)
        return None


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    if name in checkpoint.blocks:
        return checkpoint.blocks[name].size
    return _numel(checkpoint.shapes[name]) * checkpoint.dtypes[name].itemsize


def _type_name(checkpoint: Checkpoint, name: str) -> str:
    if name in checkpoint.blocks:
        return checkpoint.blocks[name].type
    return str(checkpoint.dtypes[name]).removeprefix("torch.")


def _dtype_table(checkpoint: Checkpoint) -> tuple[DtypeRow, ...]:
    """Returns one row for each dtype, that with the most bytes first."""
    names: dict[str, list[str]] = {}
    for name in checkpoint.shapes:
        names.setdefault(_type_name(checkpoint, name), []).append(name)
    rows = [
        DtypeRow(
            kind,
            len(inside),
            sum(_numel(checkpoint.shapes[name]) for name in inside),
            sum(_stored_bytes(checkpoint, name) for name in inside),
        )
        for kind, inside in names.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _weights(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the tensors that are weights."""
    scales = set(find_scales(checkpoint.dtypes).values())
    return [
        name
        for name in checkpoint.shapes
        if name not in scales
        and name not in _TOKENIZERS
        and name.rpartition(".")[2] not in (*MARKERS, "alpha")
    ]


def _schemes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns how the weights are quantised, one line for each scheme; () for none."""
    lines = []
    blocks = Counter(checkpoint.quantized.values())
    if blocks:
        types = ", ".join(f"{count} x {name}" for name, count in blocks.most_common())
        lines.append(f"GGUF blocks: {types}; dequantised on reading")
    scales = find_scales(checkpoint.dtypes)
    marked = "_quantization_metadata" in checkpoint.metadata or any(
        name.endswith("comfy_quant") for name in checkpoint.shapes
    )
    for dtype in FP8_DTYPES:
        names = [name for name, found in checkpoint.dtypes.items() if found == dtype]
        names = [name for name in names if name.rpartition(".")[2] not in MARKERS]
        one = [n for n in names if n in scales and _numel(checkpoint.shapes[scales[n]]) == 1]
        rows = [n for n in names if n in scales and n not in one]
        plain = len(names) - len(one) - len(rows)
        label = str(dtype).removeprefix("torch.") + (", ComfyUI mixed precision" if marked else "")
        for count, how in (
            (len(one), "one scale each"),
            (len(rows), "one scale a row"),
            (plain, "no scales"),
        ):
            if count:
                lines.append(f"{label}: {count} tensors, {how}")
    return tuple(lines)


def _tokenizer(checkpoint: Checkpoint) -> str:
    """Returns which tokenizer is inside, "" for none."""
    for name in _TOKENIZERS:
        if name in checkpoint.shapes:
            return f"SentencePiece model, {_numel(checkpoint.shapes[name])} bytes ({name})"
    if _GGUF_TOKENIZER in checkpoint.metadata:
        return f"{checkpoint.metadata[_GGUF_TOKENIZER]} in the GGUF metadata, which are not used"
    return ""


def _meta(checkpoint: Checkpoint, real: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors without values for all names, but the real ones where they are given."""
    return {
        name: real[name]
        if name in real
        else torch.empty(shape, dtype=checkpoint.dtypes[name], device="meta")
        for name, shape in checkpoint.shapes.items()
    }


def _model_shapes(checkpoint: Checkpoint, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights under the names of our modules."""
    marks = [name for name in checkpoint.shapes if name.endswith("comfy_quant")]
    state = _meta(checkpoint, read_tensors(checkpoint, marks))
    if kind == "text_encoder":
        mapped = map_text_encoder(state)
    elif kind == "image_encoder":
        mapped = map_image_encoder(state)
    else:
        mapped = to_vae_names(state) if kind == "vae" else to_wan_names(state)
    scales = set(find_scales({name: value.dtype for name, value in mapped.items()}).values())
    return {name: tuple(value.shape) for name, value in mapped.items() if name not in scales}


def _check_scales(checkpoint: Checkpoint) -> None:
    """Reads the scales and refuses odd ones."""
    scales = find_scales(checkpoint.dtypes)
    state = _meta(checkpoint, read_tensors(checkpoint, list(scales.values())))
    check_scales("scales", state, scales)


def _find_nonfinite(checkpoint: Checkpoint) -> list[str]:
    """Returns the tensors with NaN or infinity; one is read at a time."""
    return [name for name in checkpoint.shapes if not_finite(read_tensors(checkpoint, [name]))]


def _summarize_lora(checkpoint: Checkpoint) -> LoraSummary:
    small = [name for name, shape in checkpoint.shapes.items() if _numel(shape) == 1]
    deltas = read_lora(_meta(checkpoint, read_tensors(checkpoint, small)))
    pairs = {path: delta for path, delta in deltas.items() if delta.down is not None}
    ranks = Counter(delta.down.shape[0] for delta in pairs.values() if delta.down is not None)
    differences = {
        kind: count
        for kind in ("diff", "diff_b", "diff_m")
        if (count := sum(getattr(delta, kind) is not None for delta in deltas.values()))
    }
    inside = [(path, *path.split(".", 2)) for path in deltas]
    return LoraSummary(
        ranks=dict(ranks.most_common()),
        targets=dict(sorted(Counter(_layer_kind(path) for path in pairs).items())),
        blocks=len({parts[2] for parts in inside if parts[1] == "blocks"}),
        differences=differences,
        factors=dict(Counter(round(delta.factor, 6) for delta in pairs.values()).most_common()),
    )


def _layer_kind(path: str) -> str:
    """Returns "self_attn.q" for "blocks.7.self_attn.q"; a path outside the blocks stays."""
    return path.split(".", 2)[-1] if path.startswith("blocks.") else path
