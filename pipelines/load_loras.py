"""The LoRAs of a transformer: found by name, read once, put on and taken off.

Those that are merged into the file of the transformer are known by name and are not added again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.components import Components
from pipelines.storage import apply_storage, swap_loras
from xicon_infer.errors import WeightsError
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.manifest import locate_named

if TYPE_CHECKING:
    from pipelines.loading import LoadOptions


def find_lora(name: str, search_dirs: tuple[Path, ...]) -> Path:
    """Returns the file of a LoRA: a path, or a bare name in the places of the weights.

    Raises:
        WeightsError: it is nowhere; says where it was looked for.
    """
    found = Path(name) if Path(name).is_file() else locate_named("lora", name, search_dirs)
    if found is not None:
        return found
    searched = ", ".join(str(folder) for folder in search_dirs) or "no folder"
    raise WeightsError(
        f"LoRA {name!r} was not found (searched: {searched}); give its path, name its folder with "
        "--models-dir, or use --lora none",
        field="loras",
        code="LORA_NOT_FOUND",
    )


def set_loras(
    parts: Components[Any], options: LoadOptions, transformer: WanTransformer | None = None
) -> None:
    """Puts the LoRAs of the options on the transformer, and no others.

    The first call also stores the weights as the options say. LoRAs that are merged into the file
    are not added again. `transformer` is that of the parts before it is there.

    Raises:
        WeightsError: a LoRA is missing or fits nowhere, or the ones before cannot be taken off.
    """
    parts.release()  # what is written to a copy on the device is lost
    model = parts.transformer if transformer is None else transformer
    files = []
    for name, strength in options.loras:
        path = find_lora(name, options.search_dirs)
        if path.name in parts.merged:
            _check_merged(parts, path.name, strength)
            continue
        files.append((_read_lora(parts, path), strength))
    if "storage" in parts.facts:
        report = swap_loras(model, files, options.lora_mode)
    else:
        report = apply_storage(
            model,
            options.storage,
            files,
            lora_mode=options.lora_mode,
            matmul=options.matmul,
            device=options.device,
        )
    parts.facts["storage"] = report.as_dict()
    parts.facts["merged_loras"] = dict(parts.merged)
    parts.notes[:] = [*parts.load_notes, *report.lora_warnings]


def _check_merged(parts: Components[Any], name: str, strength: float) -> None:
    if not math.isclose(parts.merged[name], strength):
        raise WeightsError(
            f"LoRA {name!r} is merged into {parts.sources['transformer']} at strength "
            f"{parts.merged[name]:g} and cannot be changed to {strength:g}; use the strength of "
            "the file, or the file that it was prepared from",
            field="loras",
        )


def _read_lora(parts: Components[Any], path: Path) -> LoraFile:
    """Returns a LoRA; the same object for the same file, which is then not put on twice."""
    key = f"{path}:{path.stat().st_mtime_ns}"
    if key not in parts.lora_files:
        parts.lora_files[key] = LoraFile(path.name, read_lora(read_tensors(open_checkpoint(path))))
    return parts.lora_files[key]
