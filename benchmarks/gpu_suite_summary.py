"""The figures of a `benchmarks.gpu_suite` as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def summary(report: dict[str, Any]) -> str:
    """Returns the page of a suite: machine, parts, then a table for each kind of result."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        "# GPU suite",
        "",
        f"{machine['device']}, driver {machine['driver']}, {machine['cpu']}; "
        + ", ".join(f"{name} {found}" for name, found in versions.items() if found),
        "",
        f"Commit {report['commit']}; budget {report['budget_s']:g} s.",
        "",
        *table(("part", "status", "s", "says"), part_rows(report["parts"])),
    ]
    for part in report["parts"].values():
        for name, content in part["files"].items():
            for start, page in PAGES:
                if name.startswith(start):
                    lines += ["", f"## {name.removesuffix('.json')}", "", *page(content)]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    marks = ["---"] * len(head)
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, marks, *rows)]


def part_rows(parts: dict[str, Any]) -> list[tuple[object, ...]]:
    """Returns a row for each part."""
    return [(name, part["status"], part["seconds"], part["says"]) for name, part in parts.items()]


def ceiling_page(content: dict[str, Any]) -> list[str]:
    """Returns the rates of a card."""
    rows = [("bf16 product", content["gemm_bf16"]["tflop_per_s"], "TFLOP/s")]
    for case in content["gemm_fp8"]:
        accumulation = "fast" if case["fast_accum"] else "exact"
        name = f"fp8 {case['layer']}, per {case['scaling']}, {accumulation} sums"
        rows.append((name, case.get("tflop_per_s", case.get("left_out")), "TFLOP/s"))
    for kernel, case in content["attention"].items():
        found = case.get("tflop_per_s", case.get("left_out"))
        rows.append((f"attention {kernel}", found, "TFLOP/s"))
    copy = content["copy"]
    rows.append(("copy on the device, read and written", copy["device_gb_per_s"], "GB/s"))
    rows.append(("copy from the host", copy["host_to_device_gb_per_s"], "GB/s"))
    return table(("what", "rate", "unit"), rows)


def dit_page(content: dict[str, Any]) -> list[str]:
    """Returns seconds of each candidate at each length, errors and shares of a block."""
    head = ("tokens", "candidate", "what", "attention", "s", "TFLOP/s", "x B0", "x floor",
            "peak GB", "first s", "error", "% GEMM / attention / elementwise / gaps")  # fmt: skip
    rows = []
    for tokens, results in content["results"].items():
        for name, found in results.items():
            shares = content["breakdown"].get(name, {})
            shares = shares.get("share", {}) if str(shares.get("tokens")) == tokens else {}
            kinds = ("gemm", "attention", "elementwise", "gaps")
            parts = " / ".join(f"{100 * shares[kind]:.0f}" for kind in kinds) if shares else None
            error = content["errors"].get(name, {}).get("relative_l2")
            rows.append((
                tokens, name, content["candidates"].get(name),
                content["built"].get(name, {}).get("attention"), found["median_s"],
                found["tflop_per_s"], found.get("speed_up"), found.get("times_the_floor"),
                found["peak_allocated_bytes"] / 1e9, found["first_call_s"], error, parts,
            ))  # fmt: skip
    notes = [f"{content['says']}. Peak memory is that of the layers that were run."]
    left_out = [f"- {line}" for line in content["left_out"]]
    return [*notes, "", *table(head, rows), *switch_lines(content), "", *left_out]


def vae_page(content: dict[str, Any]) -> list[str]:
    """Returns seconds of decoding and encoding."""
    rows = [
        (task, name, found["median_s"], found["speed_up"], found["tflop_per_s"],
         found["peak_bytes_above_start"] / 1e9)
        for task in ("decode", "encode") for name, found in content[task].items()
    ]  # fmt: skip
    return table(("task", "candidate", "s", "x diffusers", "TFLOP/s", "peak GB"), rows)


def linear_page(content: dict[str, Any]) -> list[str]:
    """Returns the ways of one linear layer."""
    rows = [
        (layer, name, way["median_s"], way["speed_up"], way["tflop_per_s"], way["relative_error"])
        for layer, found in content["layers"].items()
        for name, way in found["ways"].items()
    ]
    return table(("layer", "way", "s", "x wide", "TFLOP/s", "error"), rows)


def job_page(content: dict[str, Any]) -> list[str]:
    """Returns seconds and peak memory of each stage of a warm job."""
    rows = [
        (name, found["seconds"], *(_gb(found.get(f"{kind}_bytes")) for kind in _MEMORY))
        for name, found in content.get("stages", {}).items()
    ]
    total = content.get("total", {}).get("median_s")
    peaks = [_gb(content.get(f"peak_{kind}_bytes")) for kind in _MEMORY]
    rows.append(("total", total, *peaks))
    steps = ", ".join(f"{seconds:.3f}" for seconds in content.get("steps_s", []))
    notes = [*content["says"], f"seconds of each step: {steps}"]
    head = ("stage", "s", "allocated GB", "reserved GB")
    return [*table(head, rows), "", *(f"- {line}" for line in notes)]


def start_page(content: dict[str, Any]) -> list[str]:
    """Returns the steps of each start, in seconds."""
    starts = content["starts"]
    steps = list(dict.fromkeys(step for start in starts.values() for step in start["steps_s"]))
    rows: list[tuple[object, ...]] = [
        (step, *(start["steps_s"].get(step) for start in starts.values())) for step in steps
    ]
    rows.append(("ready", *(start["ready_s"] for start in starts.values())))
    whole = [(start["whole"] or {}).get("ready_s") for start in starts.values()]
    rows.append(("ready, whole weights", *whole))
    notes = [*content["left_out"]]
    if worker := content.get("worker"):
        notes.append(f"the worker with the tiny preset is ready after {worker['ready_s']:.1f} s")
    return [*table(("step", *starts), rows), "", *(f"- {line}" for line in notes)]


def parity_page(content: dict[str, Any]) -> list[str]:
    """Returns how many comparisons with the golden files hold, and those that do not."""
    counts = content["counts"]
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    bad = [
        (check["name"], check["rel_err"], check["tolerance"])
        for check in content["checks"]
        if not check["ok"] and not check["skip"]
    ]
    lines = [f"{content['dtype']} on {content['device']}: {told}; worst: {content['worst']}."]
    return [*lines, "", *table(("failed", "error", "allowed"), bad)] if bad else lines


def attention_page(content: dict[str, Any]) -> list[str]:
    """Returns every attention kernel at every length."""
    rows = [
        (case["shape"]["queries"], case["shape"]["keys"], name,
         *(found.get(key) for key in ("median_s", "tflop_per_s", "error", "left_out")))
        for case in content["cases"] for name, found in case["kernels"].items()
    ]  # fmt: skip
    absent = [f"- {name}: {reason}" for name, reason in content["absent"].items()]
    head = ("queries", "keys", "kernel", "s", "TFLOP/s", "error", "left out")
    return [*table(head, rows), "", *absent]


def gemm_page(content: dict[str, Any]) -> list[str]:
    """Returns every way to multiply, product by product."""
    rows = [
        (case["product"], case["tokens"], way, found["median_s"], found["tflop_per_s"],
         found["speed_up"], found["relative_error"])
        for case in content["cases"] for way, found in case["ways"].items()
    ]  # fmt: skip
    return table(("product", "tokens", "way", "s", "TFLOP/s", "x bf16", "error"), rows)


def fused_page(content: dict[str, Any]) -> list[str]:
    """Returns each step between the products, in every form."""
    rows = [
        (case["step"], case["tokens"], form, found["median_s"], found["gb_per_s"],
         found["speed_up"], found["relative_error"])
        for case in content["cases"] for form, found in case["forms"].items()
    ]  # fmt: skip
    return table(("step", "tokens", "form", "s", "GB/s", "x PyTorch", "error"), rows)


def swap_page(content: dict[str, Any]) -> list[str]:
    """Returns passes with swapped blocks against the same at rest, and the formula."""
    rows = [
        (row["tokens"], row["swapped"], row["at_rest"]["median_s"], row["with_swap"]["median_s"],
         row["slowdown"], row["predicted_s"], row["free"])
        for row in content["rows"]
    ]  # fmt: skip
    head = ("tokens", "swapped", "at rest s", "swapped s", "slowdown", "predicted s", "free")
    return table(head, rows)


def switch_lines(content: dict[str, Any]) -> list[str]:
    """Returns gain and drift of each optimisation alone."""
    rows = [
        (tokens, row["candidate"], row["says"], row["gain"], row["relative_l2"],
         row["times_the_error"])
        for tokens, found in content.get("switches", {}).items() for row in found
    ]  # fmt: skip
    head = ("tokens", "candidate", "what", "gain over O1", "error", "x error of O1")
    return ["", *table(head, rows)] if rows else []


_MEMORY = ("allocated", "reserved")


def _gb(value: int | None) -> float | None:
    return None if value is None else value / 1e9


PAGES: tuple[tuple[str, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("ceilings_", ceiling_page),
    ("dit_", dit_page),
    ("vae_", vae_page),
    ("fp8_linear_", linear_page),
    ("attention_", attention_page),
    ("gemm_", gemm_page),
    ("fused_", fused_page),
    ("swap_", swap_page),
    ("job_", job_page),
    ("cold_start_", start_page),
    ("parity_", parity_page),
)
"""Start of a file name -> its page. Other results are in the JSON alone."""


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
