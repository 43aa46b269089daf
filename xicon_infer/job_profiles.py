"""The two ways to sample: fast with a distillation LoRA, and as the authors of a model do it.

A profile changes defaults; a value that is given wins over it. The values of "fast" are the
defaults in the table of options themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

Value: TypeAlias = "str | int | float | bool | tuple[()] | None"
"""A default: JSON-like, None where the option may be left out without one."""

# The official default of Wan2.1; the ComfyUI graphs use it as well.
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

IMAGE_NEGATIVE_PROMPT = "镜头晃动，" + DEFAULT_NEGATIVE_PROMPT  # noqa: RUF001
"""The official default of the image-to-video models, SteadyDancer among them: no camera shake."""

I2V_LORA = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
T2V_LORA = "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"
DISTILL_LORAS: Mapping[str, str] = MappingProxyType(
    {"scail": I2V_LORA, "steady_dancer": I2V_LORA, "wan_i2v": I2V_LORA, "wan_t2v": T2V_LORA}
)
"""What makes 4 to 6 steps without guidance enough: defaults of profile fast with real weights."""

WITHOUT_LORA: tuple[str, ...] = ("tiny", "1.3b")
"""Presets for which there is no distillation LoRA."""

QUALITY_ALONE: tuple[str, ...] = ("1.3b",)
"""Presets whose default profile is quality: few steps make nothing without a distillation LoRA."""

# What the authors of SCAIL sample with: Euler, guidance by text alone against an empty negative
# prompt, the pose present in every step, no distillation.
_SCAIL_QUALITY: Mapping[str, Value] = {
    "scheduler": "euler/official",
    "num_inference_steps": 50,
    "shift": 5.0,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    "pose_end": 1.0,
    "loras": (),
}

# MCG-NJU/SteadyDancer: generate_dancer.py, README.md.
_DANCER_QUALITY: Mapping[str, Value] = {
    "scheduler": "unipc/official",
    "num_inference_steps": 40,
    "guidance_scale": 5.0,
    "negative_prompt": IMAGE_NEGATIVE_PROMPT,
    "condition_guide_scale": 1.0,
    "loras": (),
}

# Wan-Video/Wan2.1: generate.py, wan/configs.
_I2V_QUALITY: Mapping[str, Value] = {
    "scheduler": "unipc/official",
    "num_inference_steps": 40,
    "guidance_scale": 5.0,
    "negative_prompt": IMAGE_NEGATIVE_PROMPT,
    "loras": (),
}
_T2V_QUALITY: Mapping[str, Value] = {
    "scheduler": "unipc/official",
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "loras": (),
}

PROFILES: Mapping[str, Mapping[str, Mapping[str, Value]]] = MappingProxyType(
    {
        "fast": {},
        "quality": {
            "scail": _SCAIL_QUALITY,
            "steady_dancer": _DANCER_QUALITY,
            "wan_i2v": _I2V_QUALITY,
            "wan_t2v": _T2V_QUALITY,
        },
    }
)
"""Profile -> pipeline -> defaults that it changes."""

# Wan-Video/Wan2.1: README.md (1.3B), generate.py (first and last frame).
_BOTH_QUALITY: Mapping[str, Value] = {
    "guidance_scale": 5.5,
    "shift": 16.0,
    "num_inference_steps": 50,
}
PRESET_QUALITY: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {
        "1.3b": {"guidance_scale": 6.0, "shift": 8.0},
        "flf2v-fp8": _BOTH_QUALITY,
        "flf2v-bf16": _BOTH_QUALITY,
    }
)
"""Preset -> defaults of profile quality that differ from those of its pipeline."""

SMALL_SHIFT = 3.0
"""Of profile quality in image-to-video models up to the smaller class of sizes ("480p")."""
SHIFT = 5.0

PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "scail": ("fp8", "bf16", "low-memory", "tiny"),
        "steady_dancer": ("fp8", "bf16", "gguf", "low-memory", "tiny"),
        "wan_i2v": (
            "fp8",
            "bf16",
            "fp8-720p",
            "bf16-720p",
            "flf2v-fp8",
            "flf2v-bf16",
            "low-memory",
            "tiny",
        ),
        "wan_t2v": ("fp8", "bf16", "1.3b", "low-memory", "tiny"),
    }
)
"""Pipeline -> sets of weights, the default first; those of `weights_manifest.json` and "tiny"."""
