"""Whether q, k and v of each self-attention become one product, and why not.

One product of three times the width keeps a GPU busier than three; the numbers stay the same. It
is done once, after loading, and cannot be taken back: LoRAs that come later are put on the fused
layer. LoRAs that lie beside the weights already stand in its way, and so do undo copies of the
single layers.

"auto" fuses only where the kernels of Triton read their parts of the product in place. Without
them the product lives as long as its copies, which the memory plan does not count.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from xicon_infer.errors import InvalidRequest
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.fused_choice import choose_kernels
from xicon_infer.ops.linear_fuse import fusion_problem
from xicon_infer.ops.lora_undo import find_changes

_LOG = logging.getLogger(__name__)

FUSINGS = ("auto", "on", "off")
_PARTS = ("self_attn.q", "self_attn.k", "self_attn.v")


def fuse_projections(
    model: WanTransformer, wanted: str, *, device: torch.device, resident: bool
) -> dict[str, Any]:
    """Fuses what can be fused; returns how many blocks are fused, of how many, and why.

    Args:
        model: loaded, with its LoRAs and its storage.
        wanted: one of `FUSINGS`.
        device: where it will run.
        resident: all networks stay on the device.

    Raises:
        InvalidRequest: "on", and no block can be fused; says why.
    """
    reason = _reason_against(model, wanted, device, resident)
    problems: dict[str, str] = {}
    if not reason:
        for index, block in enumerate(model.layers):
            if block.self_attn.qkv is not None:
                continue
            if problem := fusion_problem(block.self_attn.inputs):
                problems[f"block {index}"] = problem
            else:
                block.self_attn.fuse()
        reason = "; ".join(f"{where}: {why}" for where, why in list(problems.items())[:3])
    fused = sum(block.self_attn.qkv is not None for block in model.layers)
    if wanted == "on" and not fused:
        raise InvalidRequest(
            f"'fuse_qkv' is 'on' but q, k and v cannot be fused: {reason}; use 'auto', or "
            "merge the LoRAs (--storage merged-bf16 or merged-fp8)",
            field="fuse_qkv",
        )
    if fused and device.type == "cuda":
        torch.cuda.empty_cache()  # the single layers' memory is of another size than is wanted now
    _LOG.info("q, k and v are one product in %d of %d blocks: %s", fused, len(model.layers), reason)
    return {"fused_blocks": fused, "blocks": len(model.layers), "why": reason or "as asked"}


def _reason_against(
    model: WanTransformer, wanted: str, device: torch.device, resident: bool
) -> str:
    """Returns why no block shall be fused, or ""."""
    if wanted == "off":
        return "off"
    changes = find_changes(model)
    saved = [item.owner for item in changes.saved] if changes else []
    if any(owner.endswith(_PARTS) for owner in saved):
        return "undo copies of q, k or v are kept, so that LoRAs can be changed"
    if wanted == "on":
        return ""
    if not resident:
        return "auto: not all networks stay on the device"
    kernels = choose_kernels(model.kernels_request, device, model.dtype).kernels
    return "" if kernels == "triton" else f"auto: only with kernels of Triton, not {kernels}"
