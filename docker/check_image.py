"""Checks a built image: `python docker/check_image.py TORCH_FILE CUDNN_FILE`.

The pinned versions are there, the cuDNN that PyTorch really loads is the pinned one, everything
imports, videos can be written, and C can be compiled against Python.h. Needs no GPU. Prints what
the image holds; the exit code is 1 and the build fails if something is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

IMPORTED = (
    "torch",
    "torchvision",
    "av",
    "cv2",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "transformers",
    "boto3",
    "runpod",
    "pipelines",
    "xicon_infer.run",
)
CODECS = ("libx264", "aac")
SOURCE = "#include <Python.h>\nint answer(void) { return 42; }\n"


def main(arguments: list[str]) -> int:
    """Returns 0 if nothing is wrong."""
    torch_file, cudnn_file = (Path(name).read_text() for name in arguments)
    problems = [
        *version_problems(pins(torch_file) | pins(cudnn_file)),
        *import_problems(IMPORTED),
        *cudnn_problems(pins(cudnn_file)),
        *codec_problems(),
        *compiler_problems(),
    ]
    for problem in problems:
        sys.stderr.write(f"image: {problem}\n")
    return 1 if problems else 0


def pins(text: str) -> dict[str, str]:
    """Returns name -> version of the lines `name==version`."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE))


def version_problems(wanted: dict[str, str]) -> Iterator[str]:
    """Yields a sentence for each package that is absent or of another version."""
    for name, version in wanted.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{name} is not installed, {version} is pinned"
            continue
        sys.stdout.write(f"{name} {found}\n")
        if found != version:
            yield f"{name} is {found}, {version} is pinned"


def import_problems(names: tuple[str, ...]) -> Iterator[str]:
    """Yields a sentence for each module that cannot be imported."""
    for name in names:
        if problem := _problem(partial(import_module, name)):
            yield f"{name} cannot be imported: {problem}"


def cudnn_problems(wanted: dict[str, str]) -> Iterator[str]:
    """Yields a sentence if PyTorch loads another cuDNN than the pinned one."""
    (version,) = wanted.values()
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    expected = major * 10_000 + minor * 100 + patch
    try:
        found = import_module("torch").backends.cudnn.version()
    except (ImportError, OSError, RuntimeError) as error:
        yield f"cuDNN does not load: {error}"
        return
    sys.stdout.write(f"cuDNN {found}\n")
    if found != expected:
        yield f"PyTorch loads cuDNN {found}, {expected} is pinned"


def codec_problems() -> Iterator[str]:
    """Yields a sentence for each encoder that PyAV lacks."""
    for name in CODECS:
        if problem := _problem(partial(_encoder, name)):
            yield f"encoder {name}: {problem}"


def compiler_problems() -> Iterator[str]:
    """Yields a sentence if a C file with Python.h cannot be compiled, as Triton does."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "stub.c", Path(folder) / "stub.so"
        source.write_text(SOURCE)
        include = sysconfig.get_path("include")
        command = ["gcc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield f"gcc does not run: {error}"
            return
        if done.returncode:
            yield f"gcc cannot compile: {done.stderr.strip().splitlines()[0]}"


def _encoder(name: str) -> object:
    return import_module("av.codec").Codec(name, "w")


def _problem(work: Callable[[], object]) -> str:
    """Returns what a call raises, "" if nothing."""
    try:
        work()
    # A package built for another torch or glibc fails in any of these ways.
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
