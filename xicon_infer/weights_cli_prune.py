"""What `xicon-infer weights pull` left behind and nobody needs.

Three kinds of files count: files of the manifest at the very place where `pull` puts them, parts of
downloads that were not finished, and, on request, prepared files whose source is gone. Those can
run without it, so they are not surplus by themselves. Everything else is not looked at. The folder
of a ComfyUI is refused as a whole: its workflows need files that no preset here needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.weights.manifest import FileEntry, Manifest
from xicon_infer.weights.places import EXTRA_PATHS_NAME, find_all, walk

_HEAD_BYTES = 1 << 22
"""In which the header of a safetensors file of a thousand tensors ends."""


@dataclass(frozen=True)
class Surplus:
    """A file that can go, and why."""

    path: Path
    size_bytes: int
    reason: str


def find_surplus(
    folder: Path, manifest: Manifest, keep: Sequence[FileEntry], *, prepared: bool = False
) -> list[Surplus]:
    """Returns the files in a models folder that nobody needs, in the order of the manifest.

    Args:
        folder: where `pull` puts files.
        manifest: all files.
        keep: entries that are needed; the copy of each that would be loaded stays.
        prepared: also prepared files whose source is nowhere in the folder.

    Raises:
        InvalidRequest: the folder belongs to a ComfyUI.
    """
    if owner := _comfyui_of(folder):
        raise InvalidRequest(
            f"{folder} belongs to the ComfyUI in {owner}, whose workflows may need what no preset "
            "here needs; nothing is removed. Remove files there by hand.",
            field="models_dir",
        )
    needed = {found.path for found in find_all(keep, [folder]).values()}
    surplus = []
    for entry in manifest.files:
        path = folder / entry.target
        if _is_plain_file(path) and path not in needed:
            surplus.append(_surplus(path, f"no preset that is kept needs {entry.id}"))
        surplus += [_surplus(part, "unfinished download") for part in _parts(path)]
    return surplus + (_orphans(folder) if prepared else [])


def remove(surplus: Sequence[Surplus]) -> None:
    """Removes files.

    Raises:
        WeightsError: one cannot be removed; those before it are gone.
    """
    for item in surplus:
        _remove(item.path)


def _comfyui_of(folder: Path) -> Path | None:
    """Returns the ComfyUI that a models folder belongs to, or None."""
    for place in (folder, folder.resolve().parent):
        marks = ("custom_nodes", "comfy_extras", EXTRA_PATHS_NAME)
        if any((place / mark).exists() for mark in marks):
            return place
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be removed: {error.strerror or error}") from error


def _parts(path: Path) -> Iterator[Path]:
    """Yields what `xicon_infer.weights.download_url` keeps of an interrupted download."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.part")
    try:
        names = sorted(other.name for other in path.parent.iterdir())
    except OSError:
        return
    yield from (path.parent / name for name in names if pattern.fullmatch(name))


def _orphans(folder: Path) -> list[Surplus]:
    """Returns both files of each prepared transformer whose source is not in the folder."""
    from pipelines.prepared import CONTEXT_SUFFIX, PREPARED, SUFFIX, describe
    from xicon_infer.weights.checkpoint import open_checkpoint

    files = walk(folder)
    paths = [path for name in sorted(files) if name.endswith(SUFFIX) for path in files[name]]
    found = []
    for path in paths:
        if PREPARED.encode() in _head(path) and not path.name.endswith(CONTEXT_SUFFIX):
            about = describe(open_checkpoint(path))
            if about is not None and not _is_there(files, **about.transformer):
                reason = f"prepared from {about.transformer['name']}, which is gone"
                both = (about.path, about.context_path)
                found += [_surplus(one, reason) for one in both if _is_plain_file(one)]
    return found


def _is_there(files: Mapping[str, Sequence[Path]], name: str, bytes: int, **_: object) -> bool:
    return any(path.stat().st_size == bytes for path in files.get(name, ()))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""


def _surplus(path: Path, reason: str) -> Surplus:
    return Surplus(path, path.stat().st_size, reason)


def _is_plain_file(path: Path) -> bool:
    try:
        return path.is_file() and not path.is_symlink()
    except OSError:
        return False
