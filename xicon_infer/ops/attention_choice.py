"""Which attention kernels a forward pass uses, and how that was decided.

Self-attention over all tokens and cross-attention to a few hundred may use different kernels. Of
PyTorch's own, one pass can use a single one: they are selected by a context around the pass. On a
GPU "auto" times the kernels that run at the job's own lengths (`attention_race`) and takes the
pair with the least time; "auto8" lets 8-bit kernels take part, for self-attention only, because
cross-attention is 1 % of the work. "ordered" times nothing.

Differences of less than 2 % do not count, the order decides: a measurement has that much noise,
and another kernel rounds otherwise, so that the same seed would give another last digit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xicon_infer.ops.attention import (
    EIGHT_BIT,
    POLICIES,
    PYTORCH,
    Backend,
    choose_backend,
    order_for,
    problem_of,
)
from xicon_infer.ops.attention_race import Race, Shape, race_key, race_on_device, remembered

TIE = 1.02
"""Times the least; of all pairs within, the first in the order is taken."""

_LOG = logging.getLogger(__name__)

Racer = Callable[[Shape, tuple[Backend, ...]], Race]
"""Times some kernels at a shape."""


class Pair(NamedTuple):
    """The kernels of one forward pass."""

    self_attn: Backend
    cross: Backend


class Work(NamedTuple):
    """What the attention of one pass works on.

    own: self-attention. cross: each cross-attention of a block.
    """

    own: Shape
    cross: tuple[Shape, ...]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """The kernels of a pass. how: "asked", "ordered" or "timed". tokens: of the pass.

    own, cross: what was measured, for all cross-attentions of a block together; empty where
    nothing was.
    """

    kernels: Pair
    how: Literal["asked", "ordered", "timed"]
    tokens: int
    own: Race = field(default_factory=Race)
    cross: Race = field(default_factory=Race)

    def told(self) -> dict[str, Any]:
        """Returns the choice as the report beside a video has it; milliseconds."""
        told: dict[str, Any] = {
            "tokens": self.tokens,
            "self": self.kernels.self_attn,
            "cross": self.kernels.cross,
            "chosen": self.how,
        }
        for name, result in (("self", self.own), ("cross", self.cross)):
            if result.seconds:
                told[f"{name}_ms"] = {n: round(1e3 * s, 4) for n, s in result.seconds.items()}
            if result.dropped:
                told[f"{name}_left_out"] = dict(result.dropped)
        return told


def work_of(tokens: Tensor, heads: int, keys: Sequence[Tensor]) -> Work:
    """Returns the work of a block over tokens.

    Args:
        tokens: [B, L, D].
        heads: of every attention.
        keys: of each cross-attention [B, S, heads, head_dim].
    """
    batch, length, width = tokens.shape
    own = Shape(batch, length, length, heads, width // heads)
    cross = tuple(own._replace(keys=part.shape[1]) for part in keys)
    return Work(own, cross, tokens.device, tokens.dtype)


_CHOICES: dict[tuple[object, ...], Choice] = {}


def choose_attention(
    requested: str, work: Work, folder: Path | None = None, *, racer: Racer | None = None
) -> Choice:
    """Returns the kernels of a pass, chosen once per process and bucket of lengths.

    Args:
        requested: a kernel or a policy, see `xicon_infer.ops.attention`.
        work: the shapes of the pass.
        folder: where timings are kept from one process to the next, None for nowhere.
        racer: times kernels; default: on this GPU. Without a GPU nothing is timed.

    Raises:
        BackendUnavailable: the kernel does not run here, is not exact enough, or none does.
    """
    if work.device.type == "meta":
        return Choice(Pair("math", "math"), "asked", work.own.queries)
    shapes = tuple(shape.bucket() for shape in (work.own, *work.cross))
    key = (requested, shapes, work.device, work.dtype, folder, racer)
    if key not in _CHOICES:
        _CHOICES[key] = _told(_choose(requested, work, folder, racer))
    return replace(_CHOICES[key], tokens=work.own.queries)


def _choose(requested: str, work: Work, folder: Path | None, racer: Racer | None) -> Choice:
    dtype, width, tokens = work.dtype, work.own.head_dim, work.own.queries
    first = choose_backend(requested, work.device, dtype, width)
    if requested not in POLICIES:
        return Choice(_with_partner(first, work), "asked", tokens)
    if racer is None and work.device.type == "cuda":
        racer = _racer_of(work, folder)
    if requested == "ordered" or racer is None:
        return Choice(Pair(first, first), "ordered", tokens)
    names = candidates(requested, work)
    if len(names) < 2:
        return Choice(Pair(first, first), "ordered", tokens)
    own = racer(work.own, names)
    exact = tuple(name for name in names if name not in EIGHT_BIT)
    cross = added([racer(shape, exact) for shape in work.cross])
    found = fastest(names, own, cross) if work.cross else fastest(names, own, own)
    if found is None:
        return Choice(Pair(first, first), "ordered", tokens, own, cross)
    return Choice(found, "timed", tokens, own, cross)


def candidates(requested: str, work: Work) -> tuple[Backend, ...]:
    """Returns the kernels that take part in a race, in the order of the device.

    Not "math", which holds all scores of a head at once, nor "sdpa", which is one of the others.
    """
    names = (*order_for(work.device), *(EIGHT_BIT if requested == "auto8" else ()))
    return tuple(
        name
        for name in names
        if name not in ("math", "sdpa")
        and not problem_of(name, work.device, work.dtype, work.own.head_dim)
    )


def added(races: Sequence[Race]) -> Race:
    """Returns the times of several calls together; a kernel must have run all of them."""
    started = races[0].seconds if races else {}
    common = [name for name in started if all(name in race.seconds for race in races)]
    seconds = {name: sum(race.seconds[name] for race in races) for name in common}
    dropped = {name: reason for race in races for name, reason in race.dropped.items()}
    return Race(dict(sorted(seconds.items(), key=lambda pair: pair[1])), dropped)


def fastest(names: Sequence[Backend], own: Race, cross: Race) -> Pair | None:
    """Returns the pair with the least time, None if there is none that ran.

    Args:
        names: in the order that decides ties.
        own: times of self-attention.
        cross: times of cross-attention.
    """
    totals = {
        Pair(mine, other): own.seconds[mine] + cross.seconds[other]
        for mine in names
        for other in names
        if mine in own.seconds and other in cross.seconds and fit(mine, other)
    }
    if not totals:
        return None
    limit = TIE * min(totals.values())
    return next(pair for pair, seconds in totals.items() if seconds <= limit)


def fit(first: Backend, second: Backend) -> bool:
    """Returns True if one pass can use both kernels: of PyTorch's, only a single one."""
    return first == second or first not in PYTORCH or second not in PYTORCH


def _with_partner(first: Backend, work: Work) -> Pair:
    """Returns the kernel asked for; beside an 8-bit one, cross-attention stays exact."""
    if first not in EIGHT_BIT:
        return Pair(first, first)
    return Pair(first, choose_backend("ordered", work.device, work.dtype, work.own.head_dim))


def _racer_of(work: Work, folder: Path | None) -> Racer:
    def run(shape: Shape, names: tuple[Backend, ...]) -> Race:
        key = race_key(shape, names, work.device, work.dtype)
        measure = lambda: race_on_device(shape, names, work.device, work.dtype)  # noqa: E731
        return remembered(key, folder, measure)

    return run


def _told(choice: Choice) -> Choice:
    _LOG.info("attention kernels: %s", choice.told())
    return choice
