"""Step caches: reuse what the transformer's blocks added in an earlier step.

They pay from about 12 steps on (`FEWEST_CACHED_STEPS`); in the 4 to 8 steps of a distilled model
neighbouring steps differ too much. TeaCache and MagCache decide before the run starts, from the
time embeddings and from a calibration, and read nothing back from the device. EasyCache looks at
the tokens and therefore waits for the device once per pass.

Conditional and unconditional passes, and each context window, are separate branches: nothing
passes between them. A cache holds one tensor of the predicted tokens per branch (EasyCache two),
and belongs to one run.

Differs from the reference: only tokens that are predicted are kept and, in EasyCache, compared.
Those of a reference or a pose are the same in every step and would dilute the change.

Shapes: B batch, L predicted tokens, D model width, N steps.
Source: rookiestar28/ComfyUI-WanVideoWrapper: cache_methods/, wanvideo/modules/model.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.cache_tables import MAGCACHE_RATIOS, TEACACHE_POLYNOMIALS, Polynomial

PLAIN: Polynomial = (1.0, 0.0)
"""Takes the distance of two embeddings as it is."""


@dataclass(frozen=True)
class Moment:
    """One pass of the model, at the entrance of its blocks.

    step, num_steps: of this run. branch: names the pass, for example ("cond", window).
    hidden_states: [B, L, D].
    """

    step: int
    num_steps: int
    branch: Hashable
    hidden_states: Tensor


class StepCache(Protocol):
    """Decides whether the blocks run. Each pass calls `residual`, then `store` if they ran."""

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns what to add to the hidden states instead of running the blocks, or None."""

    def store(self, moment: Moment, output: Tensor) -> None:
        """Keeps what the blocks made, [B, L, D], of the moment that `residual` was asked about."""

    def forget(self, branch: Hashable) -> None:
        """Lets go what is kept of a branch."""


class StepCaching:
    """A cache at work in one run, and what it has skipped so far.

    Args:
        cache: a new one.
        num_steps: of the run.
    """

    def __init__(self, cache: StepCache, num_steps: int) -> None:
        self.passes = 0
        self.skipped = 0
        self._cache = cache
        self._num_steps = num_steps
        self._layouts: dict[Hashable, Hashable] = {}

    def at(self, step: int, branch: Hashable, layout: Hashable = None) -> CachedPass:
        """Returns what the model asks in one pass.

        Args:
            step: index in this run.
            branch: names conditioning and window.
            layout: which tokens stand beside the predicted ones; where it has changed since the
                last pass of the branch, what was kept of that is forgotten.
        """
        if self._layouts.setdefault(branch, layout) != layout:
            self._cache.forget(branch)
            self._layouts[branch] = layout
        return CachedPass(self, step, branch)

    def recall(self, step: int, branch: Hashable, entering: Tensor) -> Tensor | None:
        """Returns the tokens leaving the blocks if they need not run, and counts the pass."""
        moment = Moment(step, self._num_steps, branch, entering)
        residual = self._cache.residual(moment)
        self.passes += 1
        if residual is None:
            return None
        self.skipped += 1
        return entering + residual

    def keep(self, step: int, branch: Hashable, entering: Tensor, leaving: Tensor) -> None:
        """Keeps what the blocks made of the tokens."""
        self._cache.store(Moment(step, self._num_steps, branch, entering), leaving)


@dataclass(frozen=True)
class CachedPass:
    """One pass with a cache; the model asks it before its blocks and tells it after them."""

    caching: StepCaching
    step: int
    branch: Hashable

    def recall(self, entering: Tensor) -> Tensor | None:
        """Returns the tokens leaving the blocks [B, L, D], or None: run them.

        Args:
            entering: the predicted tokens, [B, L, D]; not changed.
        """
        return self.caching.recall(self.step, self.branch, entering)

    def keep(self, entering: Tensor, leaving: Tensor) -> None:
        """Keeps what the blocks made of the tokens, [B, L, D] both."""
        self.caching.keep(self.step, self.branch, entering, leaving)


def make_caching(options: CacheOptions, time_embeddings: Tensor) -> StepCaching | None:
    """Returns a new cache for one run, None if every step is to be computed.

    Args:
        options: which cache, and where it works.
        time_embeddings: of every step, [N, D].

    Raises:
        InvalidRequest: the run has too few steps.
    """
    steps = len(time_embeddings)
    options.check(steps, "auto")
    span, threshold = StepRange(options.used_start, options.end), options.used_threshold
    makers: dict[str, Any] = {
        "teacache": lambda: TeaCache(
            time_embeddings,
            threshold,
            polynomial=TEACACHE_POLYNOMIALS[options.variant]["e"],
            steps=span,
        ),
        "magcache": lambda: MagCache(threshold, variant=options.variant, steps=span),
        "easycache": lambda: EasyCache(threshold, steps=span),
    }
    return StepCaching(makers[options.method](), steps) if options.active else None


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
    step: int
    residual: Tensor
    distance: float = 0.0


class TeaCache:
    """Skips while the time embedding has moved little since the last computed step.

    Args:
        time_embeddings: of every step [N, W]: the time embedding ("e") or its projection ("e0"),
            as the polynomial wants it. Read from the device once, here.
        threshold: sum of distances that forces a computation; 0.15 to 0.3 for 14B models, 0.05
            to 0.08 for 1.3B; about a tenth of that with `PLAIN`.
        polynomial: maps a distance to a change of the output; of `TEACACHE_POLYNOMIALS`.
        steps: where it works.

    Source: ali-vilab/TeaCache: TeaCache4Wan2.1, as in the wrapper: distances are measured from
    the last computed step (the original: from the last step).
    """

    def __init__(
        self,
        time_embeddings: Tensor,
        threshold: float = 0.3,
        *,
        polynomial: Polynomial = PLAIN,
        steps: StepRange = StepRange(1),
    ) -> None:
        self.threshold = threshold
        self.steps = steps
        self._changes = _relative_changes(time_embeddings)
        self._polynomial = polynomial
        self._states: dict[Hashable, _TeaState] = {}

    def residual(self, moment: Moment) -> Tensor | None:
        """Returns the kept residual while the accumulated distance is below the threshold."""
        state = self._states.get(moment.branch)
        if state is None or not self.steps.holds(moment):
            return None
        change = self._changes[state.step][moment.step]
        state.distance += _polynomial_value(self._polynomial, change)
        return state.residual if state.distance < self.threshold else None

    def store(self, moment: Moment, output: Tensor) -> None:
        """Starts a new distance at this moment."""
        if self.steps.holds(moment):
            residual = output - moment.hidden_states
            self._states[moment.branch] = _TeaState(moment.step, residual)

    def forget(self, branch: Hashable) -> None:
        """Lets go what is kept of a branch."""
        self._states.pop(branch, None)


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

    def forget(self, branch: Hashable) -> None:
        """Lets go what is kept of a branch."""
        self._states.pop(branch, None)


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

    def forget(self, branch: Hashable) -> None:
        """Lets go what is kept of a branch."""
        self._states.pop(branch, None)


def _relative_changes(embeddings: Tensor) -> list[list[float]]:
    """Returns mean |now - before| / mean |before| for all steps as [before][now], on the host."""
    wide = embeddings.flatten(1).float()
    moved = torch.stack([(wide - before).abs().mean(1) for before in wide])
    found: list[list[float]] = (moved / wide.abs().mean(1)[:, None]).tolist()
    return found


def _polynomial_value(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
