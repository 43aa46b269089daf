"""Names of model files in a ComfyUI graph: which network each is, and whether it is here.

Files are renamed and moved about, so a name is compared without its folder and, where a network
is known by its name, with every file of the same network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "WanVideoModelLoader": ("model",),
        "WanVideoVAELoader": ("model_name",),
        "WanVideoTextEncodeCached": ("model_name",),
        "LoadWanVideoT5TextEncoder": ("model_name",),
        "CLIPLoader": ("clip_name",),
        "CLIPVisionLoader": ("clip_name",),
        "LoadWanVideoClipTextEncoder": ("model_name",),
        "OnnxDetectionModelLoader": ("vitpose_model", "yolo_model"),
        "DownloadAndLoadNLFModel": ("url",),
        "LoadNLFModel": ("nlf_model",),
        "NLFModelLoader": ("nlf_model",),
    }
)
"""Class -> inputs that name a model file."""

TRANSFORMERS: Mapping[str, str] = MappingProxyType(
    {
        "scail": "scail",
        "steady_dancer": "steady_dancer",
        "i2v": "wan_i2v",
        "i2v-720p": "wan_i2v",
        "flf2v": "wan_i2v",
        "t2v": "wan_t2v",
        "t2v-1.3b": "wan_t2v",
    }
)
"""Transformer -> mode that it is for."""

_FOREIGN = re.compile(
    r"(?:wan|^)[._-]?2[._-]?[23456](?![0-9])|vace|phantom|animate|scail[._-]?2|multitalk|skyreels|humo"
    r"|lynx|recam|mocha|magref|stand[._-]?in|longcat|pusa|fantasy|wan[._-]?move|echoshot|flashvsr"
    r"|causvid|self[._-]?forcing|krea|chronoedit|bindweave|minimax|crafter|one[._-]?to[._-]?all"
    r"|lucy|lumos|infinite|uni3c|fun[._-]|[._-](?:fun|ati|ovi|5b|s2v|camera|control|inp)(?:[._-]|$)"
)
"""Networks that are built or trained otherwise than those of this project."""

_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"scail", "scail"),
    (r"steady[._-]?dancer", "steady_dancer"),
    (r"vitpose.*[._-]h[._-]|vitpose-?h", "vitpose-h"),
    (r"vitpose.*[._-]l[._-]|vitpose-?l", "vitpose-l"),
    (r"yolov10m", "yolov10m"),
    (r"nlf", "nlf"),
    (r"umt5", "umt5"),
    (r"wan.*vae", "vae"),
    (r"clip[._-]?vision[._-]?h|clip.*vit[._-]?(?:h|huge)", "clip"),
    (r"flf2v.*14b|14b.*flf2v", "flf2v"),
    (r"i2v.*720p.*14b|i2v.*14b.*720p", "i2v-720p"),
    (r"i2v.*14b|14b.*i2v", "i2v"),
    (r"t2v.*1[._-]3b", "t2v-1.3b"),
    (r"t2v.*14b|14b.*t2v", "t2v"),
)
"""The first pattern that is found in a name tells the network."""

_ADDITION = re.compile(r"lora|lightx2v|distill|rank[0-9]")
"""A LoRA, or weights that were changed by one: named like the network it belongs to."""


def base_name(name: str) -> str:
    """Returns a file name without folders, written with either slash, or the end of a URL."""
    return re.split(r"[\\/]", name.partition("?")[0])[-1]


def network_of(name: str) -> str | None:
    """Returns which network a file is by its name, None if the name does not tell."""
    plain = base_name(name[:1000]).lower()
    if is_foreign(plain) or _ADDITION.search(plain):
        return None
    return next((network for pattern, network in _PATTERNS if re.search(pattern, plain)), None)


def is_foreign(name: str) -> bool:
    """Returns True for a file that is by its name another network than those known here."""
    return _FOREIGN.search(base_name(name[:1000]).lower()) is not None


def is_available(name: str, models: Collection[str] | None) -> bool:
    """Returns True if the network that a file name stands for is installed.

    Args:
        name: as in the graph.
        models: names of the installed files; None: every known network counts as installed.
    """
    network = network_of(name)
    if models is None:
        return network is not None
    installed = {base_name(model) for model in models}
    if base_name(name) in installed:
        return True
    return network is not None and any(network_of(model) == network for model in installed)


def preset_of(name: str) -> str | None:
    """Returns the preset of the command line that a transformer file belongs to, or None."""
    network, plain = network_of(name), base_name(name).lower()
    precision = "fp8" if "fp8" in plain else "bf16"
    if plain.endswith(".gguf"):
        return "gguf" if network == "steady_dancer" else None
    presets = {
        "i2v-720p": f"{precision}-720p",
        "flf2v": f"flf2v-{precision}",
        "t2v-1.3b": "1.3b",
    }
    return presets.get(network or "", precision if network in TRANSFORMERS else None)
