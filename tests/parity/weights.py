"""Replays of the weight formats: fp8 layers, LoRA merging, SAT names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.golden import Check, Golden, exact, rel_max
from xicon_infer.ops.linear import cast_fp8
from xicon_infer.ops.lora import Mode, apply_loras, merge_state_dict, remove_loras
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.weights.keymaps import to_wan_names
from xicon_infer.weights.strict import DtypePolicy, load_strict

TOLERANCE = 1e-5
LAYER = "blocks.0.self_attn.q"
"""A place in a Wan transformer for the single layer of a case."""


def replay_fp8_linear(golden: Golden) -> list[Check] | None:
    """Replays fp8 layers with and without LoRA, and the rounding tables."""
    if not _has_cases(golden, "scale_applied_to"):
        return None
    checks = []
    for case in golden.meta["cases"]:
        tensors = golden.under(case["prefix"])
        model = _one_layer(tensors, getattr(torch, case["dtype"].removeprefix("torch.")))
        name, x = f"{golden.path.stem}:{case['prefix']}", tensors["in.x"]
        if "in.lora_up" not in tensors:
            checks.append(_compare(f"{name}y", _run(model, x), tensors["out.y"]))
            continue
        lora, strength = _case_lora(tensors)
        expected: list[tuple[Mode, str]] = [
            ("full", "reference_correct"),
            ("merge", "reference_correct"),
            ("comfy_unmerged", "reference_correct"),
            ("comfy_parity", "y"),
        ]
        for mode, output in expected:
            apply_loras(model, [(lora, strength)], mode, requantize="none")
            y = _run(model, x)
            checks.append(_compare(f"{name}{output}:{mode}", y, tensors[f"out.{output}"]))
        remove_loras(model)
    return checks + _replay_casts(golden)


def replay_lora_merge(golden: Golden) -> list[Check] | None:
    """Replays LoRAs of several namings merged into a small state dict."""
    if not _has_cases(golden, "merged_keys"):
        return None
    base, checks = golden.under("weights."), []
    for case in golden.meta["cases"]:
        prefix = f"case{case['case']}."
        name = f"{golden.path.stem}:{prefix}{case['naming']}"
        lora = LoraFile(case["naming"], read_lora(golden.under(f"{prefix}in.lora.")))
        merged, report = merge_state_dict(base, lora, case["strength"])
        expected = golden.under(f"{prefix}out.merged.")
        checks += [_compare(f"{name}:{key}", merged[key], value) for key, value in expected.items()]
        rest = [key for key in base if key not in expected]
        untouched = all(torch.equal(base[key], merged[key]) for key in rest)
        checks.append(_exact(f"{name}:untouched", (untouched, set(merged)), (True, set(base))))
        checks.append(_exact(f"{name}:keys", list(report.applied), sorted(case["merged_keys"])))
    return checks


def replay_sat_names(golden: Golden) -> list[Check] | None:
    """Replays the conversion from SAT naming to Wan naming."""
    if not {"sat", "wan"} <= {key.partition(".")[0] for key in golden.keys}:
        return None
    sat, wan = golden.under("sat."), golden.under("wan.")
    converted = to_wan_names(sat)
    again = to_wan_names({f"model.diffusion_model.{key}": value for key, value in sat.items()})
    name = golden.path.stem
    checks = [
        _exact(f"{name}:names", set(converted), set(wan)),
        _exact(f"{name}:names with prefix", set(again), set(wan)),
    ]
    for key, value in wan.items():
        same = exact(converted[key], value) if key in converted else float("inf")
        checks.append(Check(f"{name}:{key}", same, 0.0))
    return checks


REPLAYS = (replay_fp8_linear, replay_lora_merge, replay_sat_names)


def _has_cases(golden: Golden, field: str) -> bool:
    """Returns whether the metadata of a safetensors file lists cases with such a field."""
    cases = golden.meta.get("cases")
    return isinstance(cases, list) and all(isinstance(c, dict) and field in c for c in cases)


def _one_layer(tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Returns a model of one layer, loaded from fp8 bytes as a checkpoint would be."""
    raw = tensors["weights.weight"].view(dtype)
    state = {f"{LAYER}.weight": raw}
    for part in ("bias", "scale_weight"):
        if f"weights.{part}" in tensors:
            state[f"{LAYER}.{part}"] = tensors[f"weights.{part}"]
    with torch.device("meta"):
        linear = nn.Linear(raw.shape[1], raw.shape[0], bias="weights.bias" in tensors)
        attention = nn.ModuleDict({"self_attn": nn.ModuleDict({"q": linear})})
        model = nn.ModuleDict({"blocks": nn.ModuleList([attention])})
    policy = DtypePolicy(compute=torch.float32)
    load_strict(model, state, name="layer", device="cpu", dtype_policy=policy)
    return model


def _case_lora(tensors: dict[str, Tensor]) -> tuple[LoraFile, float]:
    state = {
        f"{LAYER}.lora_down.weight": tensors["in.lora_down"],
        f"{LAYER}.lora_up.weight": tensors["in.lora_up"],
    }
    if float(tensors["in.lora_alpha"]) != 0:  # 0 stands for none in these files
        state[f"{LAYER}.alpha"] = tensors["in.lora_alpha"]
    return LoraFile("case", read_lora(state)), float(tensors["in.lora_strength"])


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_submodule(LAYER)(x)


def _replay_casts(golden: Golden) -> list[Check]:
    if "cast.in" not in golden.keys:
        return []
    tensors, name = golden.tensors, f"{golden.path.stem}:cast"
    x = tensors["cast.in"]
    checks = []
    for kind, dtype, stored in (
        ("e4m3fn", torch.float8_e4m3fn, "out_e4m3fn_from_clamped"),
        ("e5m2", torch.float8_e5m2, "out_e5m2"),
    ):
        cast = cast_fp8(x, dtype)
        if kind == "e5m2":  # stored without clamping: beyond the range it says infinity
            within = x.abs() <= torch.finfo(dtype).max
            raw = torch.where(within, cast.view(torch.uint8), x.to(dtype).view(torch.uint8))
            cast = raw.view(dtype)
        checks.append(_exact(f"{name}:{kind}", cast.view(torch.uint8), tensors[f"cast.{stored}"]))
        checks.append(_exact(f"{name}:{kind} back", cast.float(), tensors[f"cast.back_{kind}"]))
    return checks


def _compare(name: str, actual: Tensor, expected: Tensor) -> Check:
    return Check(name, rel_max(actual, expected), TOLERANCE)


def _exact(name: str, actual: Any, expected: Any) -> Check:
    return Check(name, exact(actual, expected), 0.0)
