"""Small checkpoints for every preset of the manifest, with the names and formats it lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines import tiny
from pipelines.loading import transformer_class
from tests.tiny_models import lora_state, scaled_fp8, wide_clip
from tests.weights.formats import fp8, write_gguf
from xicon_infer.weights.manifest import FileEntry, files_for, presets

PIPELINES = ("scail", "steady_dancer", "wan_i2v", "wan_t2v")
CASES = [(name, preset) for name in PIPELINES for preset in presets()[name] if preset != "tiny"]

_CONFIGS = {
    "scail": tiny.TINY_SCAIL,
    "steady_dancer": tiny.TINY_I2V,
    "wan_i2v": tiny.TINY_I2V,
    "wan_t2v": tiny.TINY_T2V,
}


def transformer_state(pipeline: str, preset: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a small transformer with the CLIP width of the published ones."""
    config = _CONFIGS[pipeline]
    if config.image_dim is not None:
        config = replace(config, image_dim=1280)
    if preset.startswith("flf2v"):
        config = replace(config, image_positions=34)
    return tiny.tiny_transformer_state(transformer_class(pipeline), config)


def write_preset(folder: Path, pipeline: str, preset: str) -> Path:
    """Writes every file of a preset where `locate` finds it; returns the folder."""
    for entry in files_for(pipeline, preset):
        path = folder / entry.target
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, entry, pipeline, preset)
    return folder


def _write(path: Path, entry: FileEntry, pipeline: str, preset: str) -> None:
    if entry.component == "transformer":
        _write_transformer(path, transformer_state(pipeline, preset))
    elif entry.component == "vae":
        state = tiny.tiny_vae_state()
        torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    elif entry.component == "text_encoder":
        _write_text(path)
    elif entry.component == "tokenizer":
        path.write_text(tiny.tiny_tokens().backend.to_str())
    elif entry.component == "image_encoder":
        save_file(wide_clip({}), path)
    elif entry.component == "lora":
        save_file(lora_state(transformer_state(pipeline, preset)), path)
    else:
        raise AssertionError(entry)


def _write_transformer(path: Path, state: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".gguf":
        write_gguf(state, path, kind="Q8_0")
    elif "scaled" in path.name:
        save_file(scaled_fp8(state), path)
    elif "fp8" in path.name:
        fp8(state, path, scale=None)
    else:
        dtype = torch.float16 if "fp16" in path.name else torch.bfloat16
        save_file({name: value.to(dtype) for name, value in state.items()}, path)


def _write_text(path: Path) -> None:
    state = {
        name: value.bfloat16().clone()
        for name, value in tiny.tiny_text_state().items()
        if name != "encoder.embed_tokens.weight"
    }
    if "fp8" in path.name:
        made = {}
        for name, value in state.items():
            linear = value.ndim == 2 and "layer." in name and "relative" not in name
            scale = value.float().abs().max() / 448
            made[name] = (value.float() / scale).to(torch.float8_e4m3fn) if linear else value
            if linear:
                made[name.removesuffix("weight") + "scale_weight"] = scale
        made["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        state = made
    save_file(state, path)
