"""What is on this machine and what is missing: the findings of `xicon-infer doctor`.

Every optional package may be absent; each finding says what is there, or the reason why nothing is.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from xicon_infer.checks import CheckResult, conv3d_trap, provider_trap
from xicon_infer.weights.manifest import FileEntry, files_for, load_manifest, presets
from xicon_infer.weights.places import existing, find_all

State = Literal["ok", "absent", "problem"]
"""ok: usable. absent: optional and not there. problem: needed or harmful."""

# (module, distribution): what the tiny preset imports, and what some options import.
_NEEDED = (
    ("numpy", "numpy"),
    ("av", "av"),
    ("PIL", "pillow"),
    ("cv2", "opencv-python-headless"),
    ("safetensors", "safetensors"),
    ("tokenizers", "tokenizers"),
    ("transformers", "transformers"),
    ("ftfy", "ftfy"),
    ("rich", "rich"),
)
_OPTIONAL = (
    ("xformers", "xformers"),
    ("flash_attn", "flash-attn"),
    ("flash_attn_interface", "flash-attn-3"),
    ("sentencepiece", "sentencepiece"),
)
_LEAST_FREE_BYTES = 2 * 10**9
_GIGA = 1e9
WORKER = "worker"
"""Group of the checks that a worker makes when it starts."""

_STATES: dict[str, State] = {"ok": "ok", "warn": "absent", "fail": "problem"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    needed: the tiny preset cannot run without it. fix: what to do about it, "" if nothing.
    """

    group: str
    name: str
    state: State
    text: str
    needed: bool = False
    fix: str = ""


def examine(search_dirs: Sequence[Path]) -> list[Finding]:
    """Returns everything that was found.

    Args:
        search_dirs: folders with weights.
    """
    findings = [_python(), *_packages()]
    findings += _torch()
    findings += _video()
    findings += _pose(findings)
    findings += _weights(search_dirs)
    findings.append(_disk(Path.cwd()))
    return findings


def tiny_can_run(findings: Sequence[Finding]) -> bool:
    """Returns True if nothing that the tiny preset needs is missing."""
    return all(finding.state == "ok" for finding in findings if finding.needed)


def of_check(result: CheckResult) -> Finding:
    """Returns a result of `xicon_infer.checks` as a line of the report."""
    text = f"{result.text} ({result.seconds:.1f} s)" if result.seconds >= 0.1 else result.text
    return Finding(WORKER, result.name, _STATES[result.state], text, fix=result.fix)


def _python() -> Finding:
    version = platform.python_version()
    text = f"{version} on {platform.system()} {platform.machine()}"
    state: State = "ok" if sys.version_info >= (3, 10) else "problem"
    return Finding("python", "python", state, text, needed=True)


def _packages() -> list[Finding]:
    return [_package(module, name, needed=True) for module, name in _NEEDED] + [
        _package(module, name, needed=False) for module, name in _OPTIONAL
    ]


def _package(module: str, name: str, *, needed: bool, group: str = "packages") -> Finding:
    try:
        if find_spec(module) is not None:
            return Finding(group, name, "ok", metadata.version(name), needed)
        text = "not installed"
    except metadata.PackageNotFoundError:
        return Finding(group, name, "ok", "unknown version", needed)
    except (ImportError, OSError, ValueError) as error:
        text = f"cannot be found: {_first_line(error)}"
    return Finding(group, name, "problem" if needed else "absent", text, needed)


def _load(module: str) -> tuple[Any, str]:
    """Returns the module, or None and why it cannot be imported."""
    try:
        return import_module(module), ""
    # A package built for another torch, CUDA or numpy fails in any of these ways.
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        return None, f"cannot be imported: {_first_line(error)}"


def _torch() -> list[Finding]:
    torch, reason = _load("torch")
    if torch is None:
        return [Finding("torch", "torch", "problem", reason, needed=True)]
    findings = [Finding("torch", "torch", "ok", torch.__version__, needed=True)]
    if torch.cuda.is_available():
        findings += _cuda(torch)
    else:
        built = torch.version.cuda or "without CUDA"
        text = f"no GPU (torch is built {'for CUDA ' if torch.version.cuda else ''}{built})"
        findings.append(Finding("torch", "cuda", "absent", text))
    return findings + _attention() + _kernels()


def _cuda(torch: Any) -> list[Finding]:
    cudnn = torch.backends.cudnn.version() or 0
    trap = conv3d_trap(torch.__version__, cudnn)
    findings = [
        Finding("torch", "cuda", "ok", str(torch.version.cuda)),
        Finding("torch", "cudnn", "problem" if trap else "ok", trap or str(cudnn)),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / _GIGA:.0f} GB"
        text = f"{gpu.name}, {memory}, capability {gpu.major}.{gpu.minor}"
        findings.append(Finding("torch", f"gpu {index}", "ok", text))
    return findings


def _attention() -> list[Finding]:
    module, reason = _load("xicon_infer.ops.attention")
    if module is None:
        return [Finding("attention", "attention", "problem", reason, needed=True)]
    return [
        Finding("attention", probe.name, "ok" if probe.available else "absent", probe.reason)
        for probe in module.probe_backends()
    ]


def _kernels() -> list[Finding]:
    module, reason = _load("xicon_infer.ops.fused_choice")
    if module is None:
        return [Finding("kernels", "kernels", "problem", reason, needed=True)]
    return [
        Finding("kernels", probe.kernels, "absent" if probe.why else "ok", probe.why)
        for probe in module.probe_kernels()
    ]


def _video() -> list[Finding]:
    av, reason = _load("av.codec")
    if av is None:
        return [Finding("video", "av", "problem", reason, needed=True)]
    return [_codec(av, name) for name in ("libx264", "aac")]


def _codec(av: Any, name: str) -> Finding:
    try:
        text = av.Codec(name, "w").long_name
    except ValueError as error:
        return Finding("video", name, "problem", _first_line(error), needed=True)
    return Finding("video", name, "ok", text, needed=True)


def _pose(findings: Sequence[Finding]) -> list[Finding]:
    """Returns what finding poses in a driving video needs; a given motion needs none of it."""
    gpu = any(finding.name == "cuda" and finding.state == "ok" for finding in findings)
    return [_onnxruntime(gpu=gpu), _torchvision(), _ultralytics()]


def _onnxruntime(*, gpu: bool) -> Finding:
    onnxruntime, reason = _load("onnxruntime")
    if onnxruntime is None:
        return Finding("pose", "onnxruntime", "absent", f"{reason}; finds persons and keypoints")
    providers = onnxruntime.get_available_providers()
    trap = provider_trap(providers, gpu=gpu)
    text = f"{onnxruntime.__version__}: {', '.join(providers)}{trap and '; ' + trap}"
    return Finding("pose", "onnxruntime", "problem" if trap else "ok", text)


def _torchvision() -> Finding:
    torchvision, reason = _load("torchvision")
    if torchvision is None:
        return Finding("pose", "torchvision", "absent", f"{reason}; NLF (--body nlf) needs it")
    return Finding("pose", "torchvision", "ok", str(torchvision.__version__))


def _ultralytics() -> Finding:
    """Returns whether the package is there; it is not imported."""
    found = _package("ultralytics", "ultralytics", needed=False, group="pose")
    return replace(found, text=f"{found.text}; AGPL-3.0, for --detector FILE and --tracker alone")


def _weights(search_dirs: Sequence[Path]) -> list[Finding]:
    """Returns the folders that were searched and, for each preset, what is there and missing."""
    folders = existing(search_dirs)
    searched = ", ".join(map(str, folders)) or "no folder"
    findings = [Finding("weights", "folders", "ok" if folders else "absent", searched)]
    found = find_all(load_manifest().files, search_dirs)
    pairs = [(pipeline, preset) for pipeline, names in presets().items() for preset in names]
    return findings + [
        _preset(f"{pipeline}/{preset}", entries, found)
        for pipeline, preset in pairs
        if (entries := files_for(pipeline, preset))
    ]


def _preset(name: str, entries: Sequence[FileEntry], found: Collection[str]) -> Finding:
    missing = [entry.names[0] for entry in entries if entry.id not in found]
    text = f"{len(entries) - len(missing)} of {len(entries)} files"
    if missing:
        text += f"; missing: {', '.join(missing)}"
    return Finding("weights", name, "absent" if missing else "ok", text)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free >= _LEAST_FREE_BYTES else "problem"
    return Finding("disk", "free", state, f"{free / _GIGA:.1f} GB in {folder}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
