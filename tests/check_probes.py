"""Probes of a machine on which everything is as it should be, for tests to break one by one."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch

from xicon_infer.checks_probes import GpuFacts, Probes

GIB = 2**30
VERSIONS = {"torch": "2.11.0+cu128", "av": "18.1.0"}
GPU = GpuFacts("2.11.0+cu128", "12.8", 91900, "H100", (9, 0), 80 * GIB, 79 * GIB)

GOOD = Probes(
    nvidia_smi=lambda limit_s: "NVIDIA H100, 570.86.15\n",
    built_for=lambda: "12.8",
    gpu=lambda: GPU,
    matmul=lambda: None,
    attention=lambda: [("cudnn", ""), ("flash3", "no such package"), ("math", "")],
    fp8=lambda: {"dequant": "", "scaled_mm_row": "", "scaled_mm_tensor": ""},
    onnx=lambda: ("cuda", ""),
    requirements=lambda: ["torch>=2.10", "av>=17"],
    version=lambda name: VERSIONS.get(name, ""),
    free_bytes=lambda folder: 100 * 10**9,
    write=lambda folder: None,
    video=lambda path: "512x896, 3.0 s, h264",
)


def raising(error: BaseException):
    """Returns a probe that raises, whatever it is asked."""

    def probe(*_: object) -> None:
        raise error

    return probe


def with_gpu(**facts: object) -> Probes:
    """Returns good probes of another GPU."""
    return replace(GOOD, gpu=lambda: replace(GPU, **facts))


def publish(folder: Path, entries) -> None:
    """Puts a file of some content in place of every entry that has no pinned size."""
    for entry in entries:
        path = folder / entry.names[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT.get(path.suffix, b"\x08\x07 onnx"))


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, buffer)
    return buffer.getvalue()


HEADER = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
CONTENT = {
    ".safetensors": len(HEADER).to_bytes(8, "little") + HEADER + b"\0",
    ".json": b"{}",
    ".pth": _pickled(),
}
