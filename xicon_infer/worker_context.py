"""What a worker has: names of LoRAs, of model files, and of files below the input roots."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xicon_infer.request import RequestContext
from xicon_infer.settings import Settings
from xicon_infer.weights.places import COMFYUI_FOLDERS

MAX_INPUT_FILES = 10_000
_DEPTH = 3
_MODELS = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".onnx", ".ckpt", ".torchscript")


def build_context(
    settings: Settings, search_dirs: Sequence[Path], modes: Collection[str]
) -> RequestContext:
    """Returns what requests are checked against; the weights are those of the start.

    Args:
        settings: of the worker.
        search_dirs: folders with weights, each the `models` folder or a ComfyUI around one.
        modes: those whose weights are there.
    """
    roots = [inner for folder in search_dirs for inner in (folder, folder / "models")]
    folders = {name for names in COMFYUI_FOLDERS.values() for name in names}
    models = {path.name for root in roots for name in folders for path in _models(root / name)}
    loras = {path.name for root in roots for path in _models(root / "loras")}
    video = settings.default_video
    return RequestContext(
        default_driving_video=video is not None and video.is_file(),
        loras=frozenset(name for name in loras if name.endswith(".safetensors")),
        modes=frozenset(modes),
        models=frozenset(models) or None,
    )


class Inputs:
    """Files below the input roots, looked for anew when a workflow comes.

    files: name -> file, as found the last time.

    Args:
        roots: folders that requests may name files of.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self.files: dict[str, Path] = {}

    def look(self, event: Mapping[str, Any]) -> dict[str, Path]:
        """Returns the files for an event; none, without looking, where it has no workflow."""
        given = event.get("input")
        if not isinstance(given, (str, dict)) or "workflow" not in given:
            return {}
        self.files = input_files(self._roots)
        return self.files


def input_files(roots: Sequence[Path]) -> dict[str, Path]:
    """Returns name -> file for the first files of each name below the roots, three folders deep.

    Links are not followed; the intake checks every file again.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for path in _walk(root):
            found.setdefault(path.name, path)
            if len(found) >= MAX_INPUT_FILES:
                return found
    return found


def _walk(root: Path) -> Iterator[Path]:
    top = len(root.parts)
    for folder, inner, names in os.walk(root):
        deep = len(Path(folder).parts) - top
        inner[:] = [] if deep >= _DEPTH else sorted(n for n in inner if not n.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _models(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in folder.iterdir() if path.suffix in _MODELS)
    except OSError:  # there is no such folder
        return
