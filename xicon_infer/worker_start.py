"""Start-up: settings, checks, weights, a warm-up pass, and then the platform's SDK.

A worker that cannot work takes no job. On the platform the reason goes out through one fitness
check of the SDK, which reports it and ends the process; elsewhere it is printed.

Source: runpod/runpod-python: serverless/modules/rp_fitness.py, serverless/__init__.py (1.12.0).
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from xicon_infer.errors import InvalidRequest, XiconError
from xicon_infer.settings import InvalidSettings, Settings, read_settings
from xicon_infer.worker import Limits, Worker
from xicon_infer.worker_log import JsonLog
from xicon_infer.worker_metrics import Metrics
from xicon_infer.worker_progress import Send, send_to_platform

LOCAL_API = ("--rp_serve_api", "--rp_api_host", "0.0.0.0", "--rp_api_port", "8000")
_SHOWN = 60
"""Characters of a bad --test_input that the message repeats."""
_SECRETS = ("hf_token", "bucket_access_key_id", "bucket_secret_access_key", "bucket_session_token")


class Serverless(Protocol):
    """The module `runpod.serverless`, as far as it is used."""

    def start(self, config: dict[str, Any]) -> None:
        """Takes jobs until the process ends."""

    def register_fitness_check(self, func: Callable[[], None]) -> Any:
        """Adds a check that `start` makes on the platform before the first job."""


class Prepare(Protocol):
    """Makes a worker ready; `worker_prepare.prepare` is the real one."""

    def __call__(self, settings: Settings, tools: Tools) -> Worker:
        """Returns the worker; raises what is wrong with it."""


@dataclass(frozen=True)
class Tools:
    """What the start-up hands on: where to log, what to count, how to send progress, limits.

    dry: the only job makes no video, so that neither weights nor a GPU are needed.
    """

    log: JsonLog
    metrics: Metrics
    limits: Limits
    send: Send | None
    clock: Callable[[], float] = time.monotonic
    dry: bool = False

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns what a step of the start-up returns, and writes down how long it took."""
        start = self.clock()
        done = work()
        seconds = round(self.clock() - start, 3)
        self.log.event("start.step", step=name, seconds=seconds)
        self.metrics.put("xicon_start_step_seconds", seconds, step=name)
        return done


def run_worker(
    serverless: Serverless,
    *,
    env: Mapping[str, str],
    argv: list[str],
    prepare: Prepare | None = None,
    write: Callable[[str], None] | None = None,
) -> int:
    """Starts the worker and returns the exit code, once the SDK lets go of it.

    Args:
        serverless: the SDK.
        env: of the process.
        argv: of the process; SERVE_API_LOCALLY adds to it.
        prepare: makes the worker ready.
        write: takes the lines of the log; standard output if None.
    """
    clock = time.monotonic
    start = clock()
    log = JsonLog(write)
    try:
        settings = read_settings(env)
        log = _log(settings, write)
        dry = not on_platform(env, argv) and is_dry(local_job(argv))
        tools = Tools(log, Metrics(clock), _limits(settings), _send(env, argv), clock, dry)
        for notice in settings.notices:
            log.event("start.notice", level="WARNING", message=notice)
        if settings.serve_api_locally and "--rp_serve_api" not in argv:
            argv += LOCAL_API
        worker = (prepare or _prepare)(settings, tools)
    except Exception as error:  # noqa: BLE001 - whatever it is, the platform must be told
        return _refuse(serverless, error, env=env, argv=argv, log=log)
    seconds = round(clock() - start, 3)
    tools.metrics.put("xicon_start_seconds", seconds)
    log.event("ready", seconds=seconds, modes=list(settings.modes))
    serverless.start({"handler": worker.handle})
    return 0


def on_platform(env: Mapping[str, str], argv: list[str]) -> bool:
    """Returns True where the SDK takes jobs from the platform and makes its fitness checks."""
    local = any(word.partition("=")[0] in ("--test_input", "--rp_serve_api") for word in argv)
    realtime = env.get("RUNPOD_REALTIME_PORT", "0") != "0"
    return bool(env.get("RUNPOD_WEBHOOK_GET_JOB")) and not local and not realtime


def local_job(argv: list[str]) -> Any:
    """Returns the one job that the SDK will run on this machine, or None.

    It comes from --test_input, else from test_input.json in the working folder.

    Raises:
        InvalidRequest: it is no JSON object; the SDK would end with a traceback.
    """
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        if word.partition("=")[0] == "--test_input":
            return _object(word.partition("=")[2] or value, "--test_input")
    path = Path("test_input.json")
    if any(word.startswith("--rp_serve_api") for word in argv) or not path.is_file():
        return None
    try:
        return _object(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}", field="test_input") from error


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        reason = f"it is no JSON: {error}"
    else:
        if isinstance(found, dict):
            return found
        reason = f"it is a {type(found).__name__}"
    example = '{"input": {"action": "health"}}'
    raise InvalidRequest(
        f"{source} must be one JSON object, as {example}; {reason}, got {text[:_SHOWN]!r}",
        field="test_input",
    )


def is_dry(job: Any) -> bool:
    """Returns True if a job only asks for its plan or the health of the worker."""
    given = job.get("input") if isinstance(job, dict) else None
    return isinstance(given, dict) and (given.get("dry_run") is True or "action" in given)


def _prepare(settings: Settings, tools: Tools) -> Worker:
    if not tools.dry:
        _read_ahead(settings)
    # Imported when the settings are known to be good: it loads PyTorch.
    prepare = tools.timed("import", _import_prepare)
    ready: Worker = prepare(settings, tools)
    return ready


def _import_prepare() -> Any:
    from xicon_infer.worker_prepare import prepare

    return prepare


def _read_ahead(settings: Settings) -> None:
    """Has the weights that are loaded first read into memory while PyTorch is imported."""
    from xicon_infer.checks import sets_of
    from xicon_infer.runtime import models_dirs
    from xicon_infer.weights.manifest import files_for
    from xicon_infer.weights.places import find_all
    from xicon_infer.weights.warmup import warm_files
    from xicon_infer.worker_warm import warm_modes

    folders = models_dirs(next(iter(settings.models_dir), None))
    for mode in warm_modes(settings, settings.modes):
        for name in sets_of(mode, settings.preset_for(mode))[:1]:  # the second is for poses
            pipeline, _, preset = name.partition("/")
            entries = files_for(pipeline, preset)
            found = find_all(entries, folders)
            if len(found) == len(entries):
                warm_files([found[entry.id].path for entry in entries])
                return


def _refuse(
    serverless: Serverless,
    error: Exception,
    *,
    env: Mapping[str, str],
    argv: list[str],
    log: JsonLog,
) -> int:
    """Tells why the worker cannot start, and returns 1."""
    known = isinstance(error, XiconError)
    shown = {} if known else {"traceback": "".join(traceback.format_exception(error))}
    faults = error.errors if isinstance(error, InvalidSettings) else (str(error),)
    for fault in faults:
        log.event("start.failed", level="ERROR", message=fault, **shown)
    if on_platform(env, argv):
        reason = " ".join(str(error).split())

        def worker_start() -> None:
            raise RuntimeError(reason)

        serverless.register_fitness_check(worker_start)
        # Ends the process with code 1: the check above fails before any job is taken.
        serverless.start({"handler": _never})
    return 1


async def _never(event: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses a job that could only come if the failed check had not ended the process."""
    return {"error": "The worker could not start [MODEL_MISSING]", "refresh_worker": True}


def _log(settings: Settings, write: Callable[[str], None] | None) -> JsonLog:
    secrets = [str(getattr(settings, name)) for name in _SECRETS]
    return JsonLog(write, level=settings.log_level, secrets=secrets)


def _limits(settings: Settings) -> Limits:
    return replace(Limits(), job_s=settings.job_timeout_s, grace_s=settings.cancel_grace_s)


def _send(env: Mapping[str, str], argv: list[str]) -> Send | None:
    """Returns how progress goes to the platform; None where there is none to take it."""
    there = env.get("RUNPOD_WEBHOOK_POST_OUTPUT") and on_platform(env, argv)
    return send_to_platform if there else None
