"""The fast file of a transformer: LoRAs merged in, stored as it will run, in the order of use.

From any checkpoint that can be read comes a pair of safetensors files (`pipelines.prepared`) that
a loader streams to the device without converting anything. Weights of linear layers in the blocks
are fp8 with one scale per row, or bfloat16; everything else keeps its dtype, or becomes float32
where a LoRA changed it. The same inputs give the same bytes on the same machine.

One layer at a time is held in float32 (of a GGUF file one block), never the model. Both files are
written under temporary names, read back through the ordinary loader, and renamed last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.loading import KINDS, transformer_class
from pipelines.prepared import (
    FORMAT_VERSION,
    PREPARED,
    SUFFIX,
    Prepared,
    context_path,
    describe,
    is_context_name,
)
from pipelines.tensor_writer import TensorWriter
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.models.wan import config_from_shapes
from xicon_infer.ops.fp8_guard import guarded_quantize, place_reason
from xicon_infer.ops.linear import FP8_DTYPES
from xicon_infer.ops.lora import check_strengths, merged_weight
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.ops.lora_plan import LoraReport, Piece, plan_loras
from xicon_infer.types import Progress
from xicon_infer.weights.checkpoint import Checkpoint, open_checkpoint, read_tensors
from xicon_infer.weights.detect import detect
from xicon_infer.weights.keymaps import (
    OWN_PARTS,
    find_naming,
    find_prefix,
    to_wan_names,
    wan_names,
)
from xicon_infer.weights.quantized import check_finite, check_scales, find_scales, list_names
from xicon_infer.weights.strict import dit_policy, load_strict

FileStorage = Literal["fp8", "bf16"]

_WIDE = torch.bfloat16
_METADATA_BYTES = 2**20
"""Room for the description: the names of all LoRAs, and of a thousand guarded layers."""

_PIECE = 2**24
"""Bytes hashed at a time."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

_ORDER = (
    "patch_embedding",
    "text_embedding",
    "img_emb",
    "time_embedding",
    "time_projection",
    "modulation",
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.norm_q",
    "self_attn.norm_k",
    "self_attn.o",
    "norm3",
    "cross_attn.q",
    "cross_attn.norm_q",
    "cross_attn.o",
    "cross_attn.k",
    "cross_attn.norm_k",
    "cross_attn.v",
    "cross_attn.k_img",
    "cross_attn.norm_k_img",
    "cross_attn.v_img",
    "ffn.0",
    "ffn.2",
    "head",
)
"""Modules in the order in which a forward uses them, inside a block and outside."""


@dataclass(frozen=True)
class _Source:
    """A checkpoint seen through the original names.

    names: stage -> tensors of the file; stage 0 comes before the blocks, then a stage per block,
    then the head. mark: a tensor that tells the layout of the file where a stage alone would not.
    shapes: of the tensors under original names. scales: fp8 tensor -> its scale. module: the model
    they belong to, on the meta device.
    """

    checkpoint: Checkpoint
    kind: str
    names: dict[int, list[str]]
    mark: list[str]
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, str]
    module: nn.Module
    num_blocks: int


def prepare(
    transformer: Path,
    loras: Sequence[tuple[Path, float]],
    output: Path,
    *,
    storage: FileStorage,
    progress: Progress,
    overwrite: bool = False,
) -> Prepared:
    """Makes the fast file of a transformer and returns what it is.

    Args:
        transformer: any checkpoint of a Wan transformer: file, index or folder.
        loras: files and strengths, merged in; strength 0 is left out.
        output: the first file, `NAME.safetensors`; `NAME.kv.safetensors` comes beside it.
        storage: of the linear layers in the blocks. "fp8" leaves those wide that fp8 would harm
            (`xicon_infer.ops.fp8_guard`).
        progress: gets a step per tensor, and a warning per LoRA of which a part fits nowhere.
        overwrite: replace files that are there.

    Raises:
        InvalidRequest: an option is wrong, or a file is there already.
        WeightsError: a file cannot be read or written, is no transformer, lacks tensors or holds
            NaN; no part of a LoRA fits.
    """
    _check_options(transformer, loras, output, storage, overwrite)
    source = _open_source(transformer)
    files = [_read_lora(path, strength) for path, strength in loras if strength]
    pieces, skipped = plan_loras(source.shapes, [(lora, s) for lora, s, _ in files], None)
    for line in LoraReport((), tuple(skipped)).warnings():
        progress.warn(line)
    about: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "kind": source.kind,
        "storage": storage,
        "transformer": _source_entry(source.checkpoint),
        "loras": [entry for _, _, entry in files],
    }
    final = (output, context_path(output))
    paths = tuple(path.with_name(f".{path.name}.{os.getpid()}.partial") for path in final)
    try:
        with progress.stage("prepare"):
            _write(source, pieces, about, paths, progress)
            _check_loads(source, paths)
        _publish(paths, final)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    found = describe(open_checkpoint(output))
    assert found is not None
    return found


def _write(
    source: _Source,
    pieces: Mapping[str, Sequence[Piece]],
    about: dict[str, Any],
    paths: tuple[Path, ...],
    progress: Progress,
) -> None:
    """Writes both files tensor by tensor; adds guarded layers and the hash to the description."""
    rooms = [name for key in source.shapes for name in (key, f"{key}_scale_weight")]
    digests: list[list[Any]] = []
    guarded: dict[str, str] = {}
    with (
        TensorWriter(paths[0], rooms, _METADATA_BYTES) as main,
        TensorWriter(paths[1], rooms, _METADATA_BYTES) as context,
    ):
        for done, (name, value, scale) in enumerate(_read_ordered(source), start=1):
            group = pieces.get(name, ())
            made, reason = _convert(source, name, value, scale, group, about["storage"])
            if reason:
                guarded[name] = reason
            floats = {key: t for key, t in made.items() if t.is_floating_point()}
            check_finite(source.checkpoint.path.name, floats)
            writer = context if is_context_name(name) else main
            for key, tensor in made.items():
                digest = writer.add(key, tensor)
                digests.append([key, str(tensor.dtype), list(tensor.shape), digest])
            progress.step(done, len(source.shapes), "tensor")
        about["guarded"] = guarded
        about["content"] = _digest([about, digests])
        main.finish({PREPARED: json.dumps({**about, "part": "main"})})
        context.finish({PREPARED: json.dumps({**about, "part": "context"})})


def _check_options(
    transformer: Path,
    loras: Sequence[tuple[Path, float]],
    output: Path,
    storage: str,
    overwrite: bool,
) -> None:
    if storage not in ("fp8", "bf16"):
        raise InvalidRequest(f"storage: got {storage!r}, allowed are fp8, bf16", field="storage")
    if not output.name.endswith(SUFFIX) or output.name == SUFFIX:
        raise InvalidRequest(f"output: {output} must end with {SUFFIX}", field="output")
    check_strengths([(LoraFile(path.name, {}), strength) for path, strength in loras])
    there = [path for path in (output, context_path(output)) if path.exists()]
    if any(path.samefile(source) for path in there for source in (transformer, *dict(loras))):
        raise InvalidRequest(f"output: {output} is one of the inputs", field="output")
    if there and not overwrite:
        raise InvalidRequest(
            f"output: {there[0]} is there already. Choose another name, or allow overwriting.",
            field="output",
        )


def _open_source(path: Path) -> _Source:
    checkpoint = open_checkpoint(path)
    if describe(checkpoint) is not None:
        raise InvalidRequest(
            f"transformer: {path} is prepared already; use the file it was made from",
            field="transformer",
        )
    kind = detect(checkpoint.shapes).kind
    pipeline = next((name for name, kinds in KINDS.items() if kind in kinds), None)
    if pipeline is None:
        raise WeightsError(
            f"transformer: {path} is a {kind} file; only transformers are prepared, of "
            f"{', '.join(sorted(KINDS))}",
            field="transformer",
        )
    prefix = find_prefix(checkpoint.shapes)
    plain = {
        name: name.removeprefix(prefix)
        for name in checkpoint.shapes
        if name.startswith(prefix) or prefix not in OWN_PARTS
    }
    naming = find_naming(plain.values())
    names: dict[int, list[str]] = {}
    for name, inside in plain.items():
        names.setdefault(_place(wan_names(inside, naming)[0])[0], []).append(name)
    marked = [name for name, inside in plain.items() if find_naming([inside]) != "wan"]
    # Marks of single layers hold their text in the tensor, of which there is none here.
    meta = {
        name: torch.empty(checkpoint.shapes[name], dtype=checkpoint.dtypes[name], device="meta")
        for name in plain
        if not name.endswith("comfy_quant")
    }
    renamed = to_wan_names(meta)
    scales = find_scales({name: tensor.dtype for name, tensor in renamed.items()})
    shapes = {n: tuple(t.shape) for n, t in renamed.items() if n not in set(scales.values())}
    config = config_from_shapes(shapes)
    with torch.device("meta"):
        module = transformer_class(pipeline)(config)
    _check_shapes(path, {n: tuple(t.shape) for n, t in module.state_dict().items()}, shapes)
    return _Source(
        checkpoint, kind, names, marked[:1], shapes, scales, module, num_blocks=config.num_layers
    )


def _check_shapes(
    path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses a file that does not fit its model before hours of work go into it."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of a wrong shape": [n for n in expected if n in found and found[n] != expected[n]],
    }
    texts = [
        f"{len(names)} {what}: {list_names(names)}" for what, names in problems.items() if names
    ]
    if texts:
        raise WeightsError(f"{path}: the file does not fit its model. {'; '.join(texts)}")


def _place(name: str) -> tuple[int, int, str]:
    """Returns the order of a tensor: stage, module inside it, and name."""
    block = _BLOCK.fullmatch(name)
    inside = block[2] if block else name
    fitting = (i for i, module in enumerate(_ORDER) if inside == module or _under(inside, module))
    stage = int(block[1]) + 1 if block else 2**31 if name.startswith("head") else 0
    return stage, next(fitting, len(_ORDER)), name


def _under(name: str, module: str) -> bool:
    """Returns whether a tensor belongs to a module, or to one that is called like it."""
    return name.startswith((f"{module}.", f"{module}_"))


def _read_ordered(source: _Source) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yields every tensor with its scale in the order of use; one stage is open at a time."""
    for stage in sorted(source.names):
        inside = dict.fromkeys((*source.names[stage], *source.mark))
        read = read_tensors(source.checkpoint, list(inside), dtype=torch.float32)
        state = to_wan_names(read)
        here = {name: state[name] for name in source.shapes if _place(name)[0] == stage}
        scales = {name: source.scales[name] for name in here if name in source.scales}
        check_scales(source.checkpoint.path.name, state, scales)
        for name in sorted(here, key=_place):
            yield name, here[name], state[scales[name]].float() if name in scales else None


def _convert(
    source: _Source,
    name: str,
    value: Tensor,
    scale: Tensor | None,
    pieces: Sequence[Piece],
    storage: FileStorage,
) -> tuple[dict[str, Tensor], str]:
    """Returns what the file gets for a tensor, and why it is wide although storage is fp8."""
    is_fp8 = value.dtype in FP8_DTYPES
    if not (_BLOCK.fullmatch(name) and name.endswith(".weight") and value.ndim == 2):
        if not is_fp8 and not pieces:
            return {name: value}, ""
        dtype = torch.float32 if value.ndim < 2 else dit_policy(_WIDE).dtype_of(name)
        return {name: merged_weight(value, scale, pieces).to(dtype)}, ""
    reason = "" if storage == "bf16" else place_reason(name, source.num_blocks)
    if storage == "fp8" and not reason:
        scale_name = name.removesuffix("weight") + "scale_weight"
        if is_fp8 and not pieces:  # exact: its one scale, repeated
            flat = torch.ones(1) if scale is None else scale.reshape(-1)
            return {scale_name: flat.expand(len(value))[:, None].contiguous(), name: value}, ""
        wide = merged_weight(value, scale, pieces).float()
        fp8, row_scale, reason = guarded_quantize(wide, name=name)
        if not reason:
            return {scale_name: row_scale, name: fp8}, ""
        return {name: wide.to(_WIDE)}, reason
    return {name: merged_weight(value, scale, pieces).to(_WIDE)}, reason


def _read_lora(path: Path, strength: float) -> tuple[LoraFile, float, dict[str, Any]]:
    checkpoint = open_checkpoint(path)
    lora = LoraFile(path.name, read_lora(read_tensors(checkpoint), name=path.name))
    entry = {
        "name": path.name,
        "strength": strength,
        "bytes": checkpoint.path.stat().st_size,
        "sha256": _file_digest(checkpoint.path),
    }
    return lora, strength, entry


def _source_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    files = set(checkpoint.files.values())
    return {
        "name": checkpoint.path.name,
        "bytes": sum(file.stat().st_size for file in files),
    }


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_loads(source: _Source, paths: tuple[Path, ...]) -> None:
    """Reads both files back through the ordinary loader; tensors stay views of the files."""
    state = {n: t for path in paths for n, t in read_tensors(open_checkpoint(path)).items()}
    policy = dit_policy(_WIDE)
    load_strict(source.module, state, name="prepared", device="cpu", dtype_policy=policy)


def _publish(paths: tuple[Path, ...], final: tuple[Path, ...]) -> None:
    """Renames both files. The first is the last to appear, so a pair is whole or not there."""
    final[0].unlink(missing_ok=True)
    for path, target in reversed(list(zip(paths, final, strict=True))):
        path.replace(target)
