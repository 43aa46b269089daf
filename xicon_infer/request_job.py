"""From a request to the options of a `Job`, and what a worker does otherwise than was asked.

Differs from the command line: the values of the contract are passed on as they are, also where
a profile of `Job` has others, because a dry run has shown them to the client.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xicon_infer.job_fields import FIELDS, MAX_LORAS
from xicon_infer.job_profiles import DISTILL_LORAS, PRESETS, WITHOUT_LORA
from xicon_infer.request_field import DANCING, PIPELINES, RequestField
from xicon_infer.request_fields import OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.request_types import ROLES, Request, RequestWarning
from xicon_infer.settings import Settings

MIN_SHIFT = 0.01
MIN_OVERLAP = 4
"""What the sampler needs at least; the contract allows 0 for both."""

KERNELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flash": ("flash3", "flash2", "flash"),
        "xformers": ("xformers",),
        "sdpa": ("cudnn", "flash", "efficient", "math"),
        "sage": ("sage", "int8"),
    }
)
"""attention_mode -> kernels that are of that kind, the first one wanted most."""

MEMORY: Mapping[str, str] = MappingProxyType(
    {"auto": "auto", "full": "resident", "balanced": "offload", "low": "stream"}
)
"""XICON_MEMORY -> option memory."""

_AUDIO = {"auto": "source", "none": "none"}
_FITS = {"crop": "crop", "resize": "pad", "pad": "pad", "stretch": "stretch"}
"""video_resize -> pose_fit: what fits inside is drawn on a canvas of the whole size."""

_DISTILLED = ("distill", "lightx2v")
"""Words in the name of a LoRA that already makes few steps enough."""

_DRAWN = ("draw_face", "draw_hands")

_OPTIONS = {option.name: option for option in FIELDS}
_TRANSLATED = (
    *("mode", *ROLES, "shift", "context_overlap", "loras", "attention_mode", "vae_tiling"),
    *("video_resize", "max_frames", "seed", "condition_guide_scale", "blocks_to_swap"),
)
"""Fields whose option has other values."""


def adaptations(
    resolved: Mapping[str, Any], fields: Mapping[str, Any], frame_limit: int
) -> tuple[RequestWarning, ...]:
    """Returns what is done otherwise than the fields say, one warning each.

    Args:
        resolved: all fields by their main names.
        fields: those that were given.
        frame_limit: most frames of a video.
    """
    mode = resolved["mode"]
    given = (("", REQUEST_FIELDS, fields, resolved), _output_given(fields, resolved))
    found = [
        RequestWarning("UNUSED_FIELD", f"mode {mode} does not use '{prefix}{field.name}'", name)
        for prefix, table, received, values in given
        for field in table
        if (name := f"{prefix}{field.name}")
        and received.get(field.name) is not None
        and field.kind not in ("media", "size")
        and not field.used_by(mode)
        and values[field.name] != field.default_for(mode)
    ]
    if mode in DANCING and resolved["pose_video"]:
        message = "'{}' has no effect with 'pose_video', which is drawn already"
        found += [
            RequestWarning("UNUSED_FIELD", message.format(name), name)
            for name in _DRAWN
            if not resolved[name]
        ]
    if resolved["max_frames"] > frame_limit:
        message = f"'max_frames' is lowered to {frame_limit}, the most of this worker"
        found.append(RequestWarning("VALUE_ADAPTED", message, "max_frames"))
    if mode != "pose_only":
        found += _sampling_adaptations(resolved)
    if mode in DANCING and resolved["video_resize"] == "stretch" and not resolved["pose_video"]:
        message = "'video_resize' stretch needs 'pose_video'; pad is used"
        found.append(RequestWarning("VALUE_ADAPTED", message, "video_resize"))
    return tuple(found)


def _output_given(
    fields: Mapping[str, Any], resolved: Mapping[str, Any]
) -> tuple[str, tuple[RequestField, ...], Mapping[str, Any], Mapping[str, Any]]:
    return "output.", OUTPUT_FIELDS, fields.get("output", {}), resolved["output"]


def _sampling_adaptations(resolved: Mapping[str, Any]) -> list[RequestWarning]:
    found = []
    if resolved["shift"] < MIN_SHIFT:
        found.append(_adapted("shift", MIN_SHIFT))
    if resolved["context_overlap"] < MIN_OVERLAP:
        found.append(_adapted("context_overlap", MIN_OVERLAP))
    full = len(resolved["loras"]) == MAX_LORAS and not _has_distillation(resolved["loras"])
    if full and resolved["profile"] == "fast":
        message = f"with {MAX_LORAS} LoRAs there is no room for that of profile fast"
        found.append(RequestWarning("VALUE_ADAPTED", message, "loras"))
    if _lone_pose(resolved) and resolved["condition_guide_scale"] > 0:
        message = (
            "'condition_guide_scale' is off: a 'pose_video' has no varied pose to guide away from; "
            "send the driving video alone"
        )
        found.append(RequestWarning("VALUE_ADAPTED", message, "condition_guide_scale"))
    return found


def choose_kernel(mode: str, kernels: Collection[str] | None) -> tuple[str, RequestWarning | None]:
    """Returns the option `attention` for an attention_mode, and a warning where it falls back.

    Args:
        mode: auto, flash, xformers, sdpa, sage, auto8 or ordered. sage allows 8-bit kernels; on
            some GPUs another is faster, so that it is not forced.
        kernels: those that run here; None if it is not known: then auto chooses.
    """
    if mode not in KERNELS:
        return mode, None
    for kernel in KERNELS[mode]:
        if kernels is not None and kernel in kernels:
            return ("auto8" if mode == "sage" else kernel), None
    message = f"attention_mode {mode} is not available here: the fastest that runs is used"
    return "auto", RequestWarning("ATTENTION_FALLBACK", message, "attention_mode")


def preferred_kernel(settings: Settings, kernels: Collection[str] | None) -> str:
    """Returns the option `attention` of a request that leaves the choice to the worker.

    Without ENABLE_FLASH_ATTN the fastest kernel that is no flash-attention is named.
    """
    if settings.attention != "auto" or settings.enable_flash_attn or kernels is None:
        return choose_kernel(settings.attention, kernels)[0]
    others = ("cudnn", "xformers", "efficient", "math")
    return next((kernel for kernel in others if kernel in kernels), "auto")


def to_job_values(
    request: Request,
    files: Mapping[str, Path],
    output: Path,
    *,
    kernels: Collection[str] | None = None,
) -> dict[str, Any]:
    """Returns the values for `xicon_infer.job.make_job(values, source="request")`.

    Args:
        request: of a video, not of an action.
        files: role -> local file, for every role in `request.media`.
        output: video to write (.mp4).
        kernels: attention kernels that run here, see `choose_kernel`.
    """
    mode, resolved = request.mode, request.resolved
    pipeline = PIPELINES[mode]
    values: dict[str, Any] = {
        field.option: given[field.name]
        for fields, given in ((REQUEST_FIELDS, resolved), (OUTPUT_FIELDS, request.output))
        for field in fields
        if field.option and field.name not in _TRANSLATED
    }
    values |= {
        **{role: files[role] for role in request.media},
        "pipeline": pipeline,
        "output": output,
        "audio": _AUDIO[request.output["audio"]],
        "shift": max(resolved["shift"], MIN_SHIFT),
        "context_overlap": max(resolved["context_overlap"], MIN_OVERLAP),
        "attention": choose_kernel(resolved["attention_mode"], kernels)[0],
        "tile": None if resolved["vae_tiling"] == "auto" else resolved["vae_tiling"],
        "seed": -1 if resolved["seed"] is None else resolved["seed"],
        "max_frames": _frame_cap(resolved["max_frames"], request.frame_limit),
        "pose_fit": _pose_fit(resolved),
        "condition_guide_scale": None
        if _lone_pose(resolved)
        else resolved["condition_guide_scale"],
        "preset": request.preset if request.preset in PRESETS.get(pipeline, ()) else None,
        **_memory(resolved["blocks_to_swap"], request.memory),
    }
    values["loras"] = _loras(request, pipeline, values["preset"])
    if resolved["pose_video"]:
        values |= dict.fromkeys(_DRAWN)  # it is drawn already
    return {
        name: value
        for name, value in values.items()
        if value is not None and _OPTIONS[name].used_by(pipeline)
    }


def _adapted(name: str, least: float) -> RequestWarning:
    message = f"'{name}' is raised to {least:g}, the least that can be computed"
    return RequestWarning("VALUE_ADAPTED", message, name)


def _lone_pose(resolved: Mapping[str, Any]) -> bool:
    """Returns True if there is no varied pose to guide away from: a pose video comes without."""
    return resolved["mode"] == "steady_dancer" and bool(resolved["pose_video"])


def _pose_fit(resolved: Mapping[str, Any]) -> str:
    fit = _FITS[resolved["video_resize"]]
    return fit if fit != "stretch" or resolved["pose_video"] else "pad"


def _frame_cap(asked: int, limit: int) -> int:
    """Returns most driving frames; the job itself cuts, and tells so, where no cap is needed."""
    return min(asked or limit, limit) if limit < _OPTIONS["num_frames"].high else asked


def _memory(blocks: int | str, memory: str) -> dict[str, Any]:
    """Returns the memory plan; a number of blocks means that blocks come and go."""
    if blocks == "auto":
        return {"memory": MEMORY[memory]}
    if blocks == 0:
        return {"memory": MEMORY["full"] if memory == "auto" else MEMORY[memory]}
    return {"memory": MEMORY["low"], "blocks_to_swap": blocks}


def _has_distillation(loras: Sequence[Mapping[str, Any]]) -> bool:
    return any(word in lora["name"].lower() for lora in loras for word in _DISTILLED)


def _loras(request: Request, pipeline: str, preset: str | None) -> list[dict[str, Any]] | None:
    """Returns the LoRAs of a job: those asked for, and under profile fast the distillation.

    A graph says itself which LoRAs it has, so it gets no other; a LoRA that is a distillation
    by its name is not joined by another one. None leaves the choice to the profile.
    """
    if pipeline not in DISTILL_LORAS:
        return None
    given = [dict(lora) for lora in request.resolved["loras"]]
    if request.form == "workflow":
        return given
    distilled = _has_distillation(given)
    fast = request.resolved["profile"] == "fast"
    if not given:
        return None
    if not fast or distilled or preset in WITHOUT_LORA or len(given) == MAX_LORAS:
        return given
    return [{"name": DISTILL_LORAS[pipeline], "strength": 1.0}, *given]
