"""Writers of every published format, on small files, with the numbers that must come out of each.

A writer takes tensors under our names and a path, and returns the float32 numbers that the file
then stands for: the same ones for a lossless format, the rounded ones for another.
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from xicon_infer.ops.linear import quantize_weight

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def is_block_linear(name, value):
    """The weights that the published quantisers touch: matrices inside the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2


def plain(state, path, *, dtype=torch.float32, prefix=""):
    made = {prefix + name: value.to(dtype) for name, value in state.items()}
    save_file(made, path)
    return {name: value.to(dtype).float() for name, value in state.items()}


def sharded(state, path, *, parts=3):
    """`path` is the index; the shards carry the names that diffusers gives them."""
    names, weight_map = list(state), {}
    stem = path.name.removesuffix(".safetensors.index.json")
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"
        inside = names[part::parts]
        save_file({name: state[name] for name in inside}, path.parent / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(inside, file))
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index))
    (path.parent / "config.json").write_text('{"_class_name": "WanModel"}')
    return dict(state)


def pickled(state, path, *, nest=(), prefix="", zipped=True, beside=None):
    content = {prefix + name: value for name, value in state.items()} | (beside or {})
    for key in reversed(nest):
        content = {key: content, "global_step": 7}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return dict(state)


def fp8(
    state,
    path,
    *,
    dtype=torch.float8_e4m3fn,
    scale="scale_weight",
    per_row=False,
    marks=None,
    choose=is_block_linear,
    prefix="",
):
    """fp8 files. scale: last part of the scale's name, None for no scales; marks: see `_marks`."""
    made, expected, layers = {}, {}, []
    for name, value in state.items():
        if not choose(name, value):
            made[name], expected[name] = value, value.float()
            continue
        flat = value.reshape(value.shape[0], -1)
        if scale is None:
            weight, factor = flat.to(dtype), torch.ones(1)
        else:
            weight, factor = quantize_weight(flat, dtype, per_row=per_row)
            made[_scale_name(name, scale)] = factor if per_row else factor.reshape(())
        made[name] = weight.reshape(value.shape)
        expected[name] = (weight.float() * factor).reshape(value.shape)
        layers.append(name.removesuffix(".weight"))
    made, metadata = _marks(made, layers, dtype, marks, prefix)
    save_file(made, path, metadata)
    return expected


def _scale_name(name, scale):
    return name.removesuffix("weight") + scale if name.endswith("weight") else f"{name}.{scale}"


def _marks(made, layers, dtype, marks, prefix):
    """Adds what each family of files has beside weights and scales: a tensor, or metadata."""
    if marks == "kijai":
        made["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    kind = {"format": str(dtype).removeprefix("torch.")}
    if marks == "comfy":
        raw = torch.tensor(list(json.dumps(kind).encode()), dtype=torch.uint8)
        for layer in layers:
            made[f"{layer}.comfy_quant"] = raw.clone()
            made[f"{layer}.input_scale"] = torch.ones(())
    made = {prefix + name: value for name, value in made.items()}
    if marks not in ("comfy", "comfy metadata"):
        return made, None
    content = {"format_version": "1.0", "layers": {prefix + layer: kind for layer in layers}}
    return made, {"_quantization_metadata": json.dumps(content)}


def random_blocks(shape, kind, seed):
    """Returns valid blocks of a type that the package can read but not write, and their numbers.

    Bytes below 60 keep every half-precision scale below one, wherever in a block it lies.
    """
    quant = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[quant]
    rows = int(np.prod(shape)) // shape[-1]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 60, (rows, shape[-1] // numbers * size)).astype(np.uint8)
    return blocks.reshape(*shape[:-1], -1), gguf.quants.dequantize(blocks, quant).reshape(shape)


def gguf_blocks(value, kind, seed=0):
    """Returns a tensor as the raw blocks of a type, and the float32 numbers in them."""
    quant = gguf.GGMLQuantizationType[kind]
    if kind in K_TYPES:
        blocks, numbers = random_blocks(tuple(value.shape), kind, seed)
    else:
        blocks = gguf.quants.quantize(value.float().numpy(), quant)
        numbers = gguf.quants.dequantize(blocks, quant)
    return blocks, torch.from_numpy(np.array(numbers)).reshape(value.shape)


def write_gguf(
    state,
    path,
    kind="F32",
    *,
    arch="wan",
    wide="fixed",
    strip_ones=False,
    rename=lambda name: name,
    choose=is_block_linear,
    fields=None,
):
    """GGUF files as city96's tools write them.

    kind: type of the weights that are quantised; the others are F32. wide: how patch embeddings,
    with their five axes, are stored: "fixed" as they are, "metadata" as rows of four with their
    shape kept beside, "flat" as a matrix, "lost" not at all. strip_ones: leading axes of one are
    dropped, as llama-quantize does. rename: our name -> the file's.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields or {}).items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    expected = {}
    for seed, (name, value) in enumerate(state.items()):
        quantised = choose(name, value)
        blocks, numbers = gguf_blocks(value, kind if quantised else "F32", seed)
        expected[name] = numbers
        if strip_ones and not quantised:
            blocks = blocks.reshape(_without_leading_ones(blocks.shape))
        if "patch_embedding" in name and value.ndim == 5 and wide != "fixed":
            if wide == "lost":
                continue
            if wide == "metadata":
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            shape = (-1, 4) if wide == "metadata" else (value.shape[0], -1)
            blocks = blocks.reshape(shape)
        writer.add_tensor(
            rename(name), blocks, raw_dtype=gguf.GGMLQuantizationType[kind if quantised else "F32"]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _without_leading_ones(shape):
    kept = list(shape)
    while len(kept) > 1 and kept[0] == 1:
        del kept[0]
    return kept


def same(found, expected) -> list[str]:
    """Returns the names that are missing, left over, or differ in any bit as float32."""
    odd = [name for name in expected if name not in found]
    odd += [name for name in found if name not in expected]
    for name, value in expected.items():
        if name in found and not torch.equal(found[name].float(), value.float()):
            odd.append(name)
    return odd


def inverse_diffusers(name: str) -> str:
    """Returns diffusers' name of a Wan parameter, by the table of its own conversion script."""
    for ours, theirs in _DIFFUSERS:
        name = name.replace(ours, theirs)
    return name.replace("@", "norm2")


_DIFFUSERS = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.@"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("self_attn.norm", "attn1.norm"),
    ("cross_attn.norm", "attn2.norm"),
    ("self_attn.o.", "attn1.to_out.0."),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("self_attn.", "attn1.to_"),
    ("cross_attn.", "attn2.to_"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2.", "ffn.net.2."),
    ("norm3", "@"),
)
