"""Small checkpoints under the true file names, dtypes and tensor names, written to a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines import tiny
from xicon_infer.ops.linear import quantize_weight

FP8_NAME = "Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ.safetensors"
BF16_NAME = "Wan21-14B-SCAIL-preview_comfy_bf16.safetensors"
LORA_NAME = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"


def wide_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a CLIP file of the published width (1280, 16 heads), two layers, inner width 32."""
    from dataclasses import replace

    from xicon_infer.models.vision import build_image_encoder

    config = replace(tiny.TINY_VISION, width=1280, d_ff=32, num_layers=2, num_heads=16)
    with torch.device("meta"):
        module = build_image_encoder(config)
    made = tiny.seeded_state(module)
    made |= {"post_layernorm.weight": torch.ones(1280), "post_layernorm.bias": torch.zeros(1280)}
    return {f"vision_model.{name}": value.half() for name, value in made.items()}


def write_models(folder: Path, *, fp8: bool) -> Path:
    """Writes transformer, VAE, text encoder, tokenizer, CLIP and LoRA files; returns the folder."""
    from dataclasses import replace

    folder.mkdir(parents=True, exist_ok=True)
    transformer = tiny.tiny_transformer_state(config=replace(tiny.TINY_SCAIL, image_dim=1280))
    if fp8:
        save_file(scaled_fp8(transformer), folder / FP8_NAME)
    else:
        prefixed = {
            f"model.diffusion_model.{name}": value.bfloat16() for name, value in transformer.items()
        }
        save_file(prefixed, folder / BF16_NAME)
    torch.save(tiny.tiny_vae_state(), folder / "Wan2.1_VAE.pth")
    text = {
        name: value.bfloat16().clone()
        for name, value in tiny.tiny_text_state().items()
        if name != "encoder.embed_tokens.weight"
    }
    save_file(text, folder / "umt5_xxl_fp16.safetensors")
    (folder / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.tiny_tokens().backend.to_str()
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(tokenizer)
    save_file(wide_clip({}), folder / "clip_vision_h.safetensors")
    save_file(lora_state(transformer), folder / LORA_NAME)
    return folder


def scaled_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the file as Kijai's scaled fp8 format has it."""
    made: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        linear = name.startswith("blocks.") and name.endswith("weight") and value.ndim == 2
        if linear:
            weight, scale = quantize_weight(value, torch.float8_e4m3fn, per_row=False)
            made[name] = weight
            made[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
        else:
            made[name] = value.half() if "patch" not in name else value
    return made


def lora_state(transformer: dict[str, torch.Tensor], rank: int = 2) -> dict[str, torch.Tensor]:
    """Returns a LoRA for every linear layer of the first block."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, value in transformer.items():
        if name.startswith("blocks.0.") and name.endswith("weight") and value.ndim == 2:
            module = "diffusion_model." + name.removesuffix(".weight")
            down = torch.randn(rank, value.shape[1], generator=generator)
            up = torch.randn(value.shape[0], rank, generator=generator) / value.shape[1]
            made[f"{module}.lora_down.weight"] = down.bfloat16()
            made[f"{module}.lora_up.weight"] = up.bfloat16()
    return made
