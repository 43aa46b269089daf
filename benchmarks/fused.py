"""What do our kernels between the products save, against PyTorch and against torch.compile?

Each step of a block at the width of Wan2.1 14B and the tokens of 480x832x81 (32,760), SCAIL
416x672x81 (29,757) and 17 frames (7,917): as PyTorch runs it, as torch.compile makes it, and our
kernel. GB/s are those of the least traffic, every input read once and every output written once, so
the three compare by time. In turns; the error is against the formula in float64. What does not run
is named with its reason. Writes one JSON file, anew after each step.

    python -m benchmarks.fused --device cuda
    python -m benchmarks.fused --tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, environment, relative_error, seconds_of, spread, write
from xicon_infer.ops import fused, fused_eager
from xicon_infer.ops.attention_packages import first_line
from xicon_infer.ops.fused_choice import kernels_problem
from xicon_infer.ops.linear import QuantizedRows
from xicon_infer.ops.rope import Rope

TOKENS = (32760, 29757, 7917)
TINY_TOKENS = (16,)
EPS = 1e-6
WARM_UPS = 3
COMPILED = "compile"
CHECKED_ROWS = 64


class Sizes(NamedTuple):
    """Width, inner width of the feed-forward, heads."""

    width: int = 5120
    inner: int = 13824
    heads: int = 40


TINY = Sizes(64, 96, 2)


class Step(NamedTuple):
    """One step: PyTorch's form, our kernel, its inputs, and the bytes it must move.

    Both forms return tensors, or (values, scale) for rows in e4m3.
    """

    name: str
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    given: tuple[Any, ...]
    bytes: int


def main(words: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the command line asks for."""
    args = parse(words)
    if args.device == "cpu":
        torch.set_num_threads(1)
    report = environment("benchmarks.fused", args.device)
    path = args.out / f"fused_{args.device}{'_tiny' if args.tiny else ''}.json"
    for figures in measure(args):
        report |= figures
        write(report, path)
    print(table(report))
    print(f"written to {path}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the command line, parsed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="rows")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the figures of the steps so far, after each, at every number of tokens."""
    device = torch.device(args.device)
    left_out: dict[str, str] = {}
    if problem := kernels_problem("triton", device, torch.bfloat16):
        left_out["ours"] = problem
    if args.no_compile or args.device == "cpu":
        left_out[COMPILED] = "left out on request" if args.no_compile else "made for a GPU only"
    sizes = TINY if args.tiny else Sizes()
    cases = []
    for tokens in args.tokens or (TINY_TOKENS if args.tiny else TOKENS):
        for step in steps_of(tokens, sizes, args.device):
            cases.append(measure_one(step, tokens, left_out, args))
            told = {"dtype": "bfloat16", "sizes": sizes._asdict()}
            yield told | {"left_out": left_out, "cases": cases}


def measure_one(
    step: Step, tokens: int, left_out: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Returns seconds, GB/s and error of every form of a step."""
    forms: dict[str, Callable[..., Any]] = {"PyTorch": step.plain}
    if "ours" not in left_out:
        forms["ours"] = step.ours
    if COMPILED not in left_out:
        torch.compiler.reset()
        # A graph for each length: after the few rows of the check the next would be for any.
        forms[COMPILED] = torch.compile(step.plain, fullgraph=True, dynamic=False)
    few = tuple(_first_rows(each, tokens) for each in step.given)
    if COMPILED in forms and (reason := refusal(forms[COMPILED], few)):
        left_out[COMPILED] = reason
        del forms[COMPILED]
    exact = _told(step.plain(*(_double(each) for each in few)))
    errors = {name: relative_error(_told(form(*few)), exact) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(WARM_UPS + args.rounds):
        for name, form in forms.items():
            taken = seconds_of(lambda form=form: form(*step.given), args.device)  # type: ignore[misc]
            if turn >= WARM_UPS:
                seconds[name].append(taken)
    found = {
        name: spread(taken) | {"relative_error": errors[name]} for name, taken in seconds.items()
    }
    for each in found.values():
        each["gb_per_s"] = round(step.bytes / max(each["median_s"], 1e-9) / 1e9, 3)
        each["speed_up"] = round(found["PyTorch"]["median_s"] / max(each["median_s"], 1e-9), 3)
    return {"step": step.name, "tokens": tokens, "bytes": step.bytes, "forms": found}


def refusal(form: Callable[..., Any], given: tuple[Any, ...]) -> str:
    """Returns why a compiled form does not run, or "" if it does."""
    try:
        form(*given)
    except RuntimeError as error:  # those of torch.compile derive from it
        return first_line(error)
    return ""


def steps_of(tokens: int, sizes: Sizes, device: str) -> list[Step]:
    """Returns the steps of a block, with inputs in bf16."""
    width, half = sizes.width, sizes.width // sizes.heads // 2
    x, update = _normal(device, 1, tokens, width), _normal(device, 1, tokens, width)
    query = _normal(device, 1, tokens, 3 * width)[..., :width]
    inner = _normal(device, 1, tokens, sizes.inner)
    weight, bias = _normal(device, width), _normal(device, width)
    shift, scale, gate = (_normal(device, 1, 1, width).float() for _ in range(3))
    rope = Rope(_normal(device, tokens, half).float(), _normal(device, tokens, half).float())
    row, deep, table = 2 * tokens * width, 2 * tokens * sizes.inner, 8 * tokens * half

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return _norm(x, None, None, scale, shift, modulate=True)[1].to(x.dtype)

    def modulated_rows(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return fused_eager.quantize(_norm(x, None, None, scale, shift, modulate=True)[1])

    def added(x: Tensor, update: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Any:
        total, normed = _norm(x, update, gate, weight, bias, modulate=False)
        return total, normed.to(x.dtype)

    def added_by_us(x: Tensor, update: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return fused.add_norm(x, update, gate, (weight, bias), eps=EPS, modulate=False, fp8=False)

    def turned(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fused_eager.rms_rope(x, weight, (cos, sin), eps=EPS)

    def turned_by_us(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fused.norm_rope(x, weight, EPS, sizes.heads, Rope(cos, sin)).flatten(2)

    def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
        return fused_eager.quantize(fused_eager.to_quantize(x, None, gelu=True))

    return [
        Step(
            "norm and modulate",
            modulated,
            lambda x, shift, scale: fused.norm_modulate(x, shift, scale, EPS, fp8=False),
            (x, shift, scale),
            2 * row,
        ),
        Step(
            "norm and modulate to fp8",
            modulated_rows,
            lambda x, shift, scale: fused.norm_modulate(x, shift, scale, EPS, fp8=True),
            (x, shift, scale),
            row + row // 2,
        ),
        Step("norm and rotate", turned, turned_by_us, (query, weight, *rope), 2 * row + table),
        Step("add and norm", added, added_by_us, (x, update, gate, weight, bias), 4 * row),
        Step(
            "gated sum",
            lambda x, update, gate: _norm(x, update, gate, None, None, modulate=False)[0],
            fused.gated_add,
            (x, update, gate),
            3 * row,
        ),
        Step(
            "GELU to fp8",
            gelu,
            lambda x: fused.quantize_rows(x, gelu=True),
            (inner,),
            deep + deep // 2,
        ),
    ]


def table(report: dict[str, Any]) -> str:
    """Returns the figures as lines."""
    lines = [f"{name}: {why}" for name, why in report["left_out"].items()]
    for case in report["cases"]:
        for name, found in case["forms"].items():
            step = f"{case['step']:<26} {case['tokens']:>6} {name:<8}"
            rate = f"{found['median_s'] * 1e3:9.3f} ms {found['gb_per_s']:8.1f} GB/s"
            lines.append(f"{step} {rate} x{found['speed_up']:<6} {found['relative_error']:.1e}")
    return "\n".join(lines)


def _norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    modulate: bool,
) -> tuple[Tensor, Tensor]:
    return fused_eager.norm_rows(x, update, gate, scale, shift, eps=EPS, modulate=modulate)


def _told(found: Any) -> Tensor:
    """Returns the last tensor of a result; rows in e4m3 as the numbers they stand for."""
    if isinstance(found, QuantizedRows):
        found = (found.values, found.scale)
    if not isinstance(found, tuple):
        return found
    if found[0].dtype == torch.float8_e4m3fn:
        values, scale = found
        return values.float() * scale.reshape(*values.shape[:-1], 1)
    return found[-1]


def _first_rows(each: Tensor, tokens: int) -> Tensor:
    """Returns the first rows of what has one for each token; the rest as it is."""
    if each.ndim == 3 and each.shape[1] == tokens:
        return each[:, :CHECKED_ROWS]
    return each[:CHECKED_ROWS] if each.ndim == 2 and each.shape[0] == tokens else each


def _double(each: Tensor) -> Tensor:
    return each.double()


def _normal(device: str, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.bfloat16, device=device, generator=generator)


if __name__ == "__main__":
    main()
