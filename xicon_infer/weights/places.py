"""Where a weights file lies on this machine.

Takes folders in order (`xicon_infer.runtime.models_dirs` names them) and searches each completely
before the next: as published, as a RunPod or Hugging Face cache keeps it, and as ComfyUI's users
keep it, in the sub-folder of its kind at any depth. A folder that is a ComfyUI also counts with
what its `extra_model_paths.yaml` names; such a file may also stand in place of a folder.

Nothing outside the sub-folders of a kind is walked, links to folders are followed but never twice,
and depth and number of entries are limited, so that a link to a whole disk costs little. What
cannot be read does not exist. Which of several copies wins depends on the order alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from xicon_infer.runtime import expand_path

if TYPE_CHECKING:
    from xicon_infer.weights.manifest import FileEntry

_LOG = logging.getLogger(__name__)

COMFYUI_FOLDERS: dict[str, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet", "checkpoints"),
    "vae": ("vae",),
    "preview": ("vae_approx", "vae"),
    "text_encoder": ("text_encoders", "clip"),
    "tokenizer": ("text_encoders", "clip", "tokenizers"),
    "image_encoder": ("clip_vision", "text_encoders", "clip"),
    "lora": ("loras",),
    "pose_detector": ("detection", "onnx", "dwpose"),
    "pose_keypoints": ("detection", "onnx", "dwpose"),
    "pose_body": ("nlf", "detection", "torch_cache"),
}
"""Component -> sub-folders of ComfyUI's `models` folder in which people keep its files."""

EXTRA_PATHS_NAME = "extra_model_paths.yaml"
_AUX_CHECKPOINTS = "custom_nodes/comfyui_controlnet_aux/ckpts"
"""Where the widespread preprocessor nodes keep DWPose, repository by repository."""

GENERIC_NAMES = frozenset(
    {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors",
        "tokenizer.json",
        "mp_rank_00_model_states.pt",
    }
)
"""Names that files of many models bear: never looked for without the name of their folder."""

MAX_DEPTH = 6
MAX_ENTRIES = 20_000
_MAX_YAML_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """A file that was found.

    wanted: what was looked for. published: the entry whose file it is, `wanted` itself or one of
    its alternatives. path: where it lies. folder: the search folder it was found through.
    """

    wanted: FileEntry
    published: FileEntry
    path: Path
    folder: Path


@dataclass(frozen=True)
class Place:
    """One folder to search.

    folder: as given. kinds: ComfyUI's name of a kind -> folders that hold its files. whole: also
    search the folder itself, as published and as a cache; False for what a YAML file names.
    """

    folder: Path
    kinds: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    whole: bool = True


Walks = dict[Path, dict[str, list[Path]]]


def locate(entry: FileEntry, search_dirs: Sequence[Path]) -> Path | None:
    """Returns where a file lies, or None.

    Args:
        entry: the file; one of its alternatives will do.
        search_dirs: folders, or `extra_model_paths.yaml` files. What does not exist is passed
            over. Empty files do not count.
    """
    return next((found.path for found in copies([entry], search_dirs)), None)


def find_all(entries: Iterable[FileEntry], search_dirs: Sequence[Path]) -> dict[str, Found]:
    """Returns what was found, by id of the entry; the same files that `locate` returns.

    One walk through the folders serves all entries.

    Args:
        entries: the files.
        search_dirs: as for `locate`.
    """
    best: dict[str, Found] = {}
    for found in copies(entries, search_dirs, first=True):
        best.setdefault(found.wanted.id, found)
    return best


def copies(
    entries: Iterable[FileEntry], search_dirs: Sequence[Path], *, first: bool = False
) -> Iterator[Found]:
    """Yields every copy of the files, entry by entry, the one that wins first.

    Args:
        entries: the files.
        search_dirs: as for `locate`.
        first: one copy of each is enough.
    """
    walks: Walks = {}
    places = expand(search_dirs)
    for entry in entries:
        seen: set[Path] = set()
        for found in _copies_of(entry, places, walks):
            if found.path not in seen:
                seen.add(found.path)
                yield found
                if first:
                    break


def existing(search_dirs: Sequence[Path]) -> list[Path]:
    """Returns the folders and files among `search_dirs` that exist, each once, in order."""
    return list(dict.fromkeys(path for path in search_dirs if _exists(path)))


def expand(search_dirs: Sequence[Path]) -> list[Place]:
    """Returns the places behind the search folders, in the order in which they are searched.

    A folder with an `extra_model_paths.yaml` is a ComfyUI: sections of the file that say
    `is_default` come before the folder, the others behind it.

    Args:
        search_dirs: folders, or files such as `extra_model_paths.yaml`.
    """
    places: list[Place] = []
    for folder in existing(search_dirs):
        if _is_file(folder):
            before, behind = extra_places(folder)
            places += [*before, *behind]
            continue
        roots = (folder, folder / "models")
        names = {name for kinds in COMFYUI_FOLDERS.values() for name in kinds}
        kinds = {name: tuple(root / name for root in roots) for name in sorted(names)}
        extra = folder / EXTRA_PATHS_NAME
        before, behind = extra_places(extra) if _is_file(extra) else ([], [])
        places += [*before, Place(folder, kinds), *behind]
    return places


def extra_places(path: Path) -> tuple[list[Place], list[Place]]:
    """Returns the places that an `extra_model_paths.yaml` names: the defaults, and the others.

    Paths may hold `~` and variables; relative ones count from `base_path`, and that from the
    folder of the file. A value of several lines names several folders. A file that cannot be used
    is logged and passed over, as it may belong to somebody else's ComfyUI.

    Args:
        path: the file.

    Source: comfyanonymous/ComfyUI: extra_model_paths.yaml.example, utils/extra_config.py.
    """
    sections = _read_yaml(path)
    before: list[Place] = []
    behind: list[Place] = []
    for section in sections.values():
        if not isinstance(section, Mapping):
            continue
        base = path.parent / expand_path(str(section.get("base_path") or "."))
        kinds = {
            str(name): tuple(base / expand_path(line.strip()) for line in lines if line.strip())
            for name, value in section.items()
            if name not in ("base_path", "is_default")
            and (lines := value.splitlines() if isinstance(value, str) else [])
        }
        default = str(section.get("is_default", "")).lower() == "true"
        (before if default else behind).append(Place(path, kinds, whole=False))
    return before, behind


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        yaml = import_module("yaml")
    except ImportError:
        _LOG.warning("%s is not read: install PyYAML", path)
        return {}
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError("longer than a list of folders can be")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        _LOG.warning("%s cannot be used: %s", path, " ".join(str(error).split()))
        return {}
    return content if isinstance(content, Mapping) else {}


def _copies_of(entry: FileEntry, places: Sequence[Place], walks: Walks) -> Iterator[Found]:
    for place in places:
        for published in (entry, *entry.alternatives):
            for path in _candidates(published, place, walks):
                if _has_content(path):
                    yield Found(entry, published, path, place.folder)


def _candidates(entry: FileEntry, place: Place, walks: Walks) -> Iterator[Path]:
    if place.whole:
        yield from _as_published(entry, place.folder)
        yield from _in_caches(entry, place.folder)
    for kind in COMFYUI_FOLDERS.get(entry.component, ()):
        for folder in place.kinds.get(kind, ()):
            for name in entry.own_names:
                yield from _walked(folder, PurePosixPath(name), walks)


def _as_published(entry: FileEntry, folder: Path) -> Iterator[Path]:
    yield folder / entry.repo / entry.path
    if PurePosixPath(entry.path).name not in GENERIC_NAMES:
        yield folder / entry.path
    for name in (*entry.own_names, *entry.comfyui):
        yield folder / name
    yield folder / _AUX_CHECKPOINTS / entry.repo / entry.path


def _in_caches(entry: FileEntry, folder: Path) -> Iterator[Path]:
    """Yields the file in a Hugging Face cache and in RunPod's, the pinned or main revision first.

    Source: huggingface/huggingface_hub: docs, "Understand caching"; runpod/docs: model caching;
    runpod/runpod-python: the SDK's cache folder ORG/NAME/REVISION.
    """
    cache = "models--" + entry.repo.replace("/", "--")
    for repo in (folder / cache, folder / "hub" / cache):
        yield from _revisions(entry, repo / "snapshots", _main_revision(repo))
    yield from _revisions(entry, folder / entry.repo, "")


def _revisions(entry: FileEntry, folder: Path, main: str) -> Iterator[Path]:
    preferred = [name for name in (entry.revision, main) if name]
    for name in [*preferred, *(n for n in _names_in(folder) if n not in preferred)]:
        yield folder / name / entry.path


def _main_revision(repo: Path) -> str:
    try:
        return (repo / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _walked(folder: Path, name: PurePosixPath, walks: Walks) -> Iterator[Path]:
    """Yields the files at any depth of a folder whose path ends in a name, the shortest first."""
    if folder not in walks:
        walks[folder] = walk(folder)
    for path in walks[folder].get(name.name, ()):
        if path.parts[-len(name.parts) :] == name.parts:
            yield path


def walk(folder: Path) -> dict[str, list[Path]]:
    """Returns the files in a folder and below: name -> paths.

    Level by level, each in alphabetical order; links are followed, no folder is entered twice, and
    neither depth nor number of entries go beyond `MAX_DEPTH` and `MAX_ENTRIES`.

    Args:
        folder: where to start.
    """
    files: dict[str, list[Path]] = {}
    seen: set[tuple[int, int]] = set()
    level, count = [folder], 0
    for _ in range(MAX_DEPTH):
        deeper: list[Path] = []
        for parent in level:
            if not _first_visit(parent, seen):
                continue
            names = _names_in(parent)
            count += len(names)
            if count > MAX_ENTRIES:
                _LOG.warning("%s holds more than %d entries; not all are seen", folder, MAX_ENTRIES)
                return files
            for name in names:
                path = parent / name
                if _is_dir(path):
                    deeper.append(path)
                else:
                    files.setdefault(name, []).append(path)
        level = deeper
    return files


def _first_visit(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return False
    identity = (status.st_dev, status.st_ino)
    fresh = identity not in seen
    seen.add(identity)
    return fresh


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):
        return False
