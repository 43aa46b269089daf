"""SCAIL: a reference image and a person's motion become a video of that character moving.

The recipe, one named call a line: fit the reference, draw the pose, fit its length, encode text,
image, reference and pose, make noise, sample, decode. Every stage is a public function, so that a
notebook can stop after any of them.

Numerics follow the authors of SCAIL; speed settings (6 steps, dpm++_sde, cfg 1, pose in the first
half) follow the published ComfyUI graph. Each difference is an option: docs/differences.md.

Source: zai-org/SCAIL: sample_video.py; rookiestar28/ComfyUI-WanVideoWrapper: SCAIL/nodes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipelines.components import Components
from pipelines.encode import encode_picture, encode_text, encode_video
from pipelines.frames import decode_frames
from pipelines.passes import Passes, begin_passes, end_passes
from pipelines.plan_windows import idle_options
from pipelines.pose_frames import PoseOptions, draw_pose
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.job import resolve_frames
from xicon_infer.media.image import resize_frames
from xicon_infer.models.passes import split_context, stack_contexts
from xicon_infer.models.scail import PosePositions, ScailTransformer
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.models.wan import Context
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.denoise import active_at, denoise, fused_windows, guide
from xicon_infer.sampling.noise import freenoise, initial_noise
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import (
    LATENT_CHANNELS,
    Clip,
    Fit,
    Progress,
    SilentProgress,
    Track,
    UInt8Array,
    latent_frames,
)

SIZE_MULTIPLE = 32
"""Width and height: 8 (VAE) x 2 (patch) x 2 (the pose is half as large)."""

BATCHED_TOKENS = 8192
"""Noise tokens up to which both branches of the guidance share one forward pass."""


@dataclass(frozen=True)
class ScailOptions:
    """Every number and choice of one run; the fields of `Job` of the same names.

    width, height: pixels of the result, multiples of 32. num_frames: pixel frames wanted, None
    for as many as the pose has. seed: 0 to 2**64 - 1. Ranges (start, end) are fractions of the
    steps, both ends included. step_cache: which steps may be skipped. tiles: decode in tiles, None
    for whole frames.

    Raises:
        InvalidRequest: the size is no multiple of 32, or the scheduler cannot make the steps.
    """

    prompt: str = "the human starts to dance"
    negative_prompt: str = ""
    width: int = 512
    height: int = 896
    num_frames: int | None = None
    num_inference_steps: int = 6
    guidance_scale: float = 1.0
    shift: float = 5.0
    scheduler: str = "dpm++_sde"
    seed: int = 0
    pose_strength: float = 1.0
    pose_start: float = 0.0
    pose_end: float = 0.5
    ref_strength: float = 1.0
    ref_start: float = 0.0
    ref_end: float = 1.0
    context: ContextOptions = field(default_factory=ContextOptions)
    image_fit: Fit = "crop"
    pose_fit: Fit = "crop"
    clip_preprocess: Literal["stretch", "center"] = "stretch"
    pose_rope_t_offset: Literal[0, 1] = 1
    pose_rope: Literal["pooled", "midpoint"] = "pooled"
    uncond_reference: Literal["keep", "zero"] = "keep"
    pose_render: Literal["full_then_half", "half"] = "full_then_half"
    draw_face: bool = True
    draw_hands: bool = True
    guidance_batching: Literal["auto", "batched", "sequential"] = "auto"
    step_cache: CacheOptions = field(default_factory=CacheOptions)
    tiles: TileOptions | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
                raise InvalidRequest(
                    f"{name!r} must be a positive multiple of {SIZE_MULTIPLE}, got {value}",
                    field=name,
                )
        # Refuses a number of steps that the scheduler cannot make, before anything is loaded.
        make_schedule(self.scheduler, self.num_inference_steps, self.shift)
        self.step_cache.check(self.num_inference_steps, self.guidance_batching)

    @property
    def guided(self) -> bool:
        """Returns True if an unconditional branch runs."""
        return not math.isclose(self.guidance_scale, 1.0)

    @property
    def pose_options(self) -> PoseOptions:
        """Returns how the pose is drawn."""
        return PoseOptions(self.pose_fit, self.pose_render, self.draw_face, self.draw_hands)


class Branch(NamedTuple):
    """One side of the guidance: keys and values of text and image, and the reference tokens."""

    context: Context
    reference: Tensor


@dataclass(frozen=True)
class ScailConditioning:
    """What the transformer is told, in its own terms; computed once per job.

    conditional, unconditional: reference tokens [1, n, D] and context; the second is None
    without guidance. pose: tokens by latent frame [1, T, n / 4, D]. size: (H, W) in latent cells.
    """

    conditional: Branch
    unconditional: Branch | None
    pose: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class ScailOutput:
    """The result and what it was made from, for a contact sheet.

    clip: the video. reference: uint8 [H, W, 3]. pose_frames: uint8 [F, H / 2, W / 2, 3].
    """

    clip: Clip
    reference: UInt8Array
    pose_frames: UInt8Array


class ScailPipeline:
    """Holds the networks; calling it makes a video.

    Args:
        components: as `pipelines.components` loads them.
    """

    def __init__(self, components: Components[ScailTransformer]) -> None:
        self.components = components

    @torch.inference_mode()
    def __call__(
        self,
        image: UInt8Array,
        pose: Clip | list[Track],
        options: ScailOptions,
        progress: Progress | None = None,
    ) -> ScailOutput:
        """Returns a video of the character in `image` moving like `pose`.

        Args:
            image: the reference, uint8 [H, W, 3], any size.
            pose: a rendered pose video of any size, or one track per person.
            options: see `ScailOptions`.
            progress: told of every stage and step.

        Raises:
            InvalidRequest: the options contradict each other.
            PoseError: the motion is empty.
        """
        progress = progress or SilentProgress()
        parts = self.components
        reference = fit_reference(image, options)
        num_frames = choose_num_frames(pose, options, progress)
        with progress.stage("draw pose"):
            pose_frames = draw_pose(
                pose,
                num_frames,
                size=(reference.shape[1], reference.shape[0]),
                options=options.pose_options,
                progress=progress,
                device=parts.device,
            )
        conditioning = encode_conditioning(parts, reference, pose_frames, options, progress)
        with progress.stage("sample"), parts.sampling():
            model = parts.transformer
            latents = sample(model, conditioning, num_frames, options, progress, parts.facts)
        with progress.stage("decode video"), parts.on_device(parts.decoder_part):
            looped = options.context.looped and options.context.active(num_frames)
            del conditioning  # keys and values of a 14B model are 0.6 GB
            frames = decode_frames(
                parts.decoder,
                latents,
                tiles=options.tiles,
                looped=looped,
                progress=progress,
                piece=parts.vae_chunk,
                use=parts.frames_to,
            )
        fps = pose.fps if isinstance(pose, Clip) else pose[0].fps
        return ScailOutput(Clip(frames, fps), reference, pose_frames)


def fit_reference(image: UInt8Array, options: ScailOptions) -> UInt8Array:
    """Returns the reference, uint8 [H, W, 3]; its size is the size of the result.

    With image_fit "resize" that is smaller than asked for, so that the aspect is kept.
    """
    return resize_frames(
        image,
        width=options.width,
        height=options.height,
        fit=options.image_fit,
        divisible_by=SIZE_MULTIPLE,
    )


def choose_num_frames(pose: Clip | list[Track], options: ScailOptions, progress: Progress) -> int:
    """Returns F = 4n + 1 by the one rule of `resolve_frames`; warns of every repair."""
    if not isinstance(pose, Clip) and not pose:
        raise PoseError("the motion has no person; give at least one track", field="track")
    length = len(pose.frames) if isinstance(pose, Clip) else len(pose[0].body.joints)
    num_frames, warnings = resolve_frames(length, options.num_frames)
    idle = idle_options(options.context, num_frames, options.step_cache)
    for warning in (*warnings, *idle):
        progress.warn(warning)
    return num_frames


def encode_conditioning(
    parts: Components[ScailTransformer],
    reference: UInt8Array,
    pose_frames: UInt8Array,
    options: ScailOptions,
    progress: Progress,
) -> ScailConditioning:
    """Returns everything the transformer is told. Each encoder leaves the device afterwards.

    The unconditional branch differs in the text alone, unless `uncond_reference` is "zero".
    Without guidance the negative prompt is not encoded.
    """
    prompts = [options.prompt] + [options.negative_prompt] * options.guided
    texts = encode_text(parts, prompts, progress)
    image = encode_picture(parts, reference, options.clip_preprocess, progress)
    with progress.stage("encode reference and pose"):
        reference_latents = encode_video(parts, reference[None], progress)
        pose_latents = encode_video(parts, pose_frames, progress)
    with progress.stage("project conditioning"), parts.projecting():
        model = parts.transformer
        contexts = split_context(model.encode_context(texts, image), len(texts))
        strengths = [options.ref_strength]
        if options.guided:
            strengths.append(0.0 if options.uncond_reference == "zero" else options.ref_strength)
        branches = [
            Branch(context, model.embed_reference(reference_latents, strength))
            for context, strength in zip(contexts, strengths, strict=True)
        ]
        return ScailConditioning(
            conditional=branches[0],
            unconditional=branches[1] if options.guided else None,
            pose=model.embed_pose(pose_latents, options.pose_strength),
            size=(reference_latents.shape[3], reference_latents.shape[4]),
        )


def sample(
    transformer: ScailTransformer,
    conditioning: ScailConditioning,
    num_frames: int,
    options: ScailOptions,
    progress: Progress,
    facts: dict[str, Any] | None = None,
) -> Tensor:
    """Returns clean latents float32 [1, 16, T, H / 8, W / 8], as large as the reference.

    `facts` of the report get what the step cache did.
    """
    shape = (LATENT_CHANNELS, latent_frames(num_frames), *conditioning.size)
    noise, generator = initial_noise(options.seed, shape)
    windowed = options.context.active(num_frames)
    if windowed and options.context.freenoise:
        cut = options.context.latents()
        noise = freenoise(noise, cut.frames, cut.overlap, generator)
    schedule = make_schedule(options.scheduler, options.num_inference_steps, options.shift)
    windows = (options.context, num_frames)
    passes = begin_passes(transformer, schedule, options.step_cache, windows, progress)
    latents = denoise(
        make_predict(transformer, conditioning, options, windowed=windowed, passes=passes),
        noise[None].to(transformer.device),
        schedule,
        generator=generator,
        progress=progress,
    )
    end_passes(passes, options.step_cache, progress, facts)
    return latents


def make_predict(
    transformer: ScailTransformer,
    conditioning: ScailConditioning,
    options: ScailOptions,
    *,
    windowed: bool,
    passes: Passes | None = None,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Returns `predict(latents, timestep, step) -> velocity` for the sampling loop.

    With windows, every window of a step sees the same latents; the velocities are blended.
    `passes` are what all passes of the run share.
    """
    shared, steps = passes or Passes(), options.num_inference_steps
    positions = PosePositions(options.pose_rope_t_offset == 1, options.pose_rope)
    first, second = conditioning.conditional, conditioning.unconditional
    batched = batch_guidance(conditioning, options)
    # Stacked once: keys and values of a 14B model are 0.6 GB.
    both = stack_branches(first, second) if batched and second else None

    def velocity(latents: Tensor, timestep: Tensor, step: int, frames: list[int] | slice) -> Tensor:
        with_pose = active_at(step, steps, options.pose_start, options.pose_end)
        with_reference = active_at(step, steps, options.ref_start, options.ref_end)

        def run(latents: Tensor, timesteps: Tensor, branches: Sequence[Branch]) -> Tensor:
            together = both is not None and len(branches) == 2
            branch = both if both and together else branches[0]
            name = "both" if together else "first" if branch is first else "second"
            return transformer(
                latents,
                shared.time(step, timesteps),
                branch.context,
                reference=branch.reference if with_reference else None,
                pose=conditioning.pose[:, frames] if with_pose else None,
                positions=positions,
                reuse=shared.reuse(step, name, frames, (with_pose, with_reference)),
            )

        step_velocity = guide(run, first, second, options.guidance_scale, batched=batched)
        return step_velocity(latents, timestep)

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        if not windowed:
            return velocity(latents, timestep, step, slice(None))
        found, weights = weighted_windows(options.context, step, latents.shape[2])
        return fused_windows(
            lambda part, window: velocity(part, timestep, step, as_span(window)),
            latents,
            found,
            weights,
            on_window=shared.on_window,
        )

    return predict


def as_span(frames: list[int]) -> list[int] | slice:
    """Returns neighbouring frames as a slice: a list would be sent to the device at every use."""
    first, last = frames[0], frames[-1]
    return slice(first, last + 1) if frames == list(range(first, last + 1)) else frames


def batch_guidance(conditioning: ScailConditioning, options: ScailOptions) -> bool:
    """Returns whether both branches of the guidance share one forward pass.

    "auto" says yes for short sequences, which alone do not fill a GPU; for long ones a batch
    only costs memory. EasyCache decides for each branch alone.
    """
    if options.step_cache.method == "easycache":
        return False
    noise_tokens = conditioning.pose.shape[1] * conditioning.pose.shape[2] * 4
    together = {"batched": True, "sequential": False, "auto": noise_tokens <= BATCHED_TOKENS}
    return together[options.guidance_batching]


def stack_branches(first: Branch, second: Branch) -> Branch:
    """Returns both branches as one of batch size 2."""
    context = stack_contexts(first.context, second.context)
    return Branch(context, torch.cat((first.reference, second.reference)))
