"""Pins every file of a manifest to what is published now: revision, size, SHA-256.

Works on the JSON text, so that everything else in it stays as it was. A hash that is pinned is a
promise to everybody who has the file: it changes only if the caller says so. The manifest is
written beside its place and renamed, whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from xicon_infer.errors import WeightsError
from xicon_infer.types import Progress
from xicon_infer.weights.hub import Unreachable
from xicon_infer.weights.manifest import FileEntry, load_manifest, parse_manifest

GIVE_UP = 2
"""Files for which nobody can be reached, one after the other, before any answer: no network."""

PIN_SOURCE = "metadata of the hub, by xicon-infer weights lock"

_PINS = ("revision", "bytes", "sha256")


class RemoteLike(Protocol):
    """What is published of a file; `xicon_infer.weights.hub.RemoteFile` is one."""

    @property
    def revision(self) -> str | None:
        """The commit on the hub."""

    @property
    def size_bytes(self) -> int | None:
        """Its length."""

    @property
    def sha256(self) -> str | None:
        """Its hash, if the server knows it."""


Remote = Callable[[FileEntry], RemoteLike]


@dataclass(frozen=True)
class Pin:
    """What happened to one entry.

    before, after: values of revision, bytes and sha256. confirmed: the server said size and hash.
    error: why it could not be asked, or "". unreachable: because the network is not there.
    """

    id: str
    before: dict[str, Any]
    after: dict[str, Any]
    confirmed: bool = False
    error: str = ""
    unreachable: bool = False

    @property
    def changed(self) -> bool:
        """True if a value is new or other than before."""
        return self.before != self.after

    @property
    def contradicts(self) -> bool:
        """True if a size or hash that was pinned would change."""
        return any(
            self.before[name] is not None and self.before[name] != self.after[name]
            for name in ("bytes", "sha256")
        )


def lock(
    manifest: Path,
    *,
    remote: Remote,
    ids: Collection[str] = (),
    update: bool = False,
    output: Path | None = None,
    progress: Progress,
) -> list[Pin]:
    """Asks for every file, writes the pins, and returns what changed.

    Files that cannot be asked keep their pins and are reported; the others are written.

    Args:
        manifest: the file to read.
        remote: says what is published of an entry: at its pinned revision, or the newest.
        ids: of the entries to pin; all if empty.
        update: pin the newest revision; sizes and hashes may change.
        output: where to write; over `manifest` if None.
        progress: told after each file.

    Raises:
        WeightsError: a pinned size or hash would change and `update` is False, the file cannot
            be written, or nobody can be reached. Nothing is written then.
    """
    entries = [e for e in load_manifest(manifest).files if not ids or e.id in ids]
    pins: list[Pin] = []
    for number, entry in enumerate(entries, start=1):
        pins.append(_ask(replace(entry, revision=None) if update else entry, entry, remote))
        if len(pins) == min(GIVE_UP, len(entries)) and all(pin.unreachable for pin in pins):
            raise WeightsError(
                f"nobody can be reached, nothing was written: {pins[0].error}", code="OFFLINE"
            )
        progress.step(number, len(entries), "file")
    wrong = [pin for pin in pins if pin.contradicts]
    if wrong and not update:
        raise WeightsError(
            " ".join(_contradiction(pin) for pin in wrong)
            + " Nothing was written. If the publisher meant the change, repeat with --update."
        )
    _write(manifest, output or manifest, pins)
    return pins


def _ask(asked: FileEntry, entry: FileEntry, remote: Remote) -> Pin:
    before = {
        "revision": entry.revision,
        "bytes": entry.size_bytes,
        "sha256": entry.sha256,
    }
    try:
        found = remote(asked)
    except WeightsError as error:
        gone = isinstance(error, Unreachable)
        return Pin(entry.id, before, before, error=error.message, unreachable=gone)
    # What the server does not say is no reason to forget what is known.
    after = {
        "revision": found.revision or entry.revision,
        "bytes": found.size_bytes or entry.size_bytes,
        "sha256": found.sha256 or entry.sha256,
    }
    confirmed = found.size_bytes is not None and found.sha256 is not None
    return Pin(entry.id, before, after, confirmed)


def _contradiction(pin: Pin) -> str:
    changes = ", ".join(
        f"{name} {pin.before[name]} -> {pin.after[name]}"
        for name in ("bytes", "sha256")
        if pin.before[name] != pin.after[name]
    )
    return f"{pin.id}: what is published is not what is pinned ({changes})."


def _write(manifest: Path, output: Path, pins: Sequence[Pin]) -> None:
    content = json.loads(manifest.read_text(encoding="utf-8"))
    by_id = {raw["id"]: raw for raw in content["files"]}
    for pin in pins:
        if pin.error:
            continue
        raw = by_id[pin.id]
        known = any(pin.after[name] is not None for name in ("bytes", "sha256"))
        if pin.confirmed or (known and not raw["pin_source"]):
            raw["pin_source"] = PIN_SOURCE
        raw.update({name: pin.after[name] for name in _PINS})
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    parse_manifest(text, source=str(output))
    partial = output.with_name(f"{output.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        raise WeightsError(
            f"{output}: cannot be written: {error.strerror or error}. Name another with --output.",
            field="output",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    load_manifest.cache_clear()
