"""Step caches: reuse what the transformer's blocks added in an earlier step.

They pay from about 12 steps on, and cost one transfer from the device per step (the decision is
made on the host); with the 4 to 8 steps of a distilled model leave them off. A model uses one as

    hidden_states = run_cached(cache, moment, blocks)

where `blocks` maps the tokens entering the first block to those leaving the last. Conditional and
unconditional passes, and each context window, are separate branches: nothing passes between them.

A cache holds one tensor of tokens per branch (EasyCache two), and belongs to one run.

Shapes: B batch, L tokens, D model width.
Source: rookiestar28/ComfyUI-WanVideoWrapper: cache_methods/, wanvideo/modules/model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xicon_infer.sampling.cache_tables import MAGCACHE_RATIOS, TEACACHE_POLYNOMIALS


@dataclass(frozen=True)
class Moment:
    """One pass of the model, at the entrance of its blocks.

    step, num_steps: of this run. branch: names the pass, for example ("cond", window index).
    hidden_states: [B, L, D]. time_embedding: [B, D]; time_projection: [B, 6, D].
    """

    step: int
    num_steps: int
    branch: Hashable
    hidden_states: Tensor
    time_embedding: Tensor
    time_projection: Tensor


class StepCache(Protocol):
    """Decides whether the blocks run. Each pass calls `residual`, then `store` if they ran."""

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns what to add to the hidden states instead of running the blocks, or None."""

    def store(self, moment: Moment, output: Tensor) -> None:
        """Keeps what the blocks made, [B, L, D], of the moment that `residual` was asked about."""


def run_cached(
    cache: StepCache | None, moment: Moment, blocks: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the tokens after the blocks, [B, L, D]: computed, or the input plus a residual.

    Args:
        cache: None always computes.
        moment: this pass.
        blocks: the blocks; must not change their input.
    """
    residual = None if cache is None else cache.residual(moment)
    if residual is not None:
        return moment.hidden_states + residual
    output = blocks(moment.hidden_states)
    if cache is not None:
        cache.store(moment, output)
    return output


@dataclass(frozen=True)
class StepRange:
    """The steps in which a cache works: start to end, both included; end -1 is the last step."""

    start: int
    end: int = -1

    def holds(self, moment: Moment) -> bool:
        """Returns True if the step of this moment is in the range."""
        end = moment.num_steps - 1 if self.end == -1 else self.end
        return self.start <= moment.step <= end


@dataclass
class _TeaState:
    embedding: Tensor
    residual: Tensor
    distance: float = 0.0


class TeaCache:
    """Skips while the time embedding has moved little since the last computed step.

    Args:
        threshold: sum of distances that forces a computation; 0.15 to 0.3 for 14B models, 0.05
            to 0.08 for 1.3B; about a tenth of that without a polynomial.
        variant: key of `TEACACHE_POLYNOMIALS` whose polynomial maps a distance to a change of the
            output, or None for the plain distance of the time projection.
        mode: "e" compares the time embedding, "e0" its projection; used with a variant.
        steps: where it works.

    Source: ali-vilab/TeaCache: TeaCache4Wan2.1, as in the wrapper: distances are measured from
    the last computed step (the original: from the last step).
    """

    def __init__(
        self,
        threshold: float = 0.3,
        *,
        variant: str | None = "14B",
        mode: str = "e",
        steps: StepRange = StepRange(1),
    ) -> None:
        self.threshold = threshold
        self.steps = steps
        self._embedding = "e" if variant is not None and mode == "e" else "e0"
        self._polynomial = (1.0, 0.0) if variant is None else TEACACHE_POLYNOMIALS[variant][mode]
        self._states: dict[Hashable, _TeaState] = {}

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns the kept residual while the accumulated distance is below the threshold."""
        state = self._states.get(moment.branch)
        if state is None or not self.steps.holds(moment):
            return None
        change = _relative_change(self._compared(moment), state.embedding)
        state.distance += _polynomial_value(self._polynomial, change)
        return state.residual if state.distance < self.threshold else None

    def store(self, moment: Moment, output: Tensor) -> None:
        """Starts a new distance at this moment."""
        if self.steps.holds(moment):
            residual = output - moment.hidden_states
            self._states[moment.branch] = _TeaState(self._compared(moment).clone(), residual)

    def _compared(self, moment: Moment) -> Tensor:
        return moment.time_embedding if self._embedding == "e" else moment.time_projection


@dataclass
class _MagState:
    residual: Tensor
    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0


class MagCache:
    """Skips while the residual's size, known from a calibration, has changed little.

    Args:
        threshold: accumulated error that forces a computation.
        variant: key of `MAGCACHE_RATIOS`.
        max_skips: most steps skipped in a row.
        steps: where it works.

    Source: Zehong-Ma/MagCache, as in the wrapper, which reads the first half of the ratios.
    """

    def __init__(
        self,
        threshold: float = 0.02,
        *,
        variant: str = "14B",
        max_skips: int = 4,
        steps: StepRange = StepRange(1),
    ) -> None:
        self.threshold = threshold
        self.max_skips = max_skips
        self.steps = steps
        self._ratios = MAGCACHE_RATIOS[variant]
        self._states: dict[Hashable, _MagState] = {}

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns the kept residual while the calibrated error is at most the threshold."""
        state = self._states.get(moment.branch)
        if state is None or not self.steps.holds(moment):
            return None
        state.ratio *= self._ratios[int(moment.step * (len(self._ratios) // 2 / moment.num_steps))]
        state.error += abs(1 - state.ratio)
        state.skipped += 1
        fits = state.error <= self.threshold and state.skipped <= self.max_skips
        return state.residual if fits else None

    def store(self, moment: Moment, output: Tensor) -> None:
        """Starts a new count at this moment."""
        if self.steps.holds(moment):
            self._states[moment.branch] = _MagState(output - moment.hidden_states)


@dataclass
class _EasyState:
    computed_input: Tensor
    residual: Tensor
    output_size: Tensor


class EasyCache:
    """Skips while the input has moved little, compared with the size of the last output.

    Args:
        threshold: relative change that forces a computation.
        steps: where it works.

    Source: H-EmbodVis/EasyCache, as in the wrapper, where the change is not summed over skipped
    steps and is not scaled by the measured rate of change.
    """

    def __init__(
        self,
        threshold: float = 0.015,
        *,
        steps: StepRange = StepRange(10),
    ) -> None:
        self.threshold = threshold
        self.steps = steps
        self._states: dict[Hashable, _EasyState] = {}

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns the kept residual while the relative change is below the threshold."""
        state = self._states.get(moment.branch)
        if state is None or not self.steps.holds(moment):
            return None
        moved = (moment.hidden_states - state.computed_input).abs().mean()
        if float(moved / state.output_size) >= self.threshold:
            return None
        state.output_size = (moment.hidden_states + state.residual).abs().mean()
        return state.residual

    def store(self, moment: Moment, output: Tensor) -> None:
        """Keeps the input, the residual and the mean size of the output of this moment."""
        if self.steps.holds(moment):
            before = moment.hidden_states.clone()
            size = output.abs().mean()
            self._states[moment.branch] = _EasyState(before, output - before, size)


def _relative_change(now: Tensor, before: Tensor) -> float:
    """Returns mean |now - before| / mean |before|."""
    return float((now - before).abs().mean() / before.abs().mean())


def _polynomial_value(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
