"""What `xicon-infer weights` says: which files are meant, tables of text, and the same as JSON."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.weights.lock import Pin
from xicon_infer.weights.manifest import FileEntry, Manifest
from xicon_infer.weights.places import Found
from xicon_infer.weights.verify import Verdict

_KILO = 1000.0
_UNITS = ("B", "kB", "MB", "GB", "TB")
_LABELS = {"ok": "ok", "unpinned": "unpinned", "fault": "FAULT"}


@dataclass(frozen=True)
class Selection:
    """A named set of files: "scail/fp8", or a single entry under its id."""

    name: str
    entries: tuple[FileEntry, ...]


def select(words: Sequence[str], manifest: Manifest) -> list[Selection]:
    """Returns the sets that words name; every preset that needs files, if there are none.

    Args:
        words: PIPELINE/PRESET, PIPELINE for its default preset, or the id of an entry.
        manifest: the files.

    Raises:
        InvalidRequest: a word is none of these.
    """
    if not words:
        words = [f"{p}/{name}" for p, names in manifest.presets.items() for name in names]
        return [one for one in (_selection(word, manifest) for word in words) if one.entries]
    return [_selection(word, manifest) for word in words]


def distinct(selections: Iterable[Selection]) -> list[FileEntry]:
    """Returns the entries of the sets, each once, in order."""
    return list({e.id: e for one in selections for e in one.entries}.values())


def _selection(word: str, manifest: Manifest) -> Selection:
    pipeline, slash, preset = word.partition("/")
    known = manifest.presets
    if pipeline in known and (not slash or preset in known[pipeline]):
        name = f"{pipeline}/{preset or known[pipeline][0]}"
        return Selection(name, tuple(e for e in manifest.files if name in e.used_by))
    entries = tuple(entry for entry in manifest.files if entry.id == word)
    if entries:
        return Selection(word, entries)
    if pipeline in known:
        allowed = ", ".join(f"{pipeline}/{name}" for name in known[pipeline])
    else:
        allowed = f"{', '.join(known)}, each with /PRESET, or an id of `xicon-infer weights list`"
    names = [*known, *(f"{p}/{n}" for p, ns in known.items() for n in ns)]
    near = difflib.get_close_matches(word, [*names, *(e.id for e in manifest.files)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InvalidRequest(f"got {word!r}, known are {allowed}{hint}", field="set")


def format_list(
    selections: Sequence[Selection],
    found: Mapping[str, Found],
    searched: Sequence[Path],
    defaults: Iterable[str],
) -> str:
    """Returns what is needed, present and missing as text.

    Args:
        selections: the sets.
        found: files that are present, by id.
        searched: folders.
        defaults: names of the sets that are taken where none is named.
    """
    lines = []
    for one in selections:
        present = sum(entry.id in found for entry in one.entries)
        default = ", the default" if one.name in set(defaults) else ""
        lines.append(f"{one.name} ({present} of {len(one.entries)} files{default})")
        lines += [_list_row(entry, found.get(entry.id)) for entry in one.entries]
    missing = [entry for entry in distinct(selections) if entry.id not in found]
    lines += ["", f"missing: {_total(missing)}"]
    folders = ", ".join(map(str, searched)) or "no folder that exists"
    return "\n".join([*lines, f"searched: {folders}"])


def list_report(
    selections: Sequence[Selection], found: Mapping[str, Found], searched: Sequence[Path]
) -> dict[str, Any]:
    """Returns the same as `format_list` for programs."""
    entries = distinct(selections)
    missing = [entry for entry in entries if entry.id not in found]
    return {
        "searched": list(searched),
        "sets": {one.name: [entry.id for entry in one.entries] for one in selections},
        "files": [_file_report(entry, found.get(entry.id)) for entry in entries],
        "missing": [entry.id for entry in missing],
        "missing_bytes": sum(entry.size_bytes or 0 for entry in missing),
        "missing_of_unknown_size": sum(entry.size_bytes is None for entry in missing),
    }


def format_verdicts(verdicts: Sequence[Verdict], missing: Sequence[FileEntry]) -> str:
    """Returns the table of `verify`, and a line that sums it up."""
    lines = [
        f"{_LABELS[v.state]:<9}{v.id:<32}{size_text(v.size_bytes):>9}  {v.path}: {v.text}"
        for v in verdicts
    ]
    lines += [f"{'MISSING':<9}{e.id:<32}{size_text(e.size_bytes):>9}  {e.address}" for e in missing]
    if not lines:
        return "no file of the manifest was found; `xicon-infer weights list` says where it looks"
    faults = sum(v.state == "fault" for v in verdicts)
    total = f"{len(verdicts)} files checked: {faults} at fault, {len(missing)} missing"
    return "\n".join([*lines, total])


def format_pins(pins: Sequence[Pin], output: Path) -> str:
    """Returns what `lock` changed, and what could not be asked."""
    lines = []
    for pin in pins:
        if pin.error:
            lines.append(f"not asked  {pin.id}: {pin.error}")
        elif pin.changed:
            news = [f"{k} {v}" for k, v in pin.after.items() if v != pin.before[k]]
            lines.append(f"pinned     {pin.id}: {', '.join(news)}")
    same = sum(not pin.changed and not pin.error for pin in pins)
    return "\n".join([*lines, f"{same} entries were up to date; {output} is written"])


def size_text(num_bytes: int | None) -> str:
    """Returns a size for people, in decimal units; "?" if it is not known."""
    if num_bytes is None:
        return "?"
    value, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:  # noqa: B007 - the unit that fits is used below
        if value < _KILO:
            break
        value /= _KILO
    return f"{value:.0f} {unit}" if unit in _UNITS[:2] else f"{value:.1f} {unit}"


def _list_row(entry: FileEntry, found: Found | None) -> str:
    if found is None:
        return f"  missing  {entry.id:<32}{size_text(entry.size_bytes):>9}  {entry.address}"
    size, listed = found.path.stat().st_size, found.published.size_bytes
    note = "" if found.published.id == entry.id else f" ({found.published.id})"
    note += "" if listed in (None, size) else f": WRONG SIZE, {listed} bytes are listed"
    return f"  present  {entry.id:<32}{size_text(size):>9}  {found.path}{note}"


def _total(missing: Sequence[FileEntry]) -> str:
    if not missing:
        return "nothing"
    unknown = sum(entry.size_bytes is None for entry in missing)
    known = size_text(sum(entry.size_bytes or 0 for entry in missing))
    more = f" and {unknown} of unknown size" if unknown else ""
    return f"{len(missing)} files, {known}{more}"


def _file_report(entry: FileEntry, found: Found | None) -> dict[str, Any]:
    return {
        "id": entry.id,
        "component": entry.component,
        "path": found.path if found else None,
        "published": found.published.id if found else None,
        "size_bytes": found.path.stat().st_size if found else entry.size_bytes,
        "address": entry.address,
        "licence": entry.licence,
        "unverified": entry.unverified,
    }
