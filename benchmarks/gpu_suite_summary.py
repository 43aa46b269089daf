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
    return [*notes, "", *table(head, rows), "", *(f"- {line}" for line in content["left_out"])]


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


PAGES: tuple[tuple[str, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("ceilings_", ceiling_page),
    ("dit_", dit_page),
    ("vae_", vae_page),
    ("fp8_linear_", linear_page),
)
"""Start of a file name -> its page. Other results are in the JSON alone."""


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
