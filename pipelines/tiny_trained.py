"""The trained weights of the tiny preset of SCAIL: two files that travel with the package.

They are in the published formats (a scaled fp8 transformer, a float16 VAE) and go through the same
reading and strict loading as those of the 14B model. What they can do, and how they were made, is
told in docs/tiny-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors

FILES: Mapping[str, Path] = MappingProxyType(
    {
        component: Path(__file__).with_name("tiny_weights") / name
        for component, name in {
            "transformer": "scail_tiny_fp8.safetensors",
            "vae": "vae_tiny_fp16.safetensors",
        }.items()
    }
)
"""Component -> its file."""

LORA = Path(__file__).with_name("tiny_weights") / "grey_tiny_lora.safetensors"
"""A LoRA of the transformer that takes the colours away."""


def trained_states() -> dict[str, dict[str, Tensor]]:
    """Returns component -> tensors, as the files hold them (fp8 with scales, float16)."""
    return {name: read_tensors(open_checkpoint(path)) for name, path in FILES.items()}
