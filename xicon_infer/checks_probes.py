"""How the machine is looked at: one function per question, replaced by fakes in the tests.

A probe returns what it found and raises what went wrong in the words of the library that failed.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from xicon_infer.errors import BackendUnavailable

_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_TRIAL_BYTES = 4096
_KILLED_S = 1.0
_SIDE = 256

# A network of one convolution that convolves a 3 x 3 picture with itself: the sum of its squares.
# A network file needs no weights then. tests/test_checks_probes.py writes the same with onnx.
ONNX_CONV = bytes.fromhex(
    "08083a4e0a0f0a01780a01781201792204436f6e761201675a1b0a017812160a14080112100a0208"
    "010a0208010a0208030a020803621b0a017912160a14080112100a0208010a0208010a0208010a02"
    "080142040a00100d"
)
_SUM_OF_SQUARES = 9.0


@dataclass(frozen=True)
class GpuFacts:
    """What PyTorch says of itself and of the first GPU.

    torch, cuda: versions, as "2.11.0+cu128" and "12.8". cudnn: as 91900. name, capability:
    (major, minor). total_bytes, free_bytes: of its memory.
    """

    torch: str
    cuda: str
    cudnn: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Probes:
    """The questions. Each may raise OSError, RuntimeError, ImportError or an `XiconError`.

    nvidia_smi: seconds it may take -> one line per GPU, "name, driver". built_for: the CUDA
    version of PyTorch, "" without. gpu: the first GPU; raises `BackendUnavailable` without one.
    matmul: multiplies in bfloat16 on the GPU and checks the result. attention: kernel and why it
    does not run, "" if it does, fastest first. fp8: likewise the ways to multiply. onnx: on which
    device onnxruntime finds poses, and why not on the GPU. requirements: "name>=version" of the
    package. version: of a package, "" if it is absent. free_bytes: of the disk of a folder. write:
    makes, reads and removes a file in a folder. video: opens a video and decodes a frame; returns
    what it is.
    """

    nvidia_smi: Callable[[float], str]
    built_for: Callable[[], str]
    gpu: Callable[[], GpuFacts]
    matmul: Callable[[], None]
    attention: Callable[[], Sequence[tuple[str, str]]]
    fp8: Callable[[], Mapping[str, str]]
    onnx: Callable[[], tuple[str, str]]
    requirements: Callable[[], Sequence[str]]
    version: Callable[[str], str]
    free_bytes: Callable[[Path], int]
    write: Callable[[Path], None]
    video: Callable[[Path], str]


def run_nvidia_smi(limit_s: float) -> str:
    """Returns the lines of nvidia-smi.

    Raises:
        subprocess.TimeoutExpired: it took too long; it is killed, and not waited for, because a
            hung driver does not even let it die.
    """
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(_SMI, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stack.callback(stream.close)
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
            raise
    if process.returncode:
        raise RuntimeError((errors or output).strip() or f"exit code {process.returncode}")
    return output


def torch_cuda() -> str:
    """Returns the CUDA version that PyTorch was built for, "" for a build without CUDA."""
    import torch

    return torch.version.cuda or ""


def gpu_facts() -> GpuFacts:
    """Returns what PyTorch and the first GPU are.

    Raises:
        BackendUnavailable: PyTorch sees no GPU.
    """
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        why = f"is built for CUDA {built} and sees no GPU" if built else "is built without CUDA"
        raise BackendUnavailable(f"PyTorch {torch.__version__} {why}")
    cudnn: Any = torch.backends.cudnn
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return GpuFacts(
        torch=str(torch.__version__),
        cuda=str(built),
        cudnn=int(cudnn.version() or 0),
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=total,
        free_bytes=free,
    )


def multiply(device: str = "cuda") -> None:
    """Multiplies two bfloat16 matrices of ones.

    Raises:
        RuntimeError: the installed PyTorch has no kernel for this GPU, or a wrong one.
    """
    import torch

    ones = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    found = (ones @ ones).float().mean().item()
    if found != _SIDE:
        raise RuntimeError(f"a product of ones gave {found} instead of {_SIDE}")


def attention_kernels() -> list[tuple[str, str]]:
    """Returns the attention kernels and why each does not run, "" if it does."""
    from xicon_infer.ops.attention import probe_backends

    return [(probe.name, probe.reason) for probe in probe_backends()]


def fp8_ways() -> dict[str, str]:
    """Returns the ways to multiply fp8 weights and why each does not work, "" if it does."""
    import torch

    from xicon_infer.ops.linear import MATMULS, matmul_problem

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {matmul: matmul_problem(matmul, device) for matmul in MATMULS}


def onnx_device(device: str = "cuda") -> tuple[str, str]:
    """Returns where onnxruntime runs a small network, "cuda" or "cpu", and why not on the GPU.

    A build without kernels for the GPU opens a network and fails when it runs it, so one is run.

    Args:
        device: what to try first.

    Raises:
        RuntimeError: it gives wrong numbers on the CPU as well.
        XiconError: it does not run at all.
    """
    reason = ""
    if device == "cuda":
        try:
            _run_conv("cuda")
        except (BackendUnavailable, RuntimeError) as error:
            reason = str(error)
        else:
            return "cuda", ""
    _run_conv("cpu")
    return "cpu", reason


def _run_conv(device: str) -> None:
    import torch

    from xicon_infer.pose.onnx_model import open_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conv.onnx"
        path.write_bytes(ONNX_CONV)
        model = open_model(path, torch.device(device), threads=1)
        (result,) = model.run(torch.ones(1, 1, 3, 3, device=device))
    found = result.float().sum().item()
    if not math.isclose(found, _SUM_OF_SQUARES, rel_tol=1e-3):
        raise RuntimeError(f"a convolution gave {found} instead of {_SUM_OF_SQUARES}")


def own_requirements() -> list[str]:
    """Returns what the installed package asks for; nothing where it runs from its source."""
    try:
        every = metadata.requires("xicon-infer") or []
    except metadata.PackageNotFoundError:
        return []
    return [line for line in every if "extra ==" not in line]


def package_version(name: str) -> str:
    """Returns the version of an installed package, or ""."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def disk_free_bytes(folder: Path) -> int:
    """Returns what is free on the disk of a folder or of its nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_trial(folder: Path) -> None:
    """Makes the folder, and writes, reads and removes a file in it.

    Raises:
        OSError: one of these is not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".trial-{uuid.uuid4().hex}"
    content = b"x" * _TRIAL_BYTES
    try:
        path.write_bytes(content)
        if path.read_bytes() != content:
            raise OSError(f"{path} does not hold what was written to it")
    finally:
        path.unlink(missing_ok=True)


def video_facts(path: Path) -> str:
    """Returns what a video is, in words; decodes its first frame.

    Raises:
        MediaError: it cannot be used.
    """
    from xicon_infer.media.video import probe

    info: Any = probe(path, field="XICON_DEFAULT_VIDEO")
    return f"{info.width}x{info.height}, {info.duration_s:.1f} s, {info.codec}"


REAL = Probes(
    nvidia_smi=run_nvidia_smi,
    built_for=torch_cuda,
    gpu=gpu_facts,
    matmul=multiply,
    attention=attention_kernels,
    fp8=fp8_ways,
    onnx=onnx_device,
    requirements=own_requirements,
    version=package_version,
    free_bytes=disk_free_bytes,
    write=write_trial,
    video=video_facts,
)
