"""`xicon-infer doctor`: what this machine can run, and why it cannot run the rest.

    doctor               everything; exit code 0 if the tiny preset can run, else 6
    doctor --worker      only the checks that a worker makes when it starts; 6 if one fails
    doctor --selftest    what this device computes against the CPU in float64; 6 if one is off
    doctor --parity      besides, the reference outputs of a source checkout, replayed on it too

On a terminal the report is a table, elsewhere plain lines; `--json` prints an object.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xicon_infer.checks import needs_of, run_checks
from xicon_infer.checks_probes import REAL, Probes
from xicon_infer.doctor_findings import WORKER, of_check, tiny_can_run
from xicon_infer.doctor_findings import Finding as Finding
from xicon_infer.doctor_findings import examine as examine
from xicon_infer.doctor_text import Number, format_findings, format_numbers, show
from xicon_infer.job_flags import Parser, parse
from xicon_infer.runtime import models_dirs
from xicon_infer.settings import InvalidSettings, read_settings

_DEVICE_EXIT_CODE = 6


def main(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, probes: Probes = REAL
) -> int:
    """Prints the report and returns the exit code.

    Args:
        argv: the words after `doctor`.
        env: environment variables with the settings of the worker; none, so the defaults, if None.
        probes: how the machine is looked at.

    Raises:
        InvalidRequest: an unknown option.
        XiconError: what was asked for cannot be done here.
    """
    options = parse(_parser(), argv)
    if "selftest" in options or "parity" in options:
        return _compute(options)
    searched = models_dirs(options.get("models_dir"))
    worker = _worker_findings(env or {}, searched, probes, strict="worker" in options)
    healthy = not any(finding.state == "problem" for finding in worker)
    if "worker" in options:
        _print(options, {"worker_can_start": healthy, "findings": _plain(worker)}, worker)
        return 0 if healthy else _DEVICE_EXIT_CODE
    findings = [*examine(searched), *worker]
    ready = tiny_can_run(findings)
    report = {"tiny_can_run": ready, "worker_can_start": healthy, "findings": _plain(findings)}
    _print(options, report, [*_without_worker_problems(findings)])
    return 0 if ready else _DEVICE_EXIT_CODE


def _parser() -> Parser:
    parser = Parser(prog="xicon-infer doctor", description="Say what this machine can run.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--models-dir", metavar="PATH", type=Path, help="folder with weights")
    add("--worker", action="store_true", help="only what a worker checks when it starts")
    add("--selftest", action="store_true", help="compare this device with the CPU in float64")
    add("--parity", action="store_true", help="also replay reference outputs; needs the source")
    add("--golden", metavar="PATH", type=Path, help="folder of reference outputs for --parity")
    add(
        "--device", metavar="{auto,cuda,cpu}", choices=("auto", "cuda", "cpu"), help="to compute on"
    )
    add("--dtype", metavar="{auto,bf16,fp16,fp32}", choices=("auto", "bf16", "fp16", "fp32"))
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def format_report(findings: Sequence[Finding]) -> str:
    """Returns the report as plain text, grouped, with the verdict."""
    return "\n".join([*format_findings(findings), _verdict(findings)])


def _verdict(findings: Sequence[Finding]) -> str:
    if not any(finding.needed for finding in findings):
        failed = any(finding.state == "problem" for finding in findings)
        return f"A worker {'CANNOT' if failed else 'can'} start here."
    return f"The tiny preset {'can' if tiny_can_run(findings) else 'CANNOT'} run here."


def _worker_findings(
    env: Mapping[str, str], searched: Sequence[Path], probes: Probes, *, strict: bool
) -> list[Finding]:
    """Returns the checks of a worker's start; without `strict` a GPU may be absent."""
    try:
        settings = read_settings(env)
    except InvalidSettings as error:
        wrong = "; ".join(error.errors)
        return [Finding("worker", "settings", "problem", wrong, fix="see .env.example")]
    needs = needs_of(settings, searched, gpu=None if strict else False)
    return [of_check(result) for result in run_checks(needs, probes=probes)]


def _without_worker_problems(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yields the findings with one line in place of what would stop a worker.

    Who makes videos here needs no worker, and is told of missing weights and packages already.
    """
    stops = [f.name for f in findings if f.group == WORKER and f.state == "problem"]
    yield from (f for f in findings if f.group != WORKER or f.state != "problem")
    if stops:
        text = f"would not start: {', '.join(stops)}"
        yield Finding(WORKER, "start", "absent", text, fix="`xicon-infer doctor --worker` says why")


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def _print(options: Mapping[str, Any], report: dict[str, Any], findings: Sequence[Finding]) -> None:
    if "json" in options:
        print(json.dumps(report, indent=2))
    elif sys.stdout.isatty():
        show(findings)
        print(_verdict(findings))
    else:
        print(format_report(findings))


def _shown(number: Number) -> dict[str, Any]:
    """Returns a comparison for JSON, which has no word for what is no number."""
    error = number.error if math.isfinite(number.error) else None
    return asdict(number) | {"error": error, "ok": number.ok}


def _compute(options: Mapping[str, Any]) -> int:
    """Prints what was computed, how far off it is, and what was allowed."""
    from xicon_infer.doctor_selftest import pick, self_test

    device, dtype = pick(options.get("device", "auto"), options.get("dtype", "auto"))
    numbers: list[Number] = []
    if "parity" in options:
        from xicon_infer.doctor_parity import replay

        kind = str(dtype).removeprefix("torch.")
        numbers += replay(options.get("golden"), device=device.type, dtype=kind)
    numbers += self_test(device, dtype)
    good = all(number.ok or number.skip for number in numbers)
    if "json" in options:
        told = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "ok": good}
        print(json.dumps(told | {"checks": [_shown(n) for n in numbers]}, indent=2))
    else:
        print("\n".join(format_numbers(numbers)))
        print(f"This device {'computes' if good else 'DOES NOT COMPUTE'} what it should.")
    return 0 if good else _DEVICE_EXIT_CODE
