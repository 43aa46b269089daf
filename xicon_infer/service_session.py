"""What stays loaded between jobs: one pipeline, with everything its encoders have made so far.

A worker keeps one for its whole life, a batch of references for its length. Another pipeline or
another set of weights takes the place of the last one, which is let go first: two 14B models do
not fit anywhere. Other LoRAs are put on without loading the model again where that can be done
exactly.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch

from pipelines import Pipeline, build_pipeline
from pipelines.loading import LoadOptions, set_loras
from pipelines.memory_plan import MemoryPlan
from pipelines.plan import memory_on
from pipelines.plan_shapes import sizes_of
from xicon_infer.job import Job
from xicon_infer.ops.lora_undo import is_swappable
from xicon_infer.runtime import Recorder
from xicon_infer.service_options import load_options
from xicon_infer.service_pose_models import KeptModels

_LOG = logging.getLogger(__name__)


class Session:
    """The pipeline of the last job, used again where the next one needs the same.

    pose_models: the pose networks of the last job that looked at a video.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._loras: tuple[Any, ...] = ()
        self._pipeline: Pipeline | None = None
        self.pose_models: KeptModels = {}

    def pipeline(
        self,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
        recorder: Recorder,
        shape: tuple[int, int, int],
    ) -> Pipeline:
        """Returns the pipeline of a job, loaded.

        Args:
            job: what is to be made.
            device: where it runs.
            dtype: its precision.
            recorder: told of the stage and of what loading did.
            shape: (width, height, frames) of the result, for the memory plan.

        Raises:
            WeightsError: a file is missing or does not fit; the session is then empty.
            OutOfMemory: no memory plan fits.
        """
        plan = memory_plan(job, device, shape, recorder)
        if self.pose_models and plan is not None and plan.mode != "resident":
            # Where memory is short, the pose networks are not worth theirs.
            self.pose_models.clear()
            _free_memory()
            plan = memory_plan(job, device, shape, recorder)
        options = load_options(job, device, dtype, plan)
        pipeline = self._kept(job, options)
        if pipeline is None:
            self.close()
            with recorder.stage("load models"):
                pipeline = build_pipeline(job.pipeline, job.preset, options)
            self._key, self._pipeline = _key(job, options), pipeline
        self._loras = (options.loras, options.lora_mode)
        parts = pipeline.components
        parts.follow(plan)
        parts.transformer.attention_request = job.attention
        parts.facts["memory"] = _told(plan)
        for note in parts.notes:
            recorder.warn(note)
        return pipeline

    def close(self) -> None:
        """Lets the pipeline go, and its memory."""
        self._key, self._loras, self._pipeline = None, (), None
        _free_memory()

    def _kept(self, job: Job, options: LoadOptions) -> Pipeline | None:
        """Returns the loaded pipeline with the LoRAs of the options, or None if it is another."""
        kept = self._pipeline
        if kept is None or self._key != _key(job, options):
            return None
        if self._loras != (options.loras, options.lora_mode):
            if not is_swappable(kept.components.transformer):
                _LOG.info("the LoRAs are merged and cannot be taken off: the model is loaded again")
                return None
            self._loras = ()  # if putting them on fails, the next job does it again
            set_loras(kept.components, options)
        return kept


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_plan(
    job: Job, device: torch.device, shape: tuple[int, int, int], recorder: Recorder
) -> MemoryPlan | None:
    """Returns where the networks of a job lie on its device; None on the CPU, which has no other.

    Raises:
        InvalidRequest: options contradict each other. OutOfMemory: nothing fits.
    """
    if device.type != "cuda":
        if job.memory != "auto" or job.blocks_to_swap != "auto":
            recorder.warn("'memory' and 'blocks_to_swap' have no effect on the CPU")
        return None
    # Between jobs PyTorch holds nothing but the weights, which the plan counts, and its cache.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return memory_on(job, sizes_of(job, *shape), free_bytes=free)


def _key(job: Job, options: LoadOptions) -> tuple[Any, ...]:
    """Returns what two jobs must have in common to use one loaded model."""
    return (
        job.pipeline,
        job.preset,
        options.transformer,
        options.device,
        options.dtype,
        options.storage,
        options.matmul,
        options.search_dirs,
    )


def _told(plan: MemoryPlan | None) -> dict[str, Any]:
    """Returns the plan as the report has it."""
    if plan is None:
        return {"mode": "resident"}
    return {
        "mode": plan.mode,
        "blocks_to_swap": plan.blocks_to_swap,
        "vae_chunk": plan.vae_chunk,
        "tile": plan.tile,
        "predicted_peak_bytes": dict(plan.peak_bytes),
        "why": list(plan.why),
    }
