"""The subcommands of `xicon-infer weights`: each takes parsed options and returns an exit code.

What fetches, hashes or computes is imported by the subcommand that needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.job_fields import FIELDS
from xicon_infer.job_values import check_value
from xicon_infer.runtime import download_dir, models_dirs
from xicon_infer.types import Progress, SilentProgress
from xicon_infer.weights.manifest import (
    FileEntry,
    Manifest,
    load_manifest,
    locate_named,
    manifest_path,
)
from xicon_infer.weights.places import Found, existing, find_all
from xicon_infer.weights_cli_text import (
    distinct,
    format_list,
    format_pins,
    format_verdicts,
    list_report,
    select,
    size_text,
)

if TYPE_CHECKING:
    from xicon_infer.weights.lock import Remote

FAULT = 5
"""Exit code of a command that found files at fault."""

STORAGES = ("fp8", "bf16")

_FREE_LICENCES = ("Apache-2.0", "MIT")

Options = dict[str, Any]


@dataclass(frozen=True)
class Workers:
    """What does the work, None for the functions of this package; and what shows its progress.

    pull: as `xicon_infer.weights.download.pull`. remote_file: as that of `weights.hub`.
    inspect_file: as `pipelines.inspect_weights.inspect_weights`. format_inspection: as that of
    `weights.inspect`. prepare: as that of `pipelines.prepare`.
    """

    pull: Callable[..., Sequence[Any]] | None = None
    remote_file: Remote | None = None
    inspect_file: Callable[..., Any] | None = None
    format_inspection: Callable[[Any], str] | None = None
    prepare: Callable[..., Any] | None = None
    progress: Callable[[], Progress] = SilentProgress


def run_list(options: Options, workers: Workers) -> int:
    """Says what is needed, present and missing; 0."""
    manifest = _manifest(options)
    selections = select(options.get("sets", []), manifest)
    searched = _searched(options)
    found = find_all(distinct(selections), searched)
    if "json" in options:
        _show(list_report(selections, found, existing(searched)))
    else:
        defaults = [f"{pipeline}/{names[0]}" for pipeline, names in manifest.presets.items()]
        _show(format_list(selections, found, existing(searched), defaults))
    return 0


def run_pull(options: Options, workers: Workers) -> int:
    """Fetches what is missing; 0."""
    if not options.get("sets"):
        raise InvalidRequest(
            "name what to fetch, as `xicon-infer weights pull scail/fp8`; "
            "`xicon-infer weights list` shows what there is",
            field="set",
        )
    entries = distinct(select(options["sets"], _manifest(options)))
    folder = download_dir(options.get("models_dir"))
    progress = _progress(options, workers)
    dirs = models_dirs(options.get("models_dir"))
    if "dry_run" not in options:  # what lies in the target itself is checked by whoever fetches
        dirs = [path for path in dirs if path != folder]
    elsewhere = _of_listed_size(find_all(entries, dirs), progress)
    wanted = [entry for entry in entries if entry.id not in elsewhere]
    for entry in wanted:
        if entry.licence not in _FREE_LICENCES:
            progress.warn(f"{entry.id}: licence: {entry.licence} ({entry.licence_source})")
    if "dry_run" in options:
        _show_plan(wanted, elsewhere, folder, options)
        return 0
    work: Callable[..., Sequence[Any]]
    if workers.pull is None:
        from xicon_infer.weights import download

        work = download.pull
    else:
        work = workers.pull
    pulled = work(
        wanted,
        folder,
        progress=progress,
        jobs=options.get("jobs", 4),
        offline="offline" in options,
        verify="no_verify" not in options,
    )
    rows = [{"id": i, "path": f.path, "state": "present"} for i, f in elsewhere.items()]
    rows += [{"id": p.entry.id, "path": p.path, "state": p.state} for p in pulled]
    if "json" in options:
        warnings = progress.warnings if isinstance(progress, SilentProgress) else []
        _show({"folder": folder, "files": rows, "warnings": warnings})
    else:
        _show("\n".join(f"{row['state']:<11}{row['id']:<32}{row['path']}" for row in rows))
    return 0


def _of_listed_size(found: dict[str, Found], progress: Progress) -> dict[str, Found]:
    """Returns the files that need not be fetched: those whose size is not wrong."""
    right = {}
    for name, item in found.items():
        listed, size = item.published.size_bytes, item.path.stat().st_size
        if listed in (None, size):
            right[name] = item
        else:
            progress.warn(f"{item.path} has {size} bytes, {listed} are listed: not used")
    return right


def _show_plan(
    wanted: Sequence[FileEntry], elsewhere: dict[str, Found], folder: Path, options: Options
) -> None:
    if "json" in options:
        _show(
            {
                "folder": folder,
                "present": {name: item.path for name, item in elsewhere.items()},
                "fetch": [entry.id for entry in wanted],
                "known_bytes": sum(entry.size_bytes or 0 for entry in wanted),
            }
        )
        return
    lines = [f"present  {name:<32}{item.path}" for name, item in elsewhere.items()]
    lines += [f"fetch    {e.id:<32}{size_text(e.size_bytes):>9}  {e.address}" for e in wanted]
    _show("\n".join([*lines, f"into {folder}"]))


def run_verify(options: Options, workers: Workers) -> int:
    """Checks files; 5 if one is missing or at fault."""
    from xicon_infer.weights.verify import verify_files

    entries = distinct(select(options.get("sets", []), _manifest(options)))
    found = find_all(entries, _searched(options))
    # Without named sets, what is not there is not asked for.
    missing = [e for e in entries if e.id not in found] if options.get("sets") else []
    progress = _progress(options, workers)
    with progress.stage("verify"):
        verdicts = verify_files(
            list({item.path: item for item in found.values()}.values()),
            quick="quick" in options,
            progress=progress,
            jobs=options.get("jobs", 4),
        )
    if "json" in options:
        _show(
            {
                "files": [asdict(verdict) for verdict in verdicts],
                "missing": [e.id for e in missing],
            }
        )
    else:
        _show(format_verdicts(verdicts, missing))
    return FAULT if missing or any(v.state == "fault" for v in verdicts) else 0


def run_lock(options: Options, workers: Workers) -> int:
    """Pins what is published; 5 if a file could not be asked."""
    from xicon_infer.weights.lock import lock

    remote: Remote
    if workers.remote_file is None:
        from functools import partial

        from xicon_infer.weights import hub
        from xicon_infer.weights.download_http import Transfer

        # A question is small and there are many: whoever does not answer is not asked six times.
        remote = partial(hub.remote_file, transfer=Transfer(timeout_s=10.0, backoff_s=(1.0,)))
    else:
        remote = workers.remote_file
    manifest = options.get("manifest") or manifest_path()
    words = options.get("sets", [])
    ids = {e.id for e in distinct(select(words, load_manifest(manifest)))} if words else set()
    progress = _progress(options, workers)
    with progress.stage("lock"):
        pins = lock(
            manifest,
            remote=remote,
            ids=ids,
            update="update" in options,
            output=options.get("output"),
            progress=progress,
        )
    output = options.get("output") or manifest
    if "json" in options:
        _show({"output": output, "files": [asdict(pin) for pin in pins]})
    else:
        _show(format_pins(pins, output))
    return FAULT if any(pin.error for pin in pins) else 0


def run_prepare(options: Options, workers: Workers) -> int:
    """Writes the file that loads fastest; 0."""
    work: Callable[..., Any]
    if workers.prepare is None:
        from pipelines import prepare

        work = prepare.prepare
    else:
        work = workers.prepare
    if "output" not in options:
        raise InvalidRequest("'output' is missing: name the file to write", field="output")
    dirs = tuple(_searched(options))
    transformer = _transformer(options["transformer"], options, dirs)
    field = next(field for field in FIELDS if field.name == "loras")
    loras = [
        (_lora(lora.name, dirs), lora.strength)
        for lora in check_value(field, options.get("loras", []))
    ]
    progress = _progress(options, workers)
    result = work(
        transformer,
        loras,
        options["output"],
        storage=options.get("storage", STORAGES[0]),
        progress=progress,
        overwrite="overwrite" in options,
    )
    if "json" in options:
        _show(asdict(result))
    else:
        _show(f"{result.path}\n{result.context_path}\ncontent {result.content}")
    return 0


def _transformer(word: str, options: Options, dirs: Sequence[Path]) -> Path:
    """Returns the file that a path, a set or an id stands for."""
    if Path(word).exists():
        return Path(word)
    entries = distinct(select([word], _manifest(options)))
    wanted = [entry for entry in entries if entry.component == "transformer"]
    found = find_all(wanted, dirs)
    if not found:
        raise InvalidRequest(
            f"'transformer': got {word!r}, which is no file, and no transformer of that name was "
            "found; fetch it with `xicon-infer weights pull`",
            field="transformer",
        )
    return next(iter(found.values())).path


def _lora(name: str, dirs: Sequence[Path]) -> Path:
    path = Path(name) if Path(name).is_file() else locate_named("lora", name, dirs)
    if path is None:
        searched = ", ".join(map(str, existing(dirs))) or "no folder that exists"
        raise WeightsError(
            f"LoRA {name!r} was not found (searched: {searched}); give its path, or name its "
            "folder with --models-dir",
            field="loras",
            code="LORA_NOT_FOUND",
        )
    return path


def run_inspect(options: Options, workers: Workers) -> int:
    """Says what files are; 5 if one cannot be used."""
    work: Callable[..., Any]
    text: Callable[[Any], str]
    if workers.inspect_file is None or workers.format_inspection is None:
        from pipelines import inspect_weights
        from xicon_infer.weights import inspect_text

        work, text = inspect_weights.inspect_weights, inspect_text.format_inspection
    else:
        work, text = workers.inspect_file, workers.format_inspection
    finite = "check_finite" in options
    inspections = [work(path, check_finite=finite) for path in options["files"]]
    if "json" in options:
        reports = [{**asdict(found), "usable": found.usable} for found in inspections]
        # Names and shapes of a thousand tensors are for the program itself.
        _show([{k: v for k, v in report.items() if k != "shapes"} for report in reports])
    else:
        _show("\n\n".join(text(found) for found in inspections))
    return 0 if all(found.usable for found in inspections) else FAULT


def run_prune(options: Options, workers: Workers) -> int:
    """Lists or removes what no preset needs; 0."""
    from xicon_infer.weights_cli_prune import find_surplus, remove

    manifest = _manifest(options)
    keep = distinct(select(options.get("keep", []), manifest))
    folder = download_dir(options.get("models_dir"))
    surplus = find_surplus(folder, manifest, keep, prepared="prepared" in options)
    if "yes" in options:
        remove(surplus)
    total = sum(item.size_bytes for item in surplus)
    if "json" in options:
        files = [asdict(item) for item in surplus]
        _show({"folder": folder, "removed": "yes" in options, "files": files})
        return 0
    lines = [f"{size_text(item.size_bytes):>9}  {item.path}: {item.reason}" for item in surplus]
    done = "removed" if "yes" in options else "can be removed with --yes"
    _show("\n".join([*lines, f"{len(surplus)} files, {size_text(total)} {done} in {folder}"]))
    return 0


def _manifest(options: Options) -> Manifest:
    return load_manifest(options.get("manifest"))


def _searched(options: Options) -> list[Path]:
    """Returns the folders with weights.

    Raises:
        InvalidRequest: the one that was given does not exist.
    """
    given: Path | None = options.get("models_dir")
    if given is not None and not given.exists():
        raise InvalidRequest(
            f"'models_dir' must be a folder with weights that exists, got {str(given)!r}",
            field="models_dir",
        )
    return list(models_dirs(given))


def _progress(options: Options, workers: Workers) -> Progress:
    silent = "json" in options or "quiet" in options
    return SilentProgress() if silent else workers.progress()


def _show(value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, default=str)
    sys.stdout.write(f"{text}\n")
