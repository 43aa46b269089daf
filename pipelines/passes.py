"""What the forward passes of one sampling run share: the time embeddings, and the step cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.frames import tell_windows
from pipelines.plan_windows import cache_works
from xicon_infer.models.passes import Reuse, TimeEmbedding
from xicon_infer.models.wan import WanTransformer
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.schedule import Schedule
from xicon_infer.sampling.step_cache import StepCaching, make_caching
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import Progress


@dataclass(frozen=True)
class Passes:
    """The passes of one run.

    times: the embedding of every step; None embeds the timestep in each pass. caching: None
    computes every step. on_window: told (windows done, windows) after each window of a step.
    """

    times: TimeEmbedding | None = None
    caching: StepCaching | None = None
    on_window: Callable[[int, int], None] | None = None

    def time(self, step: int, timestep: Tensor) -> Tensor | TimeEmbedding:
        """Returns the embedding of a step where it is there, else the timestep itself."""
        return timestep if self.times is None else self.times.row(step)

    def reuse(
        self,
        step: int,
        branch: Hashable,
        window: list[int] | slice | None,
        layout: Hashable = None,
    ) -> Reuse | None:
        """Returns what lets the model skip its blocks in a pass, None if it never may.

        Args:
            step: index in the run.
            branch: names the conditioning, or all those of the pass.
            window: latent frames of the pass.
            layout: which tokens stand beside those of the noise.
        """
        if self.caching is None:
            return None
        if isinstance(window, slice):
            window = [window.start or 0, window.stop or -1]
        return self.caching.at(step, (branch, tuple(window or ())), layout)


def begin_passes(
    transformer: WanTransformer,
    schedule: Schedule,
    cache: CacheOptions,
    windows: tuple[ContextOptions, int],
    progress: Progress,
) -> Passes:
    """Returns what the passes of a new run share.

    Args:
        transformer: it embeds the timesteps of all steps in one batch.
        schedule: of the run.
        cache: which steps may be skipped.
        windows: how the video is cut, and its pixel frames.
        progress: told of finished windows.
    """
    timesteps = torch.tensor(schedule.timesteps, dtype=torch.float32)
    times = transformer.embed_time(timesteps.to(transformer.device))
    works = cache_works(cache, *windows)
    caching = make_caching(cache, times.embedding) if works else None
    return Passes(times, caching, tell_windows(progress))


def end_passes(
    passes: Passes, cache: CacheOptions, progress: Progress, facts: dict[str, Any] | None
) -> None:
    """Tells how many passes were skipped.

    Args:
        passes: of the run.
        cache: what was asked for.
        progress: gets a sentence for people.
        facts: of the report, get the numbers; those of an earlier run are taken out.
    """
    if facts is not None:
        facts.pop("step_cache", None)
    done = passes.caching
    if done is None:
        return
    progress.warn(
        f"step cache {cache.method}: {done.skipped} of {done.passes} forward passes were skipped"
    )
    if facts is not None:
        facts["step_cache"] = {
            "method": cache.method,
            "threshold": cache.used_threshold,
            "start": cache.used_start,
            "end": cache.end,
            "variant": cache.variant,
            "passes": done.passes,
            "skipped": done.skipped,
        }
