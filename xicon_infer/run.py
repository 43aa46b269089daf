"""The command line: `xicon-infer run ...`, the same as `python -m xicon_infer.run ...`.

Only arguments, output and exit codes are here; the options come from `xicon_infer.job_fields`.
Nothing heavy is imported before the arguments are known to be good, so that `--help` and a typing
error answer at once, and a dry run never loads PyTorch.

Exit codes: 0 done, 2 request, 3 media, 4 pose, 5 weights, 6 device or memory, 1 bug, 130 stopped
by Ctrl-C. An error is one line on standard error; with --json also an object on standard output.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from xicon_infer.errors import Cancelled, InvalidRequest, XiconError
from xicon_infer.job import Job, check_files
from xicon_infer.job_flags import jobs_of, parse, run_parser
from xicon_infer.runtime import debug_enabled, environment, models_dirs, pick_seed
from xicon_infer.types import Progress, Result, SilentProgress

RunJob = Callable[[Job, Progress], Result]


def main(argv: Sequence[str] | None = None, *, run_job: RunJob | None = None) -> int:
    """Returns the exit code of one command.

    Args:
        argv: the words after the program name; those of the process if None.
        run_job: does the work; `xicon_infer.service.run_job` if None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    error: BaseException
    try:
        with _stopped_by_sigterm():
            return _command(words, run_job)
    except SystemExit as stop:  # argparse after --help or --version
        return int(stop.code or 0)
    except KeyboardInterrupt as caught:
        error = Cancelled("stopped; no output was written")
        error.__cause__ = caught
    except XiconError as caught:
        error = caught
    except Exception as caught:  # noqa: BLE001 - the edge of the process: a bug becomes code 1
        error = XiconError(f"{type(caught).__name__}: {caught}; this is a bug, see it with --debug")
        error.__cause__ = caught
    if "--debug" in words or debug_enabled():
        traceback.print_exception(error)
    return _report_error(error, as_json="--json" in words)


def _command(words: list[str], run_job: RunJob | None) -> int:
    if words[:1] == ["doctor"]:
        from xicon_infer import doctor

        return doctor.main(words[1:], env=environment())
    if words[:1] == ["weights"]:
        from xicon_infer import weights_cli
        from xicon_infer.weights_cli_work import Workers

        workers = Workers(progress=lambda: _progress(silent=False))
        return weights_cli.main(words[1:], workers=workers)
    if words[:1] == ["import-workflow"]:
        from xicon_infer import workflow_cli

        return workflow_cli.main(words[1:])
    return _run(words[1:] if words[:1] == ["run"] else words, run_job)


def _run(words: list[str], run_job: RunJob | None) -> int:
    options = parse(run_parser(), words)
    jobs = jobs_of(options, pick_seed)
    for job in jobs:
        check_files(job)
    if len(jobs) > 1:  # a damaged picture must not be found after the first video
        from xicon_infer.media.image import load_image

        for job in jobs:
            if job.image is not None:
                load_image(job.image)
    as_json = "json" in options
    if "gpu" in options and "dry_run" not in options:
        raise InvalidRequest("'gpu' needs --dry-run: it plans for a card", field="gpu")
    if "gpu" in options and options.get("device") == "cpu":
        raise InvalidRequest("'gpu' and --device cpu contradict each other", field="gpu")
    if "dry_run" in options:
        from pipelines.plan import make_plan
        from pipelines.plan_text import format_plan

        plans = [
            make_plan(job, search_dirs=models_dirs(job.models_dir), gpu=options.get("gpu"))
            for job in jobs
        ]
        print(_json(_one_or_all(plans)) if as_json else "\n\n".join(map(format_plan, plans)))
        return 0
    if run_job is None:
        _warm(jobs[0])
        from functools import partial

        from xicon_infer import service
        from xicon_infer.service_session import Session

        run_job = partial(service.run_job, session=Session())
    progress = _progress(silent=as_json or "quiet" in options)
    results = []
    for job in jobs:
        results.append(run_job(job, progress))
        if not as_json and "quiet" not in options:
            print(_summary(results[-1]), flush=True)
    if as_json:
        print(_json(_one_or_all(results)))
    return 0


def _warm(job: Job) -> None:
    """Has the weights read into memory while PyTorch is imported."""
    if job.settings().get("preset", "tiny") != "tiny":
        from xicon_infer.weights.warmup import warm_preset

        warm_preset(job.pipeline, job.preset, models_dirs(job.models_dir))


def _one_or_all(found: Sequence[Any]) -> Any:
    """Returns the value of one job as it is, of several as a list."""
    plain = [asdict(value) for value in found]
    return plain[0] if len(plain) == 1 else plain


def _progress(*, silent: bool) -> Progress:
    if silent:
        return SilentProgress()
    from xicon_infer.console import ConsoleProgress

    return ConsoleProgress()


def _summary(result: Result) -> str:
    # Pipeline pose draws no noise.
    seed = "" if result.settings.get("pipeline") == "pose" else f"seed {result.seed}, "
    seconds = sum(stage.seconds for stage in result.stages)
    lines = [
        f"{result.path}: {result.num_frames} frames, {result.width}x{result.height}, "
        f"{float(result.fps):g} fps, {seed}{seconds:.1f} s"
    ]
    return "\n".join(lines + [f"{path}: {name}" for name, path in result.outputs.items()])


def _json(value: object) -> str:
    return json.dumps(value, indent=2, default=_json_value)


def _json_value(value: object) -> object:
    """Returns what JSON has no type for: a path as text, a fraction as a number."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Fraction):
        return float(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _report_error(error: XiconError, *, as_json: bool) -> int:
    # One line whatever a file name holds, and nothing that a terminal would obey.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(error.message.split()))
    if as_json:
        detail = {"code": error.code, "message": text, "field": error.field}
        full = {"error": f"{text} [{error.code}]", "error_code": error.code, "error_detail": detail}
        print(_json(full))
    print(f"error: {text} [{error.code}]", file=sys.stderr)
    return error.exit_code


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Makes a polite kill clean up like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
