"""What each optimisation of `benchmarks.dit` gains alone, and what it costs in accuracy."""

from __future__ import annotations

from typing import Any

from benchmarks.dit_models import SWITCHED, candidate


def switches(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns gain and drift of each optimisation, by length.

    The gain is against the same without it, the drift its error against float32 and how many times
    that of the one without.
    """
    errors = {name: found["relative_l2"] for name, found in report["errors"].items()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for tokens, results in report["results"].items():
        base = results.get(SWITCHED)
        ours = [name for name in results if candidate(name).engine == "ours" and name != SWITCHED]
        if base is None or not ours:
            continue
        rows[tokens] = [
            {
                "candidate": name,
                "says": report["candidates"][name],
                "gain": round(base["median_s"] / results[name]["median_s"], 3),
                "relative_l2": errors.get(name),
                "times_the_error": _ratio(errors.get(name), errors.get(SWITCHED)),
            }
            for name in ours
        ]
    return rows


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else round(first / second, 2)
