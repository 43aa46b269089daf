"""The figures that are owed: what each is, its targets, and where it is found in a result.

Targets: "must", "good" and "ambitious" for one H100 (an H200 differs only where memory counts). A
figure of another card is not compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, dict[str, Any]]
"""Name of a result file -> its content."""

CARDS = ("H100", "H200")
WAN_TOKENS = "32760"


@dataclass(frozen=True)
class Figure:
    """One number that is owed.

    what, unit. find: returns it from the results, None if it is not there. files: starts of the
    names of the results to look at, the best first. must, good, ambitious: targets, None for a
    figure without. more: True if more is better. part: of `benchmarks.gpu_suite`.
    """

    what: str
    unit: str
    files: tuple[str, ...]
    find: Callable[[dict[str, Any]], float | None]
    part: str
    must: float | None = None
    good: float | None = None
    ambitious: float | None = None
    more: bool = False
    cards: tuple[str, ...] = CARDS


def state_of(figure: Figure, value: float | None) -> str:
    """Returns "owed", "measured", "missed", or the best target that is met."""
    if value is None:
        return "owed"
    targets = {"ambitious": figure.ambitious, "good": figure.good, "must": figure.must}
    known = {name: target for name, target in targets.items() if target is not None}
    if not known:
        return "measured"
    for name, target in known.items():
        if value >= target if figure.more else value <= target:
            return f"met: {name}"
    return "missed"


def value_of(figure: Figure, results: Results) -> tuple[float | None, str]:
    """Returns the figure and the name of the file it is from; None and "" if it is still owed."""
    for start in figure.files:
        for name, content in sorted(results.items()):
            if not name.startswith(start) or not on_card(content, figure.cards):
                continue
            value = figure.find(content)
            if value is not None:
                return value, name
    return None, ""


def on_card(content: dict[str, Any], cards: tuple[str, ...]) -> bool:
    """Returns whether a result was made on one of the cards; an empty list takes any GPU."""
    machine = content.get("machine")
    device = machine.get("device", "") if isinstance(machine, dict) else str(machine)
    return any(card in device for card in cards) if cards else device not in ("cpu", "")


def ours(content: dict[str, Any], key: str, prefix: str = "O") -> Iterator[float]:
    """Yields a number of every candidate of ours at the length of the public benchmark."""
    for name, found in content.get("results", {}).get(WAN_TOKENS, {}).items():
        if name.startswith(prefix) and found.get(key) is not None:
            yield found[key]


def least(values: Iterator[float]) -> float | None:
    """Returns the least, None of nothing."""
    return min(values, default=None)


def most(values: Iterator[float]) -> float | None:
    """Returns the most, None of nothing."""
    return max(values, default=None)


def against_best(prefix: str) -> Callable[[dict[str, Any]], float | None]:
    """Returns what finds the gain over diffusers with its best flags, of candidates of ours."""

    def find(content: dict[str, Any]) -> float | None:
        peer = content.get("results", {}).get(WAN_TOKENS, {}).get("B1", {}).get("median_s")
        best = least(ours(content, "median_s", prefix))
        return None if peer is None or best is None else peer / best

    return find


def error_of(name: str) -> Callable[[dict[str, Any]], float | None]:
    """Returns what finds the error of a candidate against float32."""
    return lambda content: content.get("errors", {}).get(name, {}).get("relative_l2")


def gaps(content: dict[str, Any]) -> float | None:
    """Returns the share of a block in which no kernel ran, of our best candidate."""
    shares = [content.get("breakdown", {}).get(name, {}).get("share") for name in ("O3", "O1")]
    return next((share["gaps"] for share in shares if share), None)


def decode_s(content: dict[str, Any]) -> float | None:
    """Returns the seconds of our fastest decoder."""
    found = content.get("decode", {})
    return least(way["median_s"] for name, way in found.items() if name.startswith("ours"))


def total_s(content: dict[str, Any]) -> float | None:
    """Returns the seconds of a warm job."""
    return content.get("total", {}).get("median_s")


def peak_gb(content: dict[str, Any]) -> float | None:
    """Returns the most memory that a warm job held, in GB."""
    found = content.get("peak_reserved_bytes")
    return None if found is None else found / 1e9


def ready_s(content: dict[str, Any]) -> float | None:
    """Returns the seconds until a process with kept kernels is ready, for the whole weights."""
    start = content.get("starts", {}).get("early-reading") or {}
    return (start.get("whole") or {}).get("ready_s")


def failures(content: dict[str, Any]) -> float | None:
    """Returns how many comparisons with the golden files failed."""
    return content.get("counts", {}).get("FAIL")


_WHOLE, _SOME = ("dit_cuda_40layers", "dit_cuda"), ("dit_cuda_8layers", "dit_cuda")

FIGURES: tuple[Figure, ...] = (
    Figure("golden files that fail in bf16", "", ("parity_bf16",), failures, "parity_bf16", good=0),
    Figure("golden files that fail in fp8", "", ("parity_fp8",), failures, "parity_fp8", good=0),
    Figure("pass of 480x832x81, bf16", "s", _WHOLE, lambda c: least(ours(c, "median_s", "O1")),
           "dit_whole", 3.4, 3.0, 2.7),
    Figure("same over diffusers as it comes, best mode", "x", _WHOLE,
           lambda c: most(ours(c, "speed_up")), "dit_whole", 1.5, 2.0, 2.6, more=True),
    Figure("same over diffusers with its best flags, bf16", "x", _WHOLE, against_best("O1"),
           "dit_whole", good=1.0, more=True),
    Figure("same over diffusers with its best flags, best mode", "x", _WHOLE, against_best("O"),
           "dit_whole", good=1.3, ambitious=1.6, more=True),
    Figure("pass, bf16, over the floor of the run", "x", _WHOLE,
           lambda c: least(ours(c, "times_the_floor", "O1")), "dit_whole", 1.35, 1.20, 1.08),
    Figure("pass, fp8 products, over the floor of the run", "x", _WHOLE,
           lambda c: least(ours(c, "times_the_floor", "O3")), "dit_whole", 1.35, 1.2, 1.1),
    Figure("pass, fp8 and 8-bit attention, over the floor of the run", "x", _WHOLE,
           lambda c: least(ours(c, "times_the_floor", "O4")), "dit_whole", None, 1.35, 1.15),
    Figure("share of the floor of the run, best mode", "", _WHOLE,
           lambda c: most(ours(c, "share_of_the_floor")), "dit_whole", good=0.85, more=True),
    Figure("time of a block in which nothing runs", "share", _SOME, gaps, "dit", good=0.02),
    Figure("error against float32, bf16", "", _SOME, error_of("O1"), "dit", good=1e-2),
    Figure("error against float32, fp8 products", "", _SOME, error_of("O3"), "dit", good=4e-2),
    Figure("error against float32, fp8 and 8-bit attention", "", _SOME, error_of("O4"), "dit",
           good=6e-2),
    Figure("VAE, decoding 480x832x81", "s", ("vae_cuda_832x480x81",), decode_s, "vae",
           1.6, 1.2, 0.9),
    Figure("warm job 416x672x81, 6 steps", "s", ("job_scail-81_cuda.json",), total_s, "job",
           18, 14.5, 12),
    Figure("warm job 416x672x17, 6 steps", "s", ("job_scail-17_cuda.json",), total_s, "job",
           4, 3, 2.3),
    Figure("warm job 416x672x17 on an RTX 4090", "s", ("job_scail-17_cuda",), total_s, "job",
           15, 10, 7, cards=("4090",)),
    Figure("most memory, 416x672x81, fp8, no swap", "GB", ("job_scail-81_cuda_card",), peak_gb,
           "job_card", 22, 18, 16),
    Figure("warm SteadyDancer job 480x832x81, 4 steps", "s", ("job_dancer-81_cuda",), total_s,
           "job_dancer"),
    Figure("process start to ready, cold page cache", "s", ("cold_start_cuda",), ready_s,
           "cold_start", 20, 12, 8),
)  # fmt: skip
"""In the order of the suite."""
