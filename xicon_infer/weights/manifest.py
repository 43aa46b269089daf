"""The list of model files: which a pipeline needs, where they come from, where they lie.

Reads `weights_manifest.json` (inside the installed package, else at the repository root); where the
files lie on this machine is `xicon_infer.weights.places`' business. Downloads nothing, reads no
environment, needs no torch. Sizes and hashes that could not be confirmed are null, never guessed.

One content is published in several forms: another naming, another precision, another repository.
Each form is an entry of its own, with its own size and hash, and says instead of which entry it
serves. Whoever looks for an entry finds the alternatives too.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.weights.places import COMFYUI_FOLDERS as COMFYUI_FOLDERS
from xicon_infer.weights.places import existing
from xicon_infer.weights.places import locate as locate

MANIFEST_NAME = "weights_manifest.json"
FORMAT = 1

TINY = "tiny"
"""The preset that needs no download: it travels with the package, or is generated."""

OPTIONAL = ("preview",)
"""Components that no preset asks for, but an option."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file.

    id: unique. component: what it is loaded as. used_by: "pipeline/preset" pairs; empty for an
    alternative that no preset asks for. repo, path, revision: where it is published on the Hugging
    Face hub; revision None for the newest. url: its whole address where it is published elsewhere,
    as a release on GitHub; else empty. size_bytes, sha256: None while not confirmed; pin_source:
    who stated them. licence and licence_source: terms, and where they were read. names: relative
    paths under which the same content is known, those of the alternatives included, the best first;
    one of them is enough. comfyui: paths below ComfyUI's `models` folder, the usual one first.
    unverified: what nobody here has checked. instead_of: ids of the entries it can serve for.
    alternatives: the entries that serve for this one.
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
    comfyui: tuple[str, ...] = ()
    unverified: str = ""
    pin_source: str = ""
    instead_of: tuple[str, ...] = ()
    alternatives: tuple[FileEntry, ...] = ()

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names of this form alone, without those of the alternatives."""
        others = {name for other in self.alternatives for name in other.names}
        return tuple(name for name in self.names if name not in others)

    @property
    def target(self) -> str:
        """Where a download goes, below the models folder: where ComfyUI has it, if it does."""
        return self.comfyui[0] if self.comfyui else self.names[0]

    @property
    def address(self) -> str:
        """Where the file is published, in words."""
        return self.url or f"{self.path} in {self.repo} on the Hugging Face hub"


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
        text = place.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{place}: not a weights manifest: {error!r}") from error
    return parse_manifest(text, source=str(place))


def parse_manifest(text: str, *, source: str) -> Manifest:
    """Returns the manifest that a text holds.

    Args:
        text: JSON.
        source: where it is from, for the message.

    Raises:
        WeightsError: it is no manifest, or an entry is wrong.
    """
    try:
        content = json.loads(text)
        presets = {str(name): tuple(values) for name, values in content["presets"].items()}
        files = tuple(_entry(raw) for raw in content["files"])
        version = content["format"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{source}: not a weights manifest: {error!r}") from error
    if version != FORMAT:
        raise WeightsError(f"{source}: format {version} is not the supported {FORMAT}")
    _check_files(source, presets, files)
    return Manifest(presets, tuple(_with_alternatives(entry, files) for entry in files))


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


def optional_files(component: str, path: Path | None = None) -> tuple[FileEntry, ...]:
    """Returns the files that an option asks for, without those that serve instead of them.

    Args:
        component: one of `OPTIONAL`.
        path: of another manifest.
    """
    files = load_manifest(path).files
    return tuple(e for e in files if e.component == component and not e.instead_of)


def locate_named(component: str, name: str, search_dirs: Sequence[Path]) -> Path | None:
    """Returns where a file of a given name lies, whether the manifest knows it or not.

    Args:
        component: what it is, as "lora".
        name: file name, or a path below a folder of that kind.
        search_dirs: as for `locate`.
    """
    known = [e for e in load_manifest().files if e.component == component and name in e.own_names]
    plain = FileEntry("", component, (), "", name, None, None, None, "", "", (name,))
    entry = replace(known[0], names=known[0].own_names, alternatives=()) if known else plain
    return locate(entry, search_dirs)


def missing_message(entry: FileEntry, search_dirs: Sequence[Path]) -> str:
    """Returns a sentence: which file is missing, where it was looked for, where to get it.

    Folders that do not exist are left out.
    """
    searched = ", ".join(map(str, existing(search_dirs))) or "no folder that exists"
    return (
        f"{entry.component}: {entry.names[0]} was not found (searched: {searched}). "
        f"It is {entry.address}."
    )


def fetch_command(entries: Sequence[FileEntry], folder: str = "models") -> str:
    """Returns one shell command that gets files into a folder where `locate` finds them.

    Args:
        entries: the files.
        folder: where to put them.
    """
    ids = " ".join(entry.id for entry in entries)
    return f"xicon-infer weights pull {ids} --models-dir {shlex.quote(folder)}"


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
        comfyui=tuple(raw.get("comfyui", ())),
        unverified=raw.get("unverified", ""),
        pin_source=raw.get("pin_source", ""),
        instead_of=tuple(raw.get("instead_of", ())),
    )


def _with_alternatives(entry: FileEntry, files: Sequence[FileEntry]) -> FileEntry:
    others = tuple(other for other in files if entry.id in other.instead_of)
    names = (*entry.names, *(name for other in others for name in other.names))
    return replace(entry, names=names, alternatives=others)


def _check_files(
    source: str, presets: dict[str, tuple[str, ...]], files: Sequence[FileEntry]
) -> None:
    pairs = {f"{pipeline}/{preset}" for pipeline, names in presets.items() for preset in names}
    kinds = {entry.id: entry.component for entry in files}
    seen: set[str] = set()
    for entry in files:
        problem = (
            _problem(entry, pairs)
            or _problem_of_pins(entry)
            or _problem_of_alternatives(entry, kinds)
            or ("its id occurs twice" if entry.id in seen else "")
        )
        if problem:
            raise WeightsError(f"{source}: entry {entry.id!r}: {problem}")
        seen.add(entry.id)


def _problem(entry: FileEntry, pairs: set[str]) -> str:
    """Returns what is wrong with an entry, or ""."""
    paths = [PurePosixPath(name) for name in (entry.path, *entry.names, *entry.comfyui)]
    unknown = [pair for pair in entry.used_by if pair not in pairs or pair.endswith(f"/{TINY}")]
    if not entry.names or any(path.is_absolute() or ".." in path.parts for path in paths):
        return "paths and names must be relative and stay inside their folder"
    optional = entry.component in OPTIONAL
    if unknown or not (entry.used_by or entry.instead_of or optional):
        return f"used_by must name presets, got {', '.join(unknown) or 'nothing'}"
    if not entry.licence or not entry.licence_source:
        return "licence and licence_source must be given"
    if entry.component not in COMFYUI_FOLDERS:
        return f"component {entry.component!r} is not one of {', '.join(COMFYUI_FOLDERS)}"
    if entry.url and not entry.url.startswith("https://"):
        return "url must start with https://"
    return ""


def _problem_of_pins(entry: FileEntry) -> str:
    if entry.sha256 is not None and not _SHA256.fullmatch(entry.sha256):
        return "sha256 must be 64 lower-case hexadecimal digits or null"
    if entry.size_bytes is not None and (type(entry.size_bytes) is not int or entry.size_bytes < 1):
        return "bytes must be a positive number or null"
    if (entry.sha256, entry.size_bytes) != (None, None) and not entry.pin_source:
        return "pin_source must say who stated bytes and sha256"
    return ""


def _problem_of_alternatives(entry: FileEntry, kinds: dict[str, str]) -> str:
    wrong = [other for other in entry.instead_of if kinds.get(other) != entry.component]
    if wrong or entry.id in entry.instead_of:
        return f"instead_of must name other entries of its component, got {', '.join(wrong)}"
    return ""
