"""One block of the transformer, counted: operations, copies, and tensors of the inner width.

Budgets are what the eager code takes today. Whoever adds an operation sees it here and decides.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.models.vae_cases import Meter
from xicon_infer.models.wan import plain_rope
from xicon_infer.models.wan_layers import Block, CrossContext
from xicon_infer.ops.attention import kernel_context

DIM, HEADS, GRID = 256, 2, (3, 4, 4)
WIDE = 4 * DIM
TOKENS = 3 * 4 * 4
VIEWS = (
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select"),
    *("unsqueeze", "squeeze", "unbind", "alias", "detach", "split", "chunk", "as_strided"),
)
"""Operations that move no data."""


class Wide(Meter):
    """Counts tensors of at least [L, 4 D] that live at once."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        size = TOKENS * WIDE * 2
        made = [nbytes for key, nbytes in self.live.items() if key not in self._given]
        self.most = max(self.most, sum(nbytes >= size for nbytes in made))
        return out


def run(dtype: torch.dtype, keep: slice = slice(None), *, image: bool = True) -> Wide:
    torch.manual_seed(0)
    block = Block(DIM, WIDE, HEADS, 1e-6, with_image=image).to(dtype)
    keys = [torch.randn(1, count, HEADS, DIM // HEADS, dtype=dtype) for count in (8, 8, 5, 5)]
    context = CrossContext(*keys) if image else CrossContext(keys[0], keys[1], None, None)
    x, time = torch.randn(1, TOKENS, DIM, dtype=dtype), torch.randn(1, 6, DIM)
    rope = plain_rope(GRID, DIM // HEADS)
    given = [*block.parameters(), *keys, x, time, *rope]
    with torch.no_grad(), kernel_context("flash"), Wide(given) as meter:
        block(x, time, rope, context, "flash", keep)
    return meter


def counts(meter: Meter) -> tuple[int, Counter[str]]:
    moving = Counter({name: n for name, n in meter.calls.items() if name not in VIEWS})
    return sum(moving.values()), moving


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 84), (torch.bfloat16, 106)])
def test_operations_of_a_block(dtype: torch.dtype, budget: int) -> None:
    total, moving = counts(run(dtype))
    assert total <= budget, moving
    products = moving["addmm"] + moving["linear"]
    assert products == 4 + 2 + 2
    plain, _ = counts(run(dtype, image=False))
    assert plain < total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_the_inner_width(dtype: torch.dtype) -> None:
    """The activation reads one and writes one; float32 copies are of the narrow width."""
    assert run(dtype).most <= 2


def test_kept_tokens_alone_are_queries() -> None:
    whole, part = run(torch.bfloat16), run(torch.bfloat16, slice(0, 16))
    assert part.peak < whole.peak
    assert part.calls["addmm"] == whole.calls["addmm"]
