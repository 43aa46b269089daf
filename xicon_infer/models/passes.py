"""What a forward pass of a transformer is given by the loop that calls it.

Shape letters: B batch, L predicted tokens, D model width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from xicon_infer.models.wan_layers import CrossContext


class TimeEmbedding(NamedTuple):
    """The time embedding [B, D] and its projection [B, 6, D], at least float32."""

    embedding: Tensor
    projection: Tensor

    def row(self, index: int) -> TimeEmbedding:
        """Returns one row as a batch of 1; where rows are steps, the one of a step."""
        span = slice(index, index + 1)
        return TimeEmbedding(self.embedding[span], self.projection[span])


class Reuse(Protocol):
    """Decides whether the blocks run in a pass; see `xicon_infer.sampling.step_cache`."""

    def recall(self, entering: Tensor) -> Tensor | None:
        """Returns what the blocks would make of the kept tokens [B, L, D], or None: run them."""

    def keep(self, entering: Tensor, leaving: Tensor) -> None:
        """Takes what the blocks made of the kept tokens, [B, L, D] both."""


def stack_contexts(first: list[CrossContext], second: list[CrossContext]) -> list[CrossContext]:
    """Returns the contexts of two batches as that of one, [B1 + B2, S, heads, head_dim] each."""

    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat((a, b))

    return [
        CrossContext(
            torch.cat((a.k, b.k)),
            torch.cat((a.v, b.v)),
            joined(a.k_image, b.k_image),
            joined(a.v_image, b.v_image),
        )
        for a, b in zip(first, second, strict=True)
    ]


def split_context(context: list[CrossContext], texts: int) -> list[list[CrossContext]]:
    """Returns the context of each text of a batch, beside the same pictures, as views.

    Args:
        context: of that many texts, with the keys and values of pictures of batch 1 or none: made
            once for all texts.
        texts: N.
    """
    rows = [slice(index, index + 1) for index in range(texts)]
    return [
        [CrossContext(part.k[row], part.v[row], part.k_image, part.v_image) for part in context]
        for row in rows
    ]
