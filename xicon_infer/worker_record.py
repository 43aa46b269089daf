"""What an answer tells of how its video was made: enough to make it again.

No path and no prompt is in it: answers are kept by clients and platforms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xicon_infer.job import Job
from xicon_infer.request import RequestWarning
from xicon_infer.types import Result
from xicon_infer.weights.manifest import load_manifest

_PATHS = (
    *("models_dir", "image", "end_image", "pose_video", "negative_pose", "track", "video"),
    *("output", "detector", "transformer"),
)
_PROMPTS = ("prompt", "negative_prompt")

_CODES: tuple[tuple[str, str], ...] = (
    (r"has no effect", "UNUSED_FIELD"),
    (r"frames? lowered to", "FRAMES_ROUNDED"),
    (r"frames cut to|asked for: (cut|its last)", "FRAMES_CHANGED"),
    (r"lowered to", "DIMENSION_ROUNDED"),
    (r"licen[cs]e|non-commercial", "LICENCE"),
    (r"attention|kernel", "ATTENTION_FALLBACK"),
    (r"\bLoRA\b", "LORA"),
    (r"person|pose|body|figure|joint", "POSE"),
)
"""Pattern in the text of a recipe's warning -> code; the first that fits."""


def coded(message: str) -> RequestWarning:
    """Returns a recipe's warning with a code; NOTE where none fits."""
    code = next((code for pattern, code in _CODES if re.search(pattern, message)), "NOTE")
    return RequestWarning(code, message)


def metadata(
    result: Result,
    job: Job,
    *,
    timings: Mapping[str, float],
    gpu: str | None,
    cold_start: bool,
) -> dict[str, Any]:
    """Returns the `metadata` of an answer, but for what the request itself says.

    Args:
        result: what was made.
        job: as it was run in the end.
        timings: seconds of each stage of the client.
        gpu: its name, None on a CPU.
        cold_start: it is the first job of this worker.
    """
    sources = {name: str(at) for name, at in result.machine.get("components", {}).items()}
    return {
        "seed": result.seed,
        "width": result.width,
        "height": result.height,
        "fps": float(result.fps),
        "frames": result.num_frames,
        "model": f"{job.pipeline}/{job.preset}",
        "precision": result.machine.get("dtype"),
        "attention": result.machine.get("attention"),
        "kernels": result.machine.get("kernels"),
        "memory": result.machine.get("memory"),
        "steps": job.num_inference_steps,
        "cfg": job.guidance_scale,
        "shift": job.shift,
        "scheduler": job.scheduler,
        "loras": [{"name": lora.name, "strength": lora.strength} for lora in job.loras],
        "windows": windows(job, result.num_frames),
        "timings": dict(timings),
        "gpu": gpu,
        "vram_peak_bytes": _peak(result) if gpu else None,
        "worker_version": result.versions.get("xicon-infer"),
        "versions": dict(result.versions),
        "cold_start": cold_start,
        "weights": weights(sources),
        "settings": settings(result),
        "stages": [
            {"name": s.name, "seconds": s.seconds, "peak_memory_bytes": s.peak_memory_bytes}
            for s in result.stages
        ],
    }


def windows(job: Job, frames: int) -> int:
    """Returns how many context windows the first step had; 1 for a video handled at once."""
    from pipelines.plan_steps import context_of
    from xicon_infer.sampling.windows import windows_per_step

    if job.pipeline == "pose":
        return 0
    context = context_of(job)
    return windows_per_step(context, frames, 1)[0] if context.active(frames) else 1


def weights(sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns component -> file name, size and sha256, as far as they are known.

    The hash is that of the manifest, for a file of its name and size; nothing is hashed here.
    """
    files = load_manifest().files
    known = {Path(name).name: entry for entry in files for name in entry.own_names}
    found: dict[str, dict[str, Any]] = {}
    for component, source in sources.items():
        path = Path(source)
        record: dict[str, Any] = {"file": path.name}
        if path.is_file():
            record["bytes"] = path.stat().st_size
            entry = known.get(path.name)
            if entry is not None and entry.size_bytes == record["bytes"]:
                record["sha256"] = entry.sha256
        found[component] = record
    return found


def settings(result: Result) -> dict[str, Any]:
    """Returns every setting that was used, without prompts and paths."""
    hidden = (*_PATHS, *_PROMPTS)
    return {name: value for name, value in result.settings.items() if name not in hidden}


def _peak(result: Result) -> int:
    return max((stage.peak_memory_bytes for stage in result.stages), default=0)
