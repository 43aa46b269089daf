"""The stages of a sampling job: their work, weights and tensors. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.plan_shapes import Sizes
from pipelines.plan_steps import cache_of, context_of, guidance_of, most_branches
from pipelines.plan_types import StagePlan, StepPlan
from pipelines.plan_windows import cached_tokens
from xicon_infer import formulas, formulas_vae
from xicon_infer.job import Job
from xicon_infer.job_fields_machine import ATTENTION_POLICIES
from xicon_infer.types import latent_frames

LORA_RANK = 64
"""Of a LoRA whose file is not read for a plan."""

# The sequence length up to which both branches of the guidance share a forward pass; the same
# number as in the recipes, which import PyTorch. A test compares them.
BATCHED_TOKENS = 8192

ENCODE_STAGES = {
    "scail": "encode reference and pose",
    "steady_dancer": "encode reference and pose",
    "wan_i2v": "encode start image",
}
"""Pipeline -> the stage in which the VAE encodes; none for text alone."""


def sampling_stages(job: Job, sizes: Sizes, steps: Sequence[StepPlan]) -> tuple[StagePlan, ...]:
    """Returns the stages from the encoders to the decoded video."""
    element, branches = sizes.element_bytes, 2 if job.guided else 1
    encoders: list[StagePlan] = []
    if job.preset != "tiny":  # its encoders are below a megabyte
        # float16 is not used outside the transformer: UMT5 overflows in it.
        text = branches * formulas.umt5_flops(formulas.TEXT_TOKENS)
        encoders.append(StagePlan("encode text", text, formulas.UMT5_PARAMETERS * element, 0))
        if pictures := _pictures(job):
            work = pictures * formulas.clip_flops()
            size = formulas.CLIP_PARAMETERS * element
            encoders.append(StagePlan("encode image", work, size, 0))
    return (*encoders, *_encode_stage(job, sizes), _sample(job, sizes, steps), _decode(job, sizes))


def decoder_notes(job: Job) -> tuple[str, ...]:
    """Returns what the stages of the VAE do not count."""
    notes = []
    if job.decoder == "tiny":
        notes.append("decode video counts the VAE, not decoder tiny")
    if job.vae_chunk != "auto":
        notes.append("the stages do not count 'vae_chunk'; the plan for a card (--gpu) does")
    return tuple(notes)


def device_notes(job: Job) -> tuple[str, ...]:
    """Returns which choices nobody looked at: a plan imports no PyTorch and asks no device."""
    chosen = [
        f"{field} {value!r}"
        for field, value, anywhere in (
            ("attention", job.attention, {*ATTENTION_POLICIES, "math"}),
            ("kernels", job.kernels, {"auto", "eager"}),
        )
        if value not in anywhere
    ]
    if not chosen:
        return ()
    return (
        f"whether {' and '.join(chosen)} can run is seen when the job starts; "
        "`xicon-infer doctor` lists what runs here",
    )


def batched(job: Job, sizes: Sizes) -> bool:
    """Returns whether the guidance branches of a job share one forward pass.

    EasyCache decides for each branch alone.
    """
    if job.step_cache == "easycache":
        return False
    tokens = latent_frames(sizes.num_frames) * sizes.frame_tokens
    together = {"batched": True, "sequential": False, "auto": tokens <= BATCHED_TOKENS}
    return most_branches(job) > 1 and together[job.guidance_batching]


def batch_of(job: Job, sizes: Sizes) -> int:
    """Returns the samples in one forward pass: the branches of the guidance that share it."""
    return most_branches(job) if batched(job, sizes) else 1


def kept_tokens(job: Job, sizes: Sizes) -> int:
    """Returns the tokens that a step cache keeps, of all branches and windows."""
    frames, hw = sizes.num_frames, sizes.frame_tokens
    return most_branches(job) * cached_tokens(cache_of(job), context_of(job), frames, hw)


def _pictures(job: Job) -> int:
    """Returns how many pictures CLIP looks at."""
    if job.pipeline == "steady_dancer":
        return 1 + job.pose_clip
    if job.pipeline == "wan_i2v":
        return 1 + (job.end_image is not None)
    return 1 if job.pipeline == "scail" else 0


def _encode_stage(job: Job, sizes: Sizes) -> tuple[StagePlan, ...]:
    if job.pipeline not in ENCODE_STAGES:
        return ()
    vae, videos = sizes.vae, _encoded(job, sizes)
    flops = sum(formulas_vae.encode_flops(*size, count, vae) for size, count in videos)
    work = max(
        formulas_vae.encode_bytes(*size, count, vae, sizes.element_bytes) for size, count in videos
    )
    return (StagePlan(ENCODE_STAGES[job.pipeline], flops, _vae_bytes(sizes), work),)


def _encoded(job: Job, sizes: Sizes) -> list[tuple[tuple[int, int], int]]:
    """Returns the size (W, H) and the frames of every video that is encoded.

    A start image is a video of grey; its latents repeat themselves after a while.
    """
    size, frames = (sizes.width, sizes.height), sizes.num_frames
    if job.pipeline == "scail":
        return [(size, 1), ((sizes.width // 2, sizes.height // 2), frames)]
    repeats = formulas_vae.GREY_FRAMES if job.end_image is None else frames
    start = (size, min(frames, repeats))
    if job.pipeline == "wan_i2v":
        return [start]
    negative = guidance_of(job).needs_negative_pose(job.num_inference_steps)
    return [start, *[(size, frames)] * (1 + negative)]


def _sample(job: Job, sizes: Sizes, steps: Sequence[StepPlan]) -> StagePlan:
    element, branches = sizes.element_bytes, 2 if job.guided else 1
    weights = formulas.weight_bytes(sizes.dit, sizes.matrix_bytes, element)
    if job.lora_mode != "merge":
        weights += len(job.loras) * formulas.lora_bytes(sizes.dit, LORA_RANK, element)
    flops = sum(step.flops for step in steps) + formulas.cross_kv_flops(sizes.dit, branches)
    work = formulas.sampling_bytes(
        sizes.dit,
        max(step.tokens for step in steps),
        element_bytes=element,
        branches=branches,
        batch=batch_of(job, sizes),
    )
    work += kept_tokens(job, sizes) * sizes.dit.dim * element
    return StagePlan("sample", flops, weights, work)


def _decode(job: Job, sizes: Sizes) -> StagePlan:
    width, height, frames, vae = sizes.width, sizes.height, sizes.num_frames, sizes.vae
    tiles = [(width, height)]
    if job.tile:
        columns = formulas_vae.tile_spans(width, job.tile_width, job.tile_stride_width)
        rows = formulas_vae.tile_spans(height, job.tile_height, job.tile_stride_height)
        tiles = [(x1 - x0, y1 - y0) for y0, y1 in rows for x0, x1 in columns]
    flops = sum(formulas_vae.decode_flops(w, h, frames, vae) for w, h in tiles)
    work = max(formulas_vae.decode_bytes(w, h, frames, vae, sizes.element_bytes) for w, h in tiles)
    return StagePlan("decode video", flops, _vae_bytes(sizes), work)


def _vae_bytes(sizes: Sizes) -> int:
    return formulas_vae.parameters(sizes.vae) * sizes.element_bytes
