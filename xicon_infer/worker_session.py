"""The networks of the worker: kept between jobs, and looked at before every pass of one.

Between two reports of a recipe there may be many passes: one per context window and branch of a
step, one per tile of the VAE. Before each of them the job may be stopped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipelines import Pipeline
from xicon_infer.job import Job
from xicon_infer.runtime import Recorder
from xicon_infer.service_session import Session


class WatchedSession(Session):
    """A session whose networks call `check` before each pass.

    check: may raise to stop the job; set before each job. loaded: pipeline and preset of the last
    job, empty before the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.check: Callable[[], None] = _nothing
        self.loaded: tuple[str, ...] = ()
        self._watched: weakref.ReferenceType[Pipeline] | None = None

    def pipeline(
        self,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
        recorder: Recorder,
        shape: tuple[int, int, int],
    ) -> Pipeline:
        """Returns the pipeline of a job, loaded and watched; see `Session.pipeline`."""
        self.check()
        self.loaded = ()
        pipeline = super().pipeline(job, device, dtype, recorder, shape)
        self.loaded = (job.pipeline, job.preset)
        if self._watched is None or self._watched() is not pipeline:
            self._watch(pipeline.components)
            self._watched = weakref.ref(pipeline)
        return pipeline

    def _watch(self, components: Any) -> None:
        vae = components.vae
        passes: tuple[nn.Module | None, ...] = (
            components.text_encoder,
            components.image_encoder,
            vae.encoder,
            vae.decoder,
        )
        for module in passes:
            if module is not None:
                module.register_forward_pre_hook(lambda *_: self.check())
        components.when_here(
            lambda: components.transformer.register_forward_pre_hook(lambda *_: self.check())
        )


def _nothing() -> None:
    """Lets every pass go on, between jobs."""
