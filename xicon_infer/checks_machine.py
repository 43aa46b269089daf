"""Checks that need no GPU: Python, packages, temporary folder, disk, storage, default video."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator

from xicon_infer.checks_probes import Probes
from xicon_infer.checks_types import CheckNeeds, Checks, Outcome
from xicon_infer.errors import XiconError

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)
LEAST_FREE_BYTES = 2 * 10**9
"""Below that a job cannot hold its input, its frames and its result; the same as for a job."""

_LOW_FREE_BYTES = 10 * 10**9
# "numpy>=1.26" with nothing but a lower end; markers and extras were left out before.
_AT_LEAST = re.compile(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")


def machine_checks(needs: CheckNeeds, probes: Probes) -> Checks:
    """Yields the checks, cheapest first."""
    yield "python", lambda: check_python(sys.version_info[:3])
    yield "packages", lambda: check_packages(probes)
    yield "temporary folder", lambda: check_tmp(needs, probes)
    yield "disk", lambda: check_disk(needs, probes)
    if needs.default_video is not None:
        yield "default video", lambda: check_video(needs, probes)
    if needs.bucket is not None:
        yield "bucket", lambda: check_bucket(needs)


def check_python(version: tuple[int, ...]) -> Outcome:
    """Checks the version of Python.

    Args:
        version: as (3, 12, 1).
    """
    text = f"Python {'.'.join(map(str, version))} on {platform.machine()}"
    if version < OLDEST_PYTHON:
        return Outcome("fail", f"{text}; 3.10 is the oldest that will do", "use Python 3.12")
    if version[:2] > NEWEST_PYTHON:
        return Outcome("warn", f"{text}; 3.13 is the newest that was tried", "use Python 3.12")
    return Outcome("ok", text)


def check_packages(probes: Probes) -> Outcome:
    """Checks that what the package asks for is installed, and new enough."""
    wrong = list(_wrong_packages(probes))
    if wrong:
        return Outcome("fail", "; ".join(wrong), "pip install -c constraints.txt .")
    torch = probes.version("torch")
    return Outcome("ok", f"all that are needed; torch {torch}")


def _wrong_packages(probes: Probes) -> Iterator[str]:
    for line in probes.requirements() or ("torch>=2.10", "av>=17"):
        found = _AT_LEAST.match(line)
        if found is None:
            continue
        name, least = found[1], found[2] or "0"
        version = probes.version(name)
        if not version:
            yield f"{name} is not installed"
        elif _numbers(version) < _numbers(least):
            yield f"{name} is {version}, {least} is the oldest that will do"


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: (2, 11, 0) of "2.11.0+cu128"."""
    numbers = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def check_tmp(needs: CheckNeeds, probes: Probes) -> Outcome:
    """Checks that jobs can have files."""
    try:
        probes.write(needs.tmp)
    except OSError as error:
        fix = "set XICON_TMP to a folder that this user may write to"
        return Outcome("fail", f"{needs.tmp} cannot be written to: {error}", fix)
    return Outcome("ok", str(needs.tmp))


def check_disk(needs: CheckNeeds, probes: Probes) -> Outcome:
    """Checks that there is room for a job."""
    free = probes.free_bytes(needs.tmp)
    text = f"{free / 1e9:.1f} GB free for {needs.tmp}"
    fix = "give the container a larger disk"
    if free < LEAST_FREE_BYTES:
        return Outcome("fail", f"{text}; a job needs {LEAST_FREE_BYTES / 1e9:.0f} GB", fix)
    if free < _LOW_FREE_BYTES:
        return Outcome("warn", f"{text}; long videos need more", fix)
    return Outcome("ok", text)


def check_video(needs: CheckNeeds, probes: Probes) -> Outcome:
    """Checks that the video for requests without one can be read."""
    path = needs.default_video
    if path is None:
        return Outcome("ok", "none is set")
    try:
        return Outcome("ok", f"{path}: {probes.video(path)}")
    except (XiconError, OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    fix = "set XICON_DEFAULT_VIDEO to a video that is there, or unset it"
    return Outcome("fail", f"{path} cannot be used: {reason}", fix)


def check_bucket(needs: CheckNeeds) -> Outcome:
    """Checks the storage by what the delivery itself tries."""
    if needs.bucket is None:
        return Outcome("ok", "none is set")
    try:
        needs.bucket()
    except (XiconError, OSError, RuntimeError, ValueError) as error:
        fix = "check the BUCKET_ variables; BUCKET_SKIP_CHECK=1 leaves this check out"
        return Outcome("fail", str(error) or type(error).__name__, fix)
    return Outcome("ok", "a trial file was written and removed")
