"""LoRA files of every naming seen in the wild, read into one form.

A key is `<prefix><module path><kind>`. The prefix goes; the path may be that of the original
checkpoints (`blocks.0.self_attn.q`), that of diffusers (`blocks.0.attn1.to_q`), or either with
underscores for dots (kohya, LyCORIS); the kind says which part of the change the tensor is. Every
key must be understood: an unknown one is an error, because a silently dropped part of a LoRA
gives a subtly wrong video.

Differs from rookiestar28/ComfyUI-WanVideoWrapper: diffusers' `attn1` is the self-attention, as
diffusers defines it (the wrapper sends both `attn1` and `attn2` to the cross-attention).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from xicon_infer.errors import InvalidRequest, WeightsError

RankStabilized = Literal["auto", "yes", "no"]

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What may stand before a module path; several may follow one another."""

_DOWN, _UP, _ALPHA, _DIFF, _DIFF_B, _DIFF_M = "down", "up", "alpha", "diff", "diff_b", "diff_m"

_KINDS = {
    ".lora_down.weight": _DOWN,
    ".lora_A.weight": _DOWN,
    ".lora.down.weight": _DOWN,
    ".lora_linear_layer.down.weight": _DOWN,
    "_lora.down.weight": _DOWN,
    ".lora_down": _DOWN,
    ".lora_A": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_B.weight": _UP,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.up.weight": _UP,
    "_lora.up.weight": _UP,
    ".lora_up": _UP,
    ".lora_B": _UP,
    ".alpha": _ALPHA,
    ".diff": _DIFF,
    ".diff_b": _DIFF_B,
    ".diff_m": _DIFF_M,
}

RANK_STABILIZED_MARK = "base_model.model.blocks.0.cross_attn.k.lora_A.weight"
"""The key by which the ComfyUI wrapper takes a file for rank-stabilised."""

_WAN_TOP = (
    "patch_embedding",
    "patch_embedding_pose",
    "patch_embedding_mask",
    "patch_embedding_fuse",
    "patch_embedding_ref_c",
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
    "img_emb.emb_pos",
    "head",
    "head.head",
    "head.modulation",
)

DIFFUSERS_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
"""diffusers' names outside the blocks -> original names.

Source: huggingface/diffusers: scripts/convert_wan_to_diffusers.py (its map, reversed).
"""

_ATTENTION_LEAVES = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "to_out": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    **{leaf: leaf for leaf in ("q", "k", "v", "o", "norm_q", "norm_k")},
    **{leaf: leaf for leaf in ("k_img", "v_img", "norm_k_img")},
}

BLOCK_MODULES = {
    "ffn.0": "ffn.0",
    "ffn.2": "ffn.2",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm3": "norm3",
    "norm2": "norm3",  # diffusers counts norms in call order; the other two have no parameters
    "modulation": "modulation",
    "scale_shift_table": "modulation",
    **{
        f"{ours}.{leaf}": f"{wan}.{original}"
        for ours, wan in (
            ("attn1", "self_attn"),
            ("attn2", "cross_attn"),
            ("self_attn", "self_attn"),
            ("cross_attn", "cross_attn"),
        )
        for leaf, original in _ATTENTION_LEAVES.items()
    },
}
"""Path inside a block, in original or diffusers naming -> original path."""

_TOP = {**{name: name for name in _WAN_TOP}, **DIFFUSERS_TOP}
_FLAT_TOP = {name.replace(".", "_"): target for name, target in _TOP.items()}
_FLAT_BLOCK = {name.replace(".", "_"): target for name, target in BLOCK_MODULES.items()}
_BLOCK = re.compile(r"blocks[._](\d+)(?:[._](.+))?")
_SHOWN = 8
"""How many names an error lists."""


@dataclass(frozen=True)
class LoraDelta:
    """What a LoRA does to one module.

    down: [r, in, ...]; up: [out, r, ...]; both or neither. factor: what multiplies up @ down
    besides the strength (alpha / r). diff: added to the weight. diff_b: added to the bias.
    diff_m: added to the parameter `modulation` of the module.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    factor: float = 1.0
    diff: Tensor | None = None
    diff_b: Tensor | None = None
    diff_m: Tensor | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was read: a name for reports, and its deltas by original module path."""

    name: str
    deltas: dict[str, LoraDelta]


def wan_module(path: str) -> str | None:
    """Returns the original path of a module or bare parameter, or None if it is unknown.

    Args:
        path: in original or diffusers naming, dots or underscores, without prefix.
    """
    if path.startswith("condition_embedding_"):  # SteadyDancer; no second naming exists
        return path
    block = _BLOCK.fullmatch(path)
    if block is None:
        return _TOP.get(path) or _FLAT_TOP.get(path)
    index, inner = block.groups()
    if inner is None:
        return f"blocks.{index}"
    known = BLOCK_MODULES.get(inner) or _FLAT_BLOCK.get(inner)
    return known and f"blocks.{index}.{known}"


def is_lora_key(key: str) -> bool:
    """Returns whether a tensor name looks like a part of a LoRA."""
    return _split_kind(key) is not None


def read_lora(
    state: Mapping[str, Tensor], *, rank_stabilized: RankStabilized = "auto", name: str = "LoRA"
) -> dict[str, LoraDelta]:
    """Returns the deltas of a LoRA by original module path (`blocks.0.self_attn.q`).

    Args:
        state: the tensors of the file under their own names.
        rank_stabilized: how a pair is scaled. "no": alpha / r, 1 without alpha. "yes": alpha /
            sqrt(r), sqrt(r) without alpha. "auto": as "no", except for files with the key
            `RANK_STABILIZED_MARK`: their pairs without alpha get floor(r^1.5) / r.
        name: of the file, for messages.

    Raises:
        WeightsError: a key is unknown, occurs twice under two names, or lacks its other half;
            or there is no LoRA at all.
        InvalidRequest: rank_stabilized is unknown.

    Source: rookiestar28/ComfyUI-WanVideoWrapper: nodes_model_loading.py (namings, floor rule).
    """
    if rank_stabilized not in ("auto", "yes", "no"):
        raise InvalidRequest(f"rank_stabilized: got {rank_stabilized!r}, allowed: auto, yes, no")
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        target = _target(key)
        if target is None:
            unknown.append(key)
            continue
        path, kind = target
        if kind in parts.setdefault(path, {}):
            raise WeightsError(f"{name}: {kind} of {path} occurs twice, again as {key!r}")
        parts[path][kind] = tensor
    if unknown:
        raise WeightsError(f"{name}: {_unknown_message(unknown)}")
    if not parts:
        raise WeightsError(f"{name}: the file holds no tensors")
    default_alpha = _marked_alpha(state) if rank_stabilized == "auto" else None
    return {
        path: _delta(f"{name}: {path}", found, default_alpha, stabilized=rank_stabilized == "yes")
        for path, found in parts.items()
        if set(found) != {_ALPHA}  # an alpha alone scales nothing
    }


def _split_kind(key: str) -> tuple[str, str] | None:
    """Returns (everything before the kind, kind); the longest ending wins."""
    plain = key.replace(".default.", ".").removesuffix(".default")
    for ending in sorted(_KINDS, key=len, reverse=True):
        if plain.endswith(ending):
            return plain.removesuffix(ending), _KINDS[ending]
    return None


def _target(key: str) -> tuple[str, str] | None:
    """Returns (original module path, kind), or None if the key is not understood."""
    split = _split_kind(key)
    if split is None:
        return None
    path, kind = split
    found = wan_module(path)
    while found is None:
        shorter = next((path.removeprefix(p) for p in PREFIXES if path.startswith(p)), None)
        if shorter is None:
            return None
        path, found = shorter, wan_module(shorter)
    owner, _, leaf = found.rpartition(".")
    if leaf == "modulation":  # a bare parameter: its difference belongs to the module around it
        return (owner, _DIFF_M) if kind == _DIFF else None
    return found, kind


def _delta(
    place: str, found: dict[str, Tensor], default_alpha: float | None, *, stabilized: bool
) -> LoraDelta:
    """Returns one module's delta; `place` says in messages where it is."""
    down, up = found.get(_DOWN), found.get(_UP)
    differences = LoraDelta(
        diff=found.get(_DIFF), diff_b=found.get(_DIFF_B), diff_m=found.get(_DIFF_M)
    )
    if down is None and up is None:
        return differences
    if down is None or up is None:
        missing = "down (lora_A)" if down is None else "up (lora_B)"
        raise WeightsError(f"{place} has no {missing} matrix; the file is incomplete")
    rank = down.shape[0]
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != rank:
        raise WeightsError(
            f"{place}: up {tuple(up.shape)} and down {tuple(down.shape)} differ in rank"
        )
    alpha = default_alpha
    if _ALPHA in found:
        if found[_ALPHA].numel() != 1:
            raise WeightsError(
                f"{place}: alpha must be one number, got shape {tuple(found[_ALPHA].shape)}"
            )
        alpha = float(found[_ALPHA])
    divisor = math.sqrt(rank) if stabilized else rank
    factor = (rank if alpha is None else alpha) / divisor
    return replace(differences, down=down, up=up, factor=factor)


def _marked_alpha(state: Mapping[str, Tensor]) -> float | None:
    """Returns the alpha that a file with the rank-stabilised mark implies, else None."""
    if RANK_STABILIZED_MARK not in state:
        return None
    rank = state[RANK_STABILIZED_MARK].shape[0]
    return rank * rank // rank**0.5


def _unknown_message(unknown: list[str]) -> str:
    shown = ", ".join(sorted(unknown)[:_SHOWN])
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return (
        f"{len(unknown)} unknown keys: {shown}{more}. Allowed are low-rank pairs and "
        "differences for Wan2.1 modules; LoHa, LoKr and DoRA are not. Use a LoRA made for Wan2.1."
    )
