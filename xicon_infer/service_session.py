"""What stays loaded between jobs: one pipeline, with everything its encoders have made so far.

A worker keeps one for its whole life, a batch of references for its length. Another pipeline or
another set of weights takes the place of the last one, which is let go first: two 14B models do
not fit anywhere. Other LoRAs are put on without loading the model again where that can be done
exactly.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from pipelines import Pipeline, build_pipeline
from pipelines.components import Components
from pipelines.encode import encode_text
from pipelines.loading import LoadOptions, set_loras
from pipelines.memory_plan import POSE_ROOM, MemoryPlan
from pipelines.plan import driving_frames, memory_on
from pipelines.plan_shapes import sizes_of
from xicon_infer.ahead import Later
from xicon_infer.errors import OutOfMemory, XiconError
from xicon_infer.job import Job, resolve_frames
from xicon_infer.ops.lora_undo import is_swappable
from xicon_infer.runtime import Recorder, cache_dir
from xicon_infer.service_options import load_options
from xicon_infer.service_pose_models import KeptModels
from xicon_infer.types import SilentProgress, UInt8Array

_LOG = logging.getLogger(__name__)


class Session:
    """The pipeline of the last job, used again where the next one needs the same.

    pose_models: the pose networks of the last job that looked at a video.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._loras: tuple[Any, ...] = ()
        self._pipeline: Pipeline | None = None
        self._begun: Later[Pipeline] | None = None
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
        self._take_begun(recorder)
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
        parts.waiting = lambda: recorder.stage("load transformer")
        parts.follow(plan)
        parts.fixed_vae_chunk = None if job.vae_chunk == "auto" else job.vae_chunk
        parts.cudnn_search = job.cudnn_benchmark
        if job.cudnn_benchmark and device.type != "cuda":
            recorder.warn("'cudnn_benchmark' has no effect on the CPU")
        parts.vae.kernels = "auto" if job.kernels == "compile" else job.kernels
        parts.facts["vae_kernels"] = parts.vae.why_not_fused(device) or "triton"
        parts.facts["memory"] = _told(plan)
        parts.when_here(lambda: _tune(parts, job, recorder))
        return pipeline

    def begin(
        self,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
        recorder: Recorder,
        shape: tuple[int, int, int],
    ) -> None:
        """Starts what needs no motion, while the motion is looked for: loading, and the prompt.

        `pipeline` takes what was begun, or loads again if another memory plan asks for it. What
        goes wrong meanwhile is raised at the next step that the recorder is told of.

        Args:
            job: what is to be made; the others as for `pipeline`, the shape as it is expected.
            device: where it runs.
            dtype: its precision.
            recorder: told of nothing here.
            shape: (width, height, frames).
        """
        try:
            plan = memory_plan(job, device, shape, recorder, reserve=POSE_ROOM)
        except OutOfMemory:  # beside the pose networks; alone it may fit
            return
        options = load_options(job, device, dtype, plan)
        kept = self._kept(job, options)
        if kept is None:
            self.close()
            self._key, self._loras = _key(job, options), (options.loras, options.lora_mode)
        prompts = [job.prompt] + [job.negative_prompt] * job.guided

        def work(look: Callable[[], None]) -> Pipeline:
            made = kept or build_pipeline(job.pipeline, job.preset, options)
            look()
            if made.components.resident:  # else the encoder would have to share the device
                with torch.inference_mode():
                    encode_text(made.components, prompts, SilentProgress())
            return made

        self._begun = Later(work)
        recorder.check = self._begun.check

    def settle(self) -> None:
        """Stops what a job left behind that ended before it needed it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.stop()
            if self._pipeline is None and not begun.failed:
                begun.result().components.stop_reading()
        if self._pipeline is not None and not self._pipeline.components.complete:
            self._pipeline.components.stop_reading()
            self.close()

    def _take_begun(self, recorder: Recorder) -> None:
        """Takes the pipeline that `begin` started to load, when it is there."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        recorder.check = _nothing
        if self._pipeline is not None:  # the prompt alone
            begun.result()
            return
        with recorder.stage("load models"):
            self._pipeline = begun.result()

    def close(self) -> None:
        """Lets the pipeline go, and its memory."""
        self._key, self._loras, self._pipeline = None, (), None
        _free_memory()

    def _kept(self, job: Job, options: LoadOptions) -> Pipeline | None:
        """Returns the loaded pipeline with the LoRAs of the options, or None if it is another."""
        kept = self._pipeline
        if kept is None or self._key != _key(job, options) or not kept.components.usable:
            return None
        if self._loras != (options.loras, options.lora_mode):
            if not is_swappable(kept.components.transformer):
                _LOG.info("the LoRAs are merged and cannot be taken off: the model is loaded again")
                return None
            self._loras = ()  # if putting them on fails, the next job does it again
            set_loras(kept.components, options)
        return kept


def expected_shape(job: Job, reference: UInt8Array) -> tuple[int, int, int] | None:
    """Returns (width, height, frames) of a job whose motion is not found yet; None if unknown.

    Args:
        job: with a driving video.
        reference: uint8 [H, W, 3], at the size of the result.
    """
    try:
        frames, _ = resolve_frames(driving_frames(job)[0], job.num_frames)
    except XiconError:  # told where the video is read
        return None
    return reference.shape[1], reference.shape[0], frames


def _tune(parts: Components[Any], job: Job, recorder: Recorder) -> None:
    """Has the transformer work as the job asks, and tells what loading did."""
    transformer = parts.transformer
    transformer.attention_request = job.attention
    transformer.attention_folder = cache_dir() / "attention"
    transformer.attention_choices.clear()
    transformer.kernels_request = job.kernels
    for note in parts.notes:
        recorder.warn(note)


def _nothing() -> None:
    """Finds nothing wrong."""


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_plan(
    job: Job,
    device: torch.device,
    shape: tuple[int, int, int],
    recorder: Recorder,
    *,
    reserve: int = 0,
) -> MemoryPlan | None:
    """Returns where the networks of a job lie on its device; None on the CPU, which has no other.

    `reserve` bytes are left to others.

    Raises:
        InvalidRequest: options contradict each other. OutOfMemory: nothing fits.
    """
    if device.type != "cuda":
        if job.memory != "auto" or job.blocks_to_swap != "auto":
            recorder.warn("'memory' and 'blocks_to_swap' have no effect on the CPU")
        return None
    # Between jobs PyTorch holds nothing but the weights, which the plan counts, and its cache.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return memory_on(job, sizes_of(job, *shape), free_bytes=max(0, free - reserve))


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
        options.fuse_qkv,
        options.decoder,
        options.search_dirs,
    )


def _told(plan: MemoryPlan | None) -> dict[str, Any]:
    """Returns the plan as the report has it."""
    if plan is None:
        return {"mode": "resident"}
    return {
        "mode": plan.mode,
        "blocks_to_swap": plan.blocks_to_swap,
        "keep_transformer": plan.keep_transformer,
        "stream_encoder": plan.stream_encoder,
        "vae_chunk": plan.vae_chunk,
        "tile": plan.tile,
        "predicted_peak_bytes": dict(plan.peak_bytes),
        "why": list(plan.why),
    }
