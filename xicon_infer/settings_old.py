"""The environment variables of the ComfyUI workers, and what became of each.

`translate` reads those that were renamed; the others are kept, dropped or never read, and the
table says so for the reference page and the notices at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from xicon_infer.settings_table import MODES

Verdict = Literal["kept", "renamed", "merged", "dropped", "not read", "build only"]

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True)
class OldName:
    """One variable of an older worker.

    name: ends in `*` for all that begin so. verdict: what became of it. now: for a reader.
    silent: no notice if it is set: it is harmless, or belongs to somebody else.
    """

    name: str
    verdict: Verdict
    now: str
    silent: bool = False

    def matches(self, name: str) -> bool:
        """Returns True if this is the entry of a variable."""
        if self.name.endswith("*"):
            return name.startswith(self.name[:-1])
        return name == self.name


_LOCAL = "not set by us; belongs to CUDA and PyTorch"
_NO_COMFY = "there is no ComfyUI; action `health` reports what can be known"
_NO_SHELL = "no remote shell in a serverless image"
_NO_SOCKET = "there is no websocket"
_FAST = "profile `fast`"
_TOOLS = "deployment tools only"
_DOWNLOADER = "an option of `xicon-infer weights`"


def _each(verdict: Verdict, now: str, *names: str, silent: bool = False) -> list[OldName]:
    return [OldName(name, verdict, now, silent) for name in names]


OLD_NAMES: tuple[OldName, ...] = (
    *_each("kept", _LOCAL, "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", silent=True),
    *_each(
        "kept",
        "default expandable_segments:True in the image",
        "PYTORCH_CUDA_ALLOC_CONF",
        silent=True,
    ),
    *_each("kept", "set by the image only where the library exists", "LD_PRELOAD", silent=True),
    *_each("renamed", "XICON_LOG_LEVEL", "COMFY_LOG_LEVEL"),
    *_each("dropped", _NO_SOCKET, "WEBSOCKET_*", silent=True),
    *_each("dropped", _NO_COMFY, "COMFY_API_AVAILABLE_*", "COMFY_ORG_API_KEY"),
    *_each("dropped", _NO_COMFY, "NETWORK_VOLUME_DEBUG", "SERVER_ADDRESS"),
    *_each("dropped", "no watcher: upload is part of the job", "ENABLE_R2_SYNC"),
    *_each("dropped", "no template", "WORKFLOW_TEMPLATE_PATH"),
    *_each("dropped", "no effect", "TESTING", silent=True),
    *_each("renamed", "XICON_LOG_LEVEL=DEBUG", "DEBUG"),
    *_each(
        "not read",
        _TOOLS,
        "RUNPOD_API_KEY",
        "RUNPOD_ENDPOINT_ID",
        "REGISTRY",
        "REGISTRY_*",
        silent=True,
    ),
    *_each("renamed", "XICON_ATTENTION", "SAGEATTENTION_ENABLED"),
    *_each("build only", "no effect at run time", "TORCH_CUDA_ARCH_LIST", "BAKE_*", silent=True),
    *_each("renamed", "XICON_MODES", "ENABLE_STEADYDANCER", "ENABLE_SCAIL"),
    *_each("renamed", "XICON_STEADY_DANCER_VARIANT", "STEADYDANCER_VARIANT"),
    *_each("dropped", _FAST, "TURBO_STEPS", "TURBO_GUIDE_SCALE", "TURBO_CONDITION_GUIDE"),
    *_each("dropped", _FAST, "TURBO_END_CFG", "ENABLE_WAN22_DISTILL", "BAKE_TURBO"),
    *_each("dropped", "pose comes with the mode", "ENABLE_DWPOSE", "DWPOSE_*"),
    *_each("merged", "XICON_MEMORY", "GPU_MEMORY_MODE", "GPU_TIER"),
    *_each("dropped", "the presence of the volume is detected", "STORAGE_MODE"),
    *_each("not read", _DOWNLOADER, "DRY_RUN", "DOWNLOAD_TIMEOUT", silent=True),
    *_each(
        "dropped", "no ComfyUI is started", "COMFYUI_PORT", "COMFYUI_ARGS", "UPDATE_NODES_ON_START"
    ),
    *_each("dropped", _NO_SHELL, "JUPYTER_PASSWORD", "PUBLIC_KEY"),
)

_MEMORY: Mapping[str, str] = MappingProxyType(
    {
        "auto": "auto",
        "full": "full",
        "model_full_load": "full",
        "model_cpu_offload": "balanced",
        "balanced": "balanced",
        "sequential_cpu_offload": "low",
        "low": "low",
    }
)


def translate(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Returns the values that old names give to new ones, and a notice per old name that is set.

    A new name that is set itself wins; the notice then says so.

    Args:
        env: variables that are set and not empty.
    """
    found = _renamed(env)
    notices = []
    for name in sorted(env):
        # The last match, because BAKE_TURBO was dropped though BAKE_* is of the build.
        entries = [old for old in OLD_NAMES if old.matches(name)]
        if not entries or entries[-1].silent:
            continue
        entry = entries[-1]
        if entry.verdict == "dropped":
            notices.append(f"{name} has no effect any more: {entry.now}")
        elif name in found:
            new, value = found[name]
            wins = f", but {new} is set and wins" if new in env else ""
            notices.append(f"{name} is now {new}; read as {new}={value}{wins}")
        elif _says_something(name, env[name]):
            notices.append(f"{name} has no effect: set {entry.now.split('=')[0]} instead")
    values = {new: value for new, value in found.values() if new not in env}
    return values, notices


def _says_something(name: str, value: str) -> bool:
    """Returns False for DEBUG of another program, which is no boolean."""
    return name != "DEBUG" or value.lower() in TRUE


def _renamed(env: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns old name -> (new name, value) for those whose value can be read."""
    found = {}
    if "COMFY_LOG_LEVEL" in env:
        found["COMFY_LOG_LEVEL"] = ("XICON_LOG_LEVEL", env["COMFY_LOG_LEVEL"])
    elif env.get("DEBUG", "").lower() in TRUE:
        found["DEBUG"] = ("XICON_LOG_LEVEL", "DEBUG")
    if (sage := env.get("SAGEATTENTION_ENABLED", "").lower()) in (*TRUE, *FALSE):
        found["SAGEATTENTION_ENABLED"] = ("XICON_ATTENTION", "sage" if sage in TRUE else "auto")
    if "STEADYDANCER_VARIANT" in env:
        found["STEADYDANCER_VARIANT"] = (
            "XICON_STEADY_DANCER_VARIANT",
            env["STEADYDANCER_VARIANT"],
        )
    for name in ("GPU_MEMORY_MODE", "GPU_TIER"):
        if (memory := _MEMORY.get(env.get(name, "").lower())) and not found.get("GPU_MEMORY_MODE"):
            found[name] = ("XICON_MEMORY", memory)
    return found | _switched_modes(env)


def _switched_modes(env: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns XICON_MODES without the modes that an ENABLE_ variable switches off."""
    switches = {"ENABLE_SCAIL": "scail", "ENABLE_STEADYDANCER": "steady_dancer"}
    given = {name: env[name].lower() for name in switches if name in env}
    off = {switches[name] for name, value in given.items() if value in FALSE}
    modes = ",".join(mode for mode in MODES if mode not in off)
    return {
        name: ("XICON_MODES", modes) for name, value in given.items() if value in (*TRUE, *FALSE)
    }
