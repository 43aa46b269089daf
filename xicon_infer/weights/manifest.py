"""The list of model files: which a pipeline needs, where they come from, where they lie.

Reads `weights_manifest.json` (inside the installed package, else at the repository root) and looks
for files in given folders. Downloads nothing, reads no environment, needs no torch. Sizes and
hashes that nobody has measured are null, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from xicon_infer.errors import InvalidRequest, WeightsError

MANIFEST_NAME = "weights_manifest.json"
FORMAT = 1

COMFYUI_FOLDERS: dict[str, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet", "checkpoints"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "tokenizer": ("text_encoders", "clip", "tokenizers"),
    "image_encoder": ("clip_vision",),
    "lora": ("loras",),
    "pose_detector": ("detection",),
    "pose_keypoints": ("detection",),
    "pose_body": ("nlf", "detection"),
}
"""Component -> sub-folders of ComfyUI's `models` folder in which people keep its files."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file.

    id: unique. component: what it is loaded as. used_by: "pipeline/preset" pairs. repo, path,
    revision: where it is published on the Hugging Face hub; revision None for the newest. url:
    its whole address where it is published elsewhere, as a release on GitHub; else empty.
    size_bytes, sha256: None while unknown. licence and licence_source: terms, and where they were
    read. names: relative paths under which the same content is known, the best first; one of them
    is enough.
    """

    id: str
    component: str
    used_by: tuple[str, ...]
    repo: str
    path: str
    revision: str | None
    size_bytes: int | None
    sha256: str | None
    licence: str
    licence_source: str
    names: tuple[str, ...]
    url: str = ""


@dataclass(frozen=True)
class Manifest:
    """All files, and the presets of every pipeline, the default first."""

    presets: dict[str, tuple[str, ...]]
    files: tuple[FileEntry, ...]


def manifest_path() -> Path:
    """Returns where the manifest lies: in the installed package, else at the repository root.

    Raises:
        WeightsError: it is in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package, package.parent):
        if (folder / MANIFEST_NAME).is_file():
            return folder / MANIFEST_NAME
    raise WeightsError(
        f"{MANIFEST_NAME} is not in {package} or above it; install the package again"
    )


@lru_cache(maxsize=4)
def load_manifest(path: Path | None = None) -> Manifest:
    """Returns the manifest.

    Args:
        path: of another manifest; None for the one that came with the package.

    Raises:
        WeightsError: it cannot be read, or an entry is wrong.
    """
    place = manifest_path() if path is None else path
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        presets = {str(name): tuple(values) for name, values in content["presets"].items()}
        files = tuple(_entry(raw) for raw in content["files"])
        version = content["format"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{place}: not a weights manifest: {error!r}") from error
    if version != FORMAT:
        raise WeightsError(f"{place}: format {version} is not the supported {FORMAT}")
    _check_files(place, presets, files)
    return Manifest(presets, files)


def presets(path: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Returns the presets by pipeline, the default first.

    Args:
        path: of another manifest.
    """
    return dict(load_manifest(path).presets)


def files_for(pipeline: str, preset: str, path: Path | None = None) -> tuple[FileEntry, ...]:
    """Returns the files that a preset of a pipeline needs, in the order of the manifest.

    Args:
        pipeline: as "scail".
        preset: as "fp8".
        path: of another manifest.

    Raises:
        InvalidRequest: there is no such pipeline or preset.
    """
    known = load_manifest(path)
    if pipeline not in known.presets:
        raise InvalidRequest(
            f"pipeline: got {pipeline!r}, weights are listed for {', '.join(known.presets)}",
            field="pipeline",
        )
    if preset not in known.presets[pipeline]:
        allowed = ", ".join(known.presets[pipeline])
        raise InvalidRequest(f"preset: got {preset!r}, {pipeline} has {allowed}", field="preset")
    return tuple(entry for entry in known.files if f"{pipeline}/{preset}" in entry.used_by)


def locate(entry: FileEntry, search_dirs: Sequence[Path]) -> Path | None:
    """Returns where a file lies, or None.

    Folders are searched in the given order, each completely before the next: under its published
    path, under its other names, in a Hugging Face cache, and in ComfyUI's sub-folders at any
    depth (also when the folder is ComfyUI itself). Empty files do not count.

    Args:
        entry: the file.
        search_dirs: folders; those that do not exist are passed over.
    """
    for folder in search_dirs:
        for candidate in _candidates(entry, folder):
            if candidate.is_file() and candidate.stat().st_size:
                return candidate
    return None


def missing_message(entry: FileEntry, search_dirs: Sequence[Path]) -> str:
    """Returns a sentence: which file is missing, where it was looked for, where to get it."""
    searched = ", ".join(str(folder) for folder in search_dirs) or "no folder"
    place = entry.url or f"{entry.path} in {entry.repo} on the Hugging Face hub"
    return (
        f"{entry.component}: {entry.names[0]} was not found (searched: {searched}). It is {place}."
    )


def fetch_command(entries: Sequence[FileEntry], folder: str = "models") -> str:
    """Returns one shell command that gets files into a folder where `locate` finds them.

    Args:
        entries: the files.
        folder: where to put them.
    """
    steps = [
        f"curl -L --create-dirs -o {folder}/{entry.names[0]} {entry.url}"
        if entry.url
        else f"hf download {entry.repo} {entry.path} --local-dir {folder}"
        for entry in entries
    ]
    return " && ".join(steps)


def _candidates(entry: FileEntry, folder: Path) -> Iterator[Path]:
    yield folder / entry.repo / entry.path
    yield folder / entry.path
    for name in entry.names:
        yield folder / name
    cache = "models--" + entry.repo.replace("/", "--")
    for snapshots in (folder / cache, folder / "hub" / cache):
        pinned = (snapshots / "snapshots").glob(entry.revision or "*")
        yield from (snapshot / entry.path for snapshot in sorted(pinned))
    for models in (folder, folder / "models"):
        for part in COMFYUI_FOLDERS.get(entry.component, ()):
            for name in entry.names:
                yield from sorted((models / part).rglob(name))


def _entry(raw: dict[str, Any]) -> FileEntry:
    return FileEntry(
        id=raw["id"],
        component=raw["component"],
        used_by=tuple(raw["used_by"]),
        repo=raw["repo"],
        path=raw["path"],
        revision=raw["revision"],
        size_bytes=raw["bytes"],
        sha256=raw["sha256"],
        licence=raw["licence"],
        licence_source=raw["licence_source"],
        names=tuple(raw["names"]),
        url=raw.get("url", ""),
    )


def _check_files(
    place: Path, presets: dict[str, tuple[str, ...]], files: Sequence[FileEntry]
) -> None:
    pairs = {f"{pipeline}/{preset}" for pipeline, names in presets.items() for preset in names}
    seen: set[str] = set()
    for entry in files:
        problem = _problem(entry, pairs) or ("its id occurs twice" if entry.id in seen else "")
        if problem:
            raise WeightsError(f"{place}: entry {entry.id!r}: {problem}")
        seen.add(entry.id)


def _problem(entry: FileEntry, pairs: set[str]) -> str:
    """Returns what is wrong with an entry, or ""."""
    paths = [PurePosixPath(name) for name in (entry.path, *entry.names)]
    unknown = [pair for pair in entry.used_by if pair not in pairs]
    if not entry.names or any(path.is_absolute() or ".." in path.parts for path in paths):
        return "paths and names must be relative and stay inside their folder"
    if not entry.used_by or unknown:
        return f"used_by must name presets, got {', '.join(unknown) or 'nothing'}"
    if not entry.licence or not entry.licence_source:
        return "licence and licence_source must be given"
    if entry.component not in COMFYUI_FOLDERS:
        return f"component {entry.component!r} is not one of {', '.join(COMFYUI_FOLDERS)}"
    if entry.url and not entry.url.startswith("https://"):
        return "url must start with https://"
    if entry.sha256 is not None and not _SHA256.fullmatch(entry.sha256):
        return "sha256 must be 64 lower-case hexadecimal digits or null"
    if entry.size_bytes is not None and (type(entry.size_bytes) is not int or entry.size_bytes < 1):
        return "bytes must be a positive number or null"
    return ""
