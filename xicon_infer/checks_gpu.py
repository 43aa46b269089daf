"""Checks of the GPU: driver, kernels, memory, cuDNN, attention, fp8, onnxruntime."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from pipelines.memory import CONTEXT_BYTES, choose_memory
from pipelines.memory_needs import Workload, needs_of
from pipelines.plan_memory import TABLE_JOBS
from xicon_infer import formulas
from xicon_infer.checks_probes import GpuFacts, Probes
from xicon_infer.checks_types import CheckNeeds, Checks, Outcome, State
from xicon_infer.errors import BackendUnavailable, OutOfMemory
from xicon_infer.ops.cudnn import conv3d_trap as conv3d_trap

SMI_LIMIT_S = 10.0
OLDEST_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)

# Major version of the CUDA that PyTorch was built for -> oldest driver.
# Source: NVIDIA: CUDA Toolkit release notes, minor version compatibility.
OLDEST_DRIVERS: Mapping[int, int] = MappingProxyType({12: 525, 13: 580})

_CUDA_PROVIDER = "CUDAExecutionProvider"
_OCCUPIED_BYTES = 2 * 10**9

_DEFAULT_JOBS: Mapping[str, Workload] = MappingProxyType(
    {
        **{work.pipeline: work for work in TABLE_JOBS.values() if work.pipeline != "wan_t2v"},
        "wan_t2v": Workload(
            "wan_t2v", 832, 480, 81, formulas.WAN_T2V_14B, fp8_file=True, image_parameters=0
        ),
    }
)
"""Pipeline -> a job of its usual size with its first set of weights."""


def gpu_checks(needs: CheckNeeds, probes: Probes) -> Checks:
    """Yields the checks; those after "gpu" only if there is one."""
    yield "nvidia-smi", lambda: check_driver(needs, probes)
    try:
        facts = probes.gpu()
    except (BackendUnavailable, RuntimeError, ImportError, OSError) as error:
        yield "gpu", partial(_no_gpu, needs, str(error))
        return
    yield "gpu", lambda: check_capability(facts)
    yield "kernels", lambda: check_kernels(facts, probes)
    yield "memory", lambda: check_memory(needs, facts)
    yield "cudnn", lambda: check_cudnn(facts)
    yield "attention", lambda: check_attention(needs, probes)
    yield "fp8", lambda: check_fp8(facts, probes)
    yield "onnxruntime", lambda: check_onnx(probes)


def check_driver(needs: CheckNeeds, probes: Probes) -> Outcome:
    """Checks that the driver answers, and that it is new enough for this PyTorch."""
    try:
        lines = [line.strip() for line in probes.nvidia_smi(SMI_LIMIT_S).splitlines() if line]
    except subprocess.TimeoutExpired:
        text = f"no answer within {SMI_LIMIT_S:.0f} s: the driver of this host hangs"
        return Outcome("fail" if needs.gpu else "warn", text, "use another host")
    except (OSError, RuntimeError) as error:
        # Some hosts give the libraries of the driver, but not this program.
        return Outcome("warn", f"does not run: {error}", "nothing, if the GPU is seen below")
    if not lines:
        return Outcome("warn", "names no GPU")
    driver = lines[0].rpartition(",")[2].strip()
    cuda = probes.built_for()
    oldest = OLDEST_DRIVERS.get(_major(cuda), 0)
    if 0 < _major(driver) < oldest:
        return Outcome(
            "fail" if needs.gpu else "warn",
            f"driver {driver} is too old for a PyTorch built for CUDA {cuda}; {oldest} is needed",
            "allow only hosts with that CUDA version, or build the image with another "
            "TORCH_VARIANT (docs/deploy-runpod.md)",
        )
    return Outcome("ok", "; ".join(lines))


def _major(version: str) -> int:
    """Returns the first number of a version, 0 if it begins with none."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def _no_gpu(needs: CheckNeeds, reason: str) -> Outcome:
    if not needs.gpu:
        return Outcome("warn", f"{reason}; the CPU is used", "only the tiny preset is of use there")
    fix = "start the container with a GPU, and compare the driver above with the CUDA version"
    return Outcome("fail", reason, fix)


def check_capability(facts: GpuFacts) -> Outcome:
    """Checks that the GPU has bfloat16 arithmetic."""
    major, minor = facts.capability
    text = f"{facts.name}, capability {major}.{minor}, {facts.total_bytes / 1e9:.0f} GB"
    if facts.capability < OLDEST_CAPABILITY:
        fix = "use an Ampere GPU or newer"
        return Outcome("fail", f"{text}; 8.0 is needed for bfloat16", fix)
    return Outcome("ok", text)


def check_kernels(facts: GpuFacts, probes: Probes) -> Outcome:
    """Checks that this PyTorch has kernels for this GPU, by running one."""
    build = f"torch {facts.torch} for CUDA {facts.cuda}"
    try:
        probes.matmul()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        fix = "use an image whose PyTorch was built for this GPU (RTX 50: CUDA 12.8 or newer)"
        return Outcome("fail", f"{build} cannot multiply on a {facts.name}: {reason}", fix)
    return Outcome("ok", build)


def check_memory(needs: CheckNeeds, facts: GpuFacts) -> Outcome:
    """Checks that a usual job of every mode fits, by the closed forms of the plan."""
    usable = facts.free_bytes - CONTEXT_BYTES
    told, refused = [], []
    for mode, sets in needs.modes.items():
        work = _default_job(mode, sets)
        if work is None:
            continue
        try:
            plan = choose_memory(
                partial(needs_of, work), free_bytes=max(usable, 1), request=needs.memory
            )
            told.append(f"{mode} {plan.mode}")
        except OutOfMemory as error:
            refused.append(f"{mode}: {error.message}")
    text = f"{facts.free_bytes / 1e9:.1f} of {facts.total_bytes / 1e9:.1f} GB free"
    if refused:
        state: State = "warn" if told and needs.any_mode else "fail"
        fix = "use a larger GPU, XICON_MEMORY=auto or low, or fewer XICON_MODES"
        return Outcome(state, "; ".join([text, *refused]), fix)
    text = "; ".join([text, *told])
    if facts.total_bytes - facts.free_bytes > CONTEXT_BYTES + _OCCUPIED_BYTES:
        return Outcome("warn", f"{text}; something else uses this GPU", "end it, or share no GPU")
    return Outcome("ok", text)


def _default_job(mode: str, sets: Sequence[str]) -> Workload | None:
    """Returns a mode's usual job in numbers; None where nothing is known to be needed."""
    work = _DEFAULT_JOBS.get(mode)
    own = [name.partition("/")[2] for name in sets if name.startswith(f"{mode}/")]
    if work is None or not own:
        return None
    if own[0] == "1.3b":
        return next(job for job in TABLE_JOBS.values() if job.pipeline == "wan_t2v")
    return replace(work, fp8_file="bf16" not in own[0])


def check_cudnn(facts: GpuFacts) -> Outcome:
    """Checks that videos will not be decoded by the slow convolution."""
    if trap := conv3d_trap(facts.torch, facts.cudnn):
        major = facts.cuda.partition(".")[0]
        fix = f"pip install --no-deps --upgrade nvidia-cudnn-cu{major}"
        return Outcome("warn", trap, fix)
    return Outcome("ok", str(facts.cudnn))


def check_attention(needs: CheckNeeds, probes: Probes) -> Outcome:
    """Checks which attention kernels run, and that one of those asked for does."""
    kernels = probes.attention()
    running = [name for name, reason in kernels if not reason]
    absent = [f"{name} ({reason})" for name, reason in kernels if reason]
    text = ", ".join(running) + (f"; not {', '.join(absent)}" if absent else "")
    if not running:
        return Outcome("fail", f"none runs: {', '.join(absent)}", "install PyTorch again")
    if needs.attention and not set(needs.attention) & set(running):
        fix = "set XICON_ATTENTION=auto, or install the package"
        return Outcome("warn", f"{text}; what XICON_ATTENTION asks for does not run", fix)
    return Outcome("ok", text)


def check_fp8(facts: GpuFacts, probes: Probes) -> Outcome:
    """Checks how fp8 weights are multiplied; bringing them to bfloat16 always works."""
    ways = probes.fp8()
    running = [name for name, reason in ways.items() if not reason]
    absent = [f"{name} ({reason})" for name, reason in ways.items() if reason]
    text = ", ".join(running) + (f"; not {', '.join(absent)}" if absent else "")
    if not running:
        return Outcome("fail", f"none works: {', '.join(absent)}", "install PyTorch again")
    if absent and facts.capability >= FP8_CAPABILITY:
        fix = "nothing: the weights are brought to bfloat16, which is slower"
        return Outcome("warn", f"{text}; this GPU has fp8 arithmetic", fix)
    return Outcome("ok", text)


def provider_trap(providers: Sequence[str], *, gpu: bool) -> str:
    """Returns why poses would be found on the CPU of a machine with a GPU, or "".

    Args:
        providers: what onnxruntime can run on, as "CUDAExecutionProvider".
        gpu: torch can use a GPU.
    """
    if not gpu or _CUDA_PROVIDER in providers:
        return ""
    return (
        f"no {_CUDA_PROVIDER}, so that the GPU finds no poses; install onnxruntime-gpu in place of "
        "onnxruntime"
    )


def check_onnx(probes: Probes) -> Outcome:
    """Checks where poses are found, by running a small network."""
    device, reason = probes.onnx()
    if device == "cuda":
        return Outcome("ok", "runs on the GPU")
    fix = "use the image's onnxruntime-gpu, which fits its CUDA (docs/deploy-runpod.md)"
    return Outcome("warn", f"runs on the CPU, which finds poses slowly: {reason}", fix)
