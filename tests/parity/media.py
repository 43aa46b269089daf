"""Replays of the frame selection and the picture resizing against their references."""

from __future__ import annotations

from typing import Any, get_args

import torch

from tests.parity.golden import Check, Golden, Replay, abs_max, exact, rel_max
from xicon_infer.media.image import resize_frames, resized_size
from xicon_infer.media.selection import FrameRule, Selection, loaded_fps, select_frames
from xicon_infer.types import FITS

# Loader formats and the rule for the number of frames that each has; others have none.
_RULES: dict[str, FrameRule] = {"Wan": "wan", "Hunyuan": "wan"}
_METHODS = {"nearest-exact": "nearest"}
_ONE_LEVEL = 1 / 255
"""What rounding to 8 bits may change; only the Lanczos path of the reference rounds itself."""


def replay_frame_selection(golden: Golden) -> list[Check] | None:
    """Returns the checks of a list of frame selections, each with its source indices."""
    cases = _cases(golden, "source_fps", "frame_indices")
    if cases is None:
        return None
    checks = []
    for number, case in enumerate(cases):
        name = f"{golden.path.stem}:{number}"
        options = {
            "force_rate": float(case["force_rate"]),
            "frame_load_cap": case["frame_load_cap"],
            "skip_first_frames": case["skip_first_frames"],
            "select_every_nth": case["select_every_nth"],
        }
        rule = _RULES.get(case.get("format", ""), get_args(FrameRule)[0])
        indices = list(
            select_frames(case["source_fps"], case["source_frames"], **options, frame_rule=rule)
        )
        rate = options.pop("force_rate")
        window = Selection(force_rate=rate or None, **options).audio_window(case["source_fps"])
        fps = loaded_fps(
            case["source_fps"], force_rate=rate, select_every_nth=case["select_every_nth"]
        )
        found = {
            "frame_indices": indices,
            "count": len(indices),
            "loaded_fps": fps,
            "audio_start_time": window[0],
            "audio_duration_arg": window[1],
        }
        checks += [
            Check(f"{name}:{key}", exact(value, case[key]), 0.0)
            for key, value in found.items()
            if key in case
        ]
    return checks


def replay_resize_sizes(golden: Golden) -> list[Check] | None:
    """Returns the checks of a list of sizes before and after resizing."""
    cases = _cases(golden, "src_wh", "keep_proportion")
    if cases is None:
        return None
    checks = []
    for number, case in enumerate(cases):
        name = f"{golden.path.stem}:{number}:size"
        target = case["target_wh"] if "target_wh" in case else (case["width"], case["height"])
        expected = case["out_wh"] if "out_wh" in case else (case["out_width"], case["out_height"])
        if case["keep_proportion"] not in FITS:
            checks.append(_unknown(name, case["keep_proportion"]))
            continue
        found = resized_size(
            *case["src_wh"],
            target_width=target[0],
            target_height=target[1],
            fit=case["keep_proportion"],
            divisible_by=case["divisible_by"],
        )
        checks.append(Check(name, exact(list(found), list(expected)), 0.0))
    return checks


def replay_resize(golden: Golden) -> list[Check] | None:
    """Returns the checks of resized pictures: every pixel, and the sizes beside them."""
    if golden.kind != "safetensors" or not _looks_like_resizing(golden):
        return None
    checks = []
    for case in golden.meta["cases"]:
        stem = f"case{case['case']}"
        name = f"{golden.path.stem}:{stem}"
        fit, upscale = case["keep_proportion"], case["upscale_method"]
        if fit not in FITS:
            checks.append(_unknown(name, fit))
            continue
        colour = [int(part) for part in str(case.get("pad_color", "0, 0, 0")).split(",")]
        result = resize_frames(
            golden.tensors[f"{stem}.in.image_u8"].numpy(),
            width=case["width"],
            height=case["height"],
            fit=fit,
            position=case.get("crop_position", "center"),
            divisible_by=case["divisible_by"],
            method=_METHODS.get(upscale, upscale),
            pad_color=(colour[0], colour[1], colour[2]),
        )
        actual = torch.from_numpy(result)
        expected = golden.tensors[f"{stem}.out.image"]
        if upscale in ("lanczos", "nearest-exact"):
            # Levels are compared, so that the division by 255 cannot hide or make a difference.
            levels = expected.double() * 255
            off = abs_max(levels, levels.round()) > 1e-4
            error = float("inf") if off else exact(actual, levels.round().to(torch.uint8))
            checks.append(Check(f"{name}:image", error, 0.0))
        else:
            error = rel_max(actual / 255, expected.clamp(0, 1))
            checks.append(Check(f"{name}:image", error, _ONE_LEVEL))
    return checks


def _cases(golden: Golden, *wanted: str) -> list[dict[str, Any]] | None:
    """Returns the list in a JSON file whose first entry has these keys, else None."""
    content = golden.json if golden.kind == "json" else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return None
    return content if all(key in content[0] for key in wanted) else None


def _looks_like_resizing(golden: Golden) -> bool:
    cases = golden.meta.get("cases")
    first = cases[0] if isinstance(cases, list) and cases else None
    return isinstance(first, dict) and {"keep_proportion", "upscale_method"} <= set(first)


def _unknown(name: str, fit: str) -> Check:
    return Check(name, float("nan"), 0.0, skip=f"fit {fit!r} is not offered")


REPLAYS: tuple[Replay, ...] = (replay_frame_selection, replay_resize_sizes, replay_resize)
