"""Fetches weights while the image is built: pulls, checks, and copies them to /models.

    python docker/bake.py --if true scail/fp8:transformer pose/default

A word is PIPELINE/PRESET, with `:COMPONENT` for the files of one component alone. Nothing is
fetched, and the exit code is 0, unless one of the `--if` values is true and so is every `--and`.
The build fails on a wrong size or sha256, and on a file whose sha256 nobody pinned.

Files are pulled into a folder that the builder keeps between builds, so that a change of the code
does not fetch them again. Times are set to one moment, so that the same files give the same layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from xicon_infer.errors import XiconError
from xicon_infer.weights.manifest import FileEntry, files_for, load_manifest

TRUE = ("1", "true", "yes", "on")
FALSE = ("", "0", "false", "no", "off")
# Folders that the Dockerfile copies one by one must be there even if they are empty.
FOLDERS = ("text_encoders", "clip_vision", "vae")
MOMENT = 946_684_800  # 1 January 2000
FAILED = 1


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done or not wanted, else that of the step that failed."""
    options = _parser().parse_args(argv)
    for name in FOLDERS:
        (options.models / name).mkdir(parents=True, exist_ok=True)
    try:
        wanted = any(map(is_true, options.conditions)) and all(map(is_true, options.also))
        entries = entries_of(options.sets, options.manifest) if wanted else []
    except (XiconError, ValueError) as error:
        return _fail(str(error))
    if not entries:
        return _settle(options.models)
    ids = [entry.id for entry in entries]
    extra = [] if options.manifest is None else ["--manifest", str(options.manifest)]
    folder = ["--models-dir", str(options.store)]
    if code := _weights("pull", *ids, *folder, *extra).returncode:
        return code
    checked = _weights("verify", *ids, *folder, *extra, "--json", capture=True)
    files = json.loads(checked.stdout)["files"] if checked.stdout.strip() else []
    faults = [file for file in files if file["state"] == "fault"]
    if checked.returncode or faults or not files:
        return _fail("; ".join(f"{f['id']} {f['text']}" for f in faults) or "verify failed")
    unpinned = [file["id"] for file in files if file["state"] == "unpinned"]
    if unpinned and not is_true(options.allow_unpinned):
        return _fail(
            f"no sha256 is pinned for {', '.join(unpinned)}: run `xicon-infer weights lock "
            f"{' '.join(unpinned)}` and build again, or trust what is published today with "
            "--build-arg ALLOW_UNPINNED_WEIGHTS=true"
        )
    elsewhere = [file["path"] for file in files if not _is_in(file["path"], options.store)]
    if elsewhere:
        return _fail(f"found outside {options.store}, not copied: {', '.join(elsewhere)}")
    for file in files:
        _copy(Path(file["path"]), options.store, options.models)
    return _settle(options.models)


def is_true(text: str) -> bool:
    """Returns whether a build argument says yes.

    Raises:
        ValueError: it says neither yes nor no.
    """
    if text.strip().lower() in TRUE:
        return True
    if text.strip().lower() in FALSE:
        return False
    raise ValueError(f"a BAKE_ argument must be true or false, got {text!r}")


def entries_of(words: Sequence[str], manifest: Path | None) -> list[FileEntry]:
    """Returns the files that words as "scail/fp8:vae" name, each once.

    Raises:
        InvalidRequest: there is no such pipeline or preset.
        ValueError: a word names no file.
    """
    found: dict[str, FileEntry] = {}
    for word in words:
        name, _, component = word.partition(":")
        pipeline, _, preset = name.partition("/")
        named = [
            entry
            for entry in files_for(pipeline, preset, manifest)
            if component in ("", entry.component)
        ]
        if not named:
            kinds = ", ".join(sorted({entry.component for entry in load_manifest(manifest).files}))
            raise ValueError(f"{word!r} names no file; components are {kinds}")
        found |= {entry.id: entry for entry in named}
    return list(found.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fetch weights into an image.")
    add = parser.add_argument
    add("--if", dest="conditions", action="append", default=[], help="true or false; any will do")
    add("--and", dest="also", action="append", default=[], help="true or false; all must be true")
    env = os.environ
    allowed = env.get("ALLOW_UNPINNED_WEIGHTS", "false")
    add("--allow-unpinned", default=allowed, help="true or false")
    store, models = env.get("WEIGHTS_STORE", "/fetched"), env.get("WEIGHTS_TARGET", "/models")
    add("--store", type=Path, default=Path(store), help="kept between builds")
    add("--models", type=Path, default=Path(models), help="goes into the image")
    add("--manifest", type=Path, help="another list of files")
    add("sets", nargs="+")
    return parser


def _weights(*words: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xicon_infer.run", "weights", *words]
    output = subprocess.PIPE if capture else None
    return subprocess.run(command, stdout=output, text=True, check=False)


def _is_in(path: str, folder: Path) -> bool:
    return Path(path).is_relative_to(folder)


def _copy(path: Path, store: Path, models: Path) -> None:
    target = models / path.relative_to(store)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    target.chmod(0o644)


def _settle(models: Path) -> int:
    for path in sorted(models.rglob("*"), reverse=True):
        os.utime(path, (MOMENT, MOMENT))
    return 0


def _fail(reason: str) -> int:
    sys.stderr.write(f"bake: {reason}\n")
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
