"""A look into a video in a process of its own, with little memory and little time.

A header of 3 kB can make the demuxer build tables of gigabytes, and a damaged file may crash a
decoder. Here that ends a small process and not the worker. What passes may be opened in the
worker: it takes no more there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_sink import Intake
from xicon_infer.media.source import MediaLimits

_POLL_S = 0.05
_PROGRAM = "from xicon_infer.media.fetch_probe import look; look()"


def check_video(path: Path, intake: Intake) -> None:
    """Refuses a video that cannot be read within the limits; decodes its first frame.

    Args:
        path: the file; its name appears in messages.
        intake: limits, field and switch.

    Raises:
        MediaError: as `video.probe`; MEDIA_CORRUPT also where the process fails.
        Cancelled: the fetch is to end.
    """
    limits = intake.limits
    request = {
        "path": os.fspath(path),
        "field": intake.field,
        "limits": asdict(limits.media),
        "max_bytes": limits.probe_bytes,
        "max_seconds": round(limits.probe_s) + 1,
    }
    found = _verdict(_ask(json.dumps(request), intake))
    if found is None:
        raise MediaError(
            f"'{intake.field}': the video cannot be read within {limits.probe_s:g} s and "
            f"{limits.probe_bytes / 1e9:.1f} GB of memory; it is damaged, or made to do harm. "
            "Convert it to MP4 (H.264)",
            field=intake.field,
            code="MEDIA_CORRUPT",
        )
    if found:
        raise MediaError(found["message"], field=intake.field, code=found["code"])


def _ask(request: str, intake: Intake) -> bytes:
    """Returns what the process prints; nothing of use if it fails or has to be ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, request],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",
    )
    started = intake.network.now()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_POLL_S)[0]
            intake.check()
            if intake.network.now() - started > intake.limits.probe_s:
                return b""
    finally:
        process.kill()
        process.communicate()


def _environment() -> dict[str, str]:
    """Returns the variables of the process: no secret, and no threads whose room it would need."""
    modules = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return {"PYTHONPATH": modules, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def _verdict(printed: bytes) -> dict[str, str] | None:
    """Returns code and message of a refusal, {} for a good video, None if nothing was said."""
    try:
        return json.loads(printed)
    except ValueError:
        return None


def look() -> None:
    """Does the looking, in the process of its own; prints the verdict as JSON."""
    request = json.loads(sys.argv[1])
    _confine(request["max_bytes"], request["max_seconds"])
    from xicon_infer.media.video import probe  # loads the decoder, within the limits

    verdict = {}
    try:
        probe(request["path"], limits=MediaLimits(**request["limits"]), field=request["field"])
    except MediaError as error:
        verdict = {"code": error.code, "message": error.message}
    sys.stdout.write(json.dumps(verdict))


def _confine(max_bytes: int, max_seconds: int) -> None:
    """Limits this process for good; on one processor decoders start one thread."""
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    wanted = ((resource.RLIMIT_AS, max_bytes), (resource.RLIMIT_CPU, max_seconds))
    for what, limit in (*wanted, (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (lower, lower))
