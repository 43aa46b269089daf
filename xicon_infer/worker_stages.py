"""The stages of a job as its client sees them, and how much of the whole each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

WEIGHTS: Mapping[str, int] = MappingProxyType(
    {
        "accept": 0,
        "validate": 0,
        "fetch": 3,
        "decode": 2,
        "load": 0,
        "pose": 15,
        "text": 2,
        "image": 3,
        "denoise": 60,
        "vae": 8,
        "encode": 3,
        "upload": 4,
        "done": 0,
    }
)
"""Stage -> percent of the whole, in order."""

STAGE_OF: Mapping[str, str] = MappingProxyType(
    {
        "read inputs": "decode",
        "read poses": "decode",
        "find poses": "pose",
        "load pose models": "pose",
        "fit to the reference": "pose",
        "find the character": "pose",
        "draw pose": "pose",
        "fit pose": "pose",
        "load models": "load",
        "load transformer": "load",
        "prepare": "load",
        "encode text": "text",
        "encode image": "image",
        "encode start image": "image",
        "encode reference and pose": "image",
        "project conditioning": "image",
        "sample": "denoise",
        "decode video": "vae",
        "draw and write": "encode",
        "write files": "encode",
    }
)
"""Stage of a recipe -> stage of the client."""


def stage_of(name: str) -> str:
    """Returns the client's stage for one of a recipe or of the worker; unknown ones as they are."""
    return STAGE_OF.get(name, name)


def start_percent(stage: str) -> int:
    """Returns where a stage starts; an unknown one at 0, which moves nothing."""
    total = 0
    for name, weight in WEIGHTS.items():
        if name == stage:
            return total
        total += weight
    return 0
