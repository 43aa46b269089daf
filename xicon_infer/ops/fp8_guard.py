"""Which layers of a transformer must not be rounded to fp8.

Three bits of mantissa with one scale per row cost a layer 2.6 % (root mean square over its
weights, relative), and the errors of many weights of one size average out in its sums. Layers stay
in the compute dtype where that does not hold, or where an error has nothing behind it that evens it
out:

- everything outside the blocks, and the first and the last block;
- a layer whose relative error exceeds `MAX_ERROR`: its weights lie where e4m3 is coarse, just above
  powers of two or below the range of their scale;
- a layer in which more than `MAX_OUTLIER_ROWS` of the rows have a weight above `OUTLIER` times the
  root mean square of their row. Such a weight carries over a fifth of the energy of a row of 5120
  weights, and its rounding error averages out with nothing.

Measured on normal weights [512, 5120]: error 0.026, largest weight of a row 5 times its root mean
square.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, dequantize, quantize_weight

MAX_ERROR = 0.04
OUTLIER = 32.0
MAX_OUTLIER_ROWS = 0.01

_BLOCK_WEIGHT = re.compile(r"blocks\.(\d+)\..+\.weight")


def place_reason(name: str, num_blocks: int) -> str:
    """Returns why a weight must stay wide because of where it is, or "".

    Args:
        name: of a weight of a linear layer, original Wan name.
        num_blocks: of the transformer.
    """
    found = _BLOCK_WEIGHT.fullmatch(name)
    if found is None:
        return "outside the blocks"
    index = int(found[1])
    if index == 0:
        return "in the first block"
    return "in the last block" if index == num_blocks - 1 else ""


def guarded_quantize(weight: Tensor, *, name: str) -> tuple[Tensor, Tensor, str]:
    """Returns a weight as e4m3 with one scale per row, and why it should stay wide, or "".

    Args:
        weight: [N, K] float32.
        name: of the weight, for messages.

    Returns:
        Weight [N, K] e4m3, scale float32 [N, 1], reason.

    Raises:
        WeightsError: the weight holds NaN or infinity.
    """
    if not bool(weight.isfinite().all()):
        raise WeightsError(f"{name}: the weight holds NaN or infinity; its file is damaged")
    fp8, scale = quantize_weight(weight, FP8_DTYPES[0], per_row=True)
    return fp8, scale, _value_reason(weight, fp8, scale)


def requantization_error(weight: Tensor, fp8: Tensor, scale: Tensor) -> float:
    """Returns the relative error of a quantised weight: |W8 s - W| / |W|, 0 for a zero weight."""
    norm = weight.norm().item()
    difference = dequantize(fp8, scale, weight.dtype).sub_(weight)
    return difference.norm().item() / norm if norm else 0.0


def outlier_rows(weight: Tensor) -> float:
    """Returns the share of rows with a weight above `OUTLIER` times their root mean square."""
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1)
    typical = torch.linalg.vector_norm(weight, dim=1) / weight.shape[1] ** 0.5
    return (largest > OUTLIER * typical).double().mean().item()


def _value_reason(weight: Tensor, fp8: Tensor, scale: Tensor) -> str:
    error = requantization_error(weight, fp8, scale)
    if error > MAX_ERROR:
        return f"rounding to fp8 costs {error:.3f} relative, allowed {MAX_ERROR}"
    share = outlier_rows(weight)
    if share > MAX_OUTLIER_ROWS:
        return (
            f"{share:.1%} of its rows have a weight above {OUTLIER:g} times their root mean "
            f"square, allowed {MAX_OUTLIER_ROWS:.0%}"
        )
    return ""
