"""What stays loaded between jobs: one pipeline, with everything its encoders have made so far.

A worker keeps one for its whole life, a batch of references for its length. Another pipeline or
another set of weights takes the place of the last one, which is let go first: two 14B models do
not fit anywhere.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch

from pipelines import Pipeline, build_pipeline
from xicon_infer.job import Job
from xicon_infer.runtime import Recorder
from xicon_infer.service_options import load_options


class Session:
    """The pipeline of the last job, used again where the next one needs the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._pipeline: Pipeline | None = None

    def pipeline(
        self, job: Job, device: torch.device, dtype: torch.dtype, recorder: Recorder
    ) -> Pipeline:
        """Returns the pipeline of a job, loaded.

        Args:
            job: what is to be made.
            device: where it runs.
            dtype: its precision.
            recorder: told of the stage and of what loading did.

        Raises:
            WeightsError: a file is missing or does not fit; the session is then empty.
        """
        options = load_options(job, device, dtype)
        key = (job.pipeline, job.preset, replace(options, attention="auto"))
        if self._pipeline is None or key != self._key:
            self.close()
            with recorder.stage("load models"):
                self._pipeline = build_pipeline(job.pipeline, job.preset, options)
            self._key = key
        self._pipeline.components.transformer.attention_request = job.attention
        for note in self._pipeline.components.notes:
            recorder.warn(note)
        return self._pipeline

    def close(self) -> None:
        """Lets the pipeline go, and its memory."""
        self._key, self._pipeline = None, None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
