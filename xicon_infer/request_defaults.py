"""What a field is when it is left out: by mode, profile, form, and settings of the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xicon_infer.job_profiles import QUALITY_ALONE
from xicon_infer.request_field import RequestField
from xicon_infer.request_fields import (
    FLAT_SIZE,
    LEGACY_FPS,
    NESTED_MAX_FRAMES,
    OUTPUT_FIELDS,
    QUALITY_CFG,
    QUALITY_STEPS,
)
from xicon_infer.request_types import Form
from xicon_infer.settings import Settings

_FLAT: Mapping[str, object] = {
    "fps": LEGACY_FPS,
    "width": FLAT_SIZE[0],
    "height": FLAT_SIZE[1],
}
_NESTED: Mapping[str, object] = {"fps": LEGACY_FPS, "max_frames": NESTED_MAX_FRAMES}
_FORMS: Mapping[str, Mapping[str, object]] = {"legacy_flat": _FLAT, "legacy_nested": _NESTED}


def default_of(
    field: RequestField, resolved: Mapping[str, Any], form: Form, settings: Settings
) -> Any:
    """Returns the value of a field that is left out.

    Args:
        field: which.
        resolved: fields that were resolved before it; mode and profile count.
        form: of the request.
        settings: some defaults come from the worker.
    """
    mode = str(resolved.get("mode", ""))
    quality = resolved.get("profile") == "quality"
    by_worker = _of_worker(field, mode, settings, quality=quality)
    if by_worker is not None:
        return by_worker
    if field.name == "profile" and settings.preset_for(mode) in QUALITY_ALONE:
        return "quality"
    if quality and field.name == "steps":
        return QUALITY_STEPS[mode]
    if quality and field.name == "cfg":
        return QUALITY_CFG
    if field.name in _FORMS.get(form, {}):
        return _FORMS[form][field.name]
    if field.name == "output":
        return {one.name: default_of(one, {}, form, settings) for one in OUTPUT_FIELDS}
    return None if field.name == "seed" else field.default_for(mode)


def _of_worker(field: RequestField, mode: str, settings: Settings, *, quality: bool) -> Any:
    """Returns the default that the worker's settings give, None for none."""
    steady = {
        "cfg": settings.steadydancer_guide_scale,
        "condition_guide_scale": settings.steadydancer_condition_guide,
        "end_cond_cfg": settings.steadydancer_end_cfg,
        "seed": None if settings.steadydancer_seed == -1 else settings.steadydancer_seed,
    }
    if quality and mode == "steady_dancer" and field.name in steady:
        return steady[field.name]
    if field.name == "num_frames" and field.default_for(mode) is not None:
        return min(81, settings.max_frames)
    values = {
        "timeout_s": settings.job_timeout_s,
        "response_format": settings.response_format,
        "attention_mode": settings.attention,
        "url_expires_s": settings.bucket_url_expires_s,
    }
    return values.get(field.name)
