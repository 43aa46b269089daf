"""Checks that the weights of every mode are there, with the size that the manifest lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from xicon_infer.checks_types import CheckNeeds, Checks, Outcome, State
from xicon_infer.types import SilentProgress
from xicon_infer.weights.manifest import FileEntry, files_for
from xicon_infer.weights.places import existing, find_all
from xicon_infer.weights.verify import Verdict, check_file, verify_files

WEIGHTS = "weights"
"""First word of the name of these checks; the second is the mode."""


def weights_checks(needs: CheckNeeds) -> Checks:
    """Yields one check per mode."""
    for mode in needs.modes:
        yield f"{WEIGHTS} {mode}", partial(check_mode, needs, mode)


def check_mode(needs: CheckNeeds, mode: str) -> Outcome:
    """Checks the files of one mode.

    Args:
        needs: where to look.
        mode: a key of its modes.
    """
    sets = needs.modes[mode]
    entries = entries_of(sets)
    if not entries:
        return Outcome("ok", "needs no file")
    problems = list(_problems(needs, entries))
    named = " ".join(sets)
    if not problems:
        return Outcome("ok", f"{named}: {len(entries)} files")
    folders = ", ".join(map(str, existing(needs.search_dirs))) or "no folder that exists"
    text = f"{named}: {'; '.join(problems)} (searched: {folders})"
    state: State = "warn" if needs.any_mode and _another_is_complete(needs, mode) else "fail"
    fix = f"xicon-infer weights pull {named}, or leave {mode} out of XICON_MODES"
    return Outcome(state, text, fix)


def entries_of(sets: Sequence[str]) -> list[FileEntry]:
    """Returns the files of sets as "scail/fp8", each once."""
    found: dict[str, FileEntry] = {}
    for name in sets:
        pipeline, _, preset = name.partition("/")
        found |= {entry.id: entry for entry in files_for(pipeline, preset)}
    return list(found.values())


def _another_is_complete(needs: CheckNeeds, mode: str) -> bool:
    return any(
        not list(_problems(needs, entries_of(sets)))
        for other, sets in needs.modes.items()
        if other != mode
    )


def _problems(needs: CheckNeeds, entries: Sequence[FileEntry]) -> Iterator[str]:
    found = find_all(entries, needs.search_dirs)
    missing = [entry.names[0] for entry in entries if entry.id not in found]
    if missing:
        yield f"missing: {', '.join(missing)}"
    verdicts: Sequence[Verdict]
    if needs.verify:
        verdicts = verify_files(list(found.values()), quick=False, progress=SilentProgress())
    else:
        verdicts = [check_file(item.published, item.path) for item in found.values()]
    for verdict in verdicts:
        if verdict.state == "fault":
            reason = verdict.text.removeprefix(verdict.path.name).lstrip(": ")
            yield f"{verdict.path.name}: {reason}"
