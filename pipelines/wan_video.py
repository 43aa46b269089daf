"""Wan2.1: a text, or a text and a picture that the video starts with, become a video.

The recipe, one named call a line: fit the pictures, encode text, pictures and the condition, make
noise, sample, decode. Text alone needs a text-to-video checkpoint, a first picture an
image-to-video one, a first and a last picture one made for both.

A video longer than a window is sampled in windows. A window behind the first one has no first
picture of its own; `window_anchor` says what stands there.

Source: Wan-Video/Wan2.1: wan/text2video.py, image2video.py, first_last_frame2video.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.components import Components
from pipelines.encode import encode_picture, encode_start, encode_text
from pipelines.frames import decode_frames
from pipelines.passes import Passes, begin_passes, end_passes
from pipelines.plan_windows import idle_options
from pipelines.scail import as_span
from xicon_infer.errors import InvalidRequest
from xicon_infer.media.image import resize_frames
from xicon_infer.models.passes import split_context, stack_contexts
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.models.wan import Context, WanTransformer
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.denoise import denoise, fused_windows, guide
from xicon_infer.sampling.noise import freenoise, initial_noise
from xicon_infer.sampling.schedule import make_schedule
from xicon_infer.sampling.windows import ContextOptions, weighted_windows
from xicon_infer.types import (
    LATENT_CHANNELS,
    Clip,
    Fit,
    Progress,
    SilentProgress,
    UInt8Array,
    latent_frames,
    pixel_frames,
)

SIZE_MULTIPLE = 16
"""Width and height: 8 (VAE) x 2 (patch)."""

BATCHED_TOKENS = 8192
"""Noise tokens up to which both branches of the guidance share one forward pass."""


@dataclass(frozen=True)
class WanOptions:
    """Every number and choice of one run; the fields of `Job` of the same names.

    width, height: pixels of the result, multiples of 16. num_frames: pixel frames, lowered to
    4n + 1. fps: of the result. seed: 0 to 2**64 - 1. window_anchor: what stands in the first
    frame of a later window: "every" the first picture again (ComfyUI wrapper), "first" nothing.
    step_cache: which steps may be skipped. tiles: decode in tiles, None for whole frames.

    Raises:
        InvalidRequest: the size is no multiple of 16, or the scheduler cannot make the steps.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: Fraction = Fraction(16)
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    shift: float = 5.0
    scheduler: str = "dpm++_sde"
    seed: int = 0
    context: ContextOptions = field(default_factory=ContextOptions)
    window_anchor: Literal["every", "first"] = "every"
    image_fit: Fit = "crop"
    clip_preprocess: Literal["stretch", "center"] = "stretch"
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
        if self.num_frames < 1:
            raise InvalidRequest(
                f"'num_frames' must be at least 1, got {self.num_frames}", field="num_frames"
            )
        make_schedule(self.scheduler, self.num_inference_steps, self.shift)
        self.step_cache.check(self.num_inference_steps, self.guidance_batching)

    @property
    def guided(self) -> bool:
        """Returns True if an unconditional branch runs."""
        return not math.isclose(self.guidance_scale, 1.0)


@dataclass(frozen=True)
class WanConditioning:
    """What the transformer is told, computed once per job.

    conditional, unconditional: keys and values; the second is None without guidance. condition:
    mask and picture latents [1, 20, T, h, w], None for a text-only model. size: (h, w) in latent
    cells.
    """

    conditional: Context
    unconditional: Context | None
    condition: Tensor | None
    size: tuple[int, int]


@dataclass(frozen=True)
class WanOutput:
    """The result, and the pictures it starts and ends with as the model saw them."""

    clip: Clip
    first: UInt8Array | None
    last: UInt8Array | None


class WanVideoPipeline:
    """Holds the networks; calling it makes a video.

    Args:
        components: as `pipelines.loading` makes them.
    """

    def __init__(self, components: Components[WanTransformer]) -> None:
        self.components = components

    @torch.inference_mode()
    def __call__(
        self,
        options: WanOptions,
        first: UInt8Array | None = None,
        last: UInt8Array | None = None,
        progress: Progress | None = None,
    ) -> WanOutput:
        """Returns a video.

        Args:
            options: see `WanOptions`.
            first: the picture it starts with, uint8 [H, W, 3], any size; exactly for
                image-to-video models.
            last: the picture it ends with, exactly for models made for both.
            progress: told of every stage and step.

        Raises:
            InvalidRequest: the pictures do not suit the model, or the options each other.
        """
        progress = progress or SilentProgress()
        parts = self.components
        check_pictures(parts.transformer, first, last, options)
        start, end = fit_picture(first, options), fit_picture(last, options, like=first)
        conditioning = encode_conditioning(parts, start, end, options, progress)
        num_frames = pixel_frames(latent_frames(options.num_frames))
        anchor = None if first is None else (options.window_anchor, "every")
        for warning in idle_options(options.context, num_frames, options.step_cache, anchor):
            progress.warn(warning)
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
        return WanOutput(Clip(frames, options.fps), start, end)


def check_pictures(
    transformer: WanTransformer,
    first: UInt8Array | None,
    last: UInt8Array | None,
    options: WanOptions,
) -> None:
    """Refuses pictures that the model cannot use, and missing ones.

    Raises:
        InvalidRequest: naming the picture, and which weights it needs.
    """
    config = transformer.config
    takes_last = config.image_positions is not None
    rules = (
        (config.image_dim is None, first, "image", "a text-to-video model", "wan_i2v"),
        (not takes_last, last, "end_image", "not made for a last picture", "wan_i2v with FLF2V"),
    )
    for refused, picture, name, kind, other in rules:
        if refused and picture is not None:
            message = f"'{name}' cannot be used: the model is {kind}; use {other} weights"
            raise InvalidRequest(message, field=name, code="UNUSED_FIELD")
    if config.image_dim is not None and first is None:
        message = "Missing 'image': the picture that the video starts with"
        raise InvalidRequest(message, field="image", code="MISSING_FIELD")
    if takes_last and last is None:
        message = "Missing 'end_image': this model starts and ends with a picture"
        raise InvalidRequest(message, field="end_image", code="MISSING_FIELD")
    if last is not None and latent_frames(options.num_frames) < 2:
        message = f"'num_frames' must be at least 5 with a last picture, got {options.num_frames}"
        raise InvalidRequest(message, field="num_frames", code="OUT_OF_RANGE")


def fit_picture(
    picture: UInt8Array | None, options: WanOptions, like: UInt8Array | None = None
) -> UInt8Array | None:
    """Returns a picture at the size of the video, uint8 [H, W, 3]; None stays None.

    With image_fit "resize" the first picture's aspect is kept and decides the size of the video;
    the last one (`like` is the first) is cut to it.
    """
    if picture is None:
        return None
    if like is not None:
        fitted = fit_picture(like, options)
        assert fitted is not None
        height, width = fitted.shape[:2]
        fit: Fit = "crop" if options.image_fit == "resize" else options.image_fit
        return resize_frames(picture, width=width, height=height, fit=fit)
    return resize_frames(
        picture,
        width=options.width,
        height=options.height,
        fit=options.image_fit,
        divisible_by=SIZE_MULTIPLE,
    )


def encode_conditioning(
    parts: Components[WanTransformer],
    first: UInt8Array | None,
    last: UInt8Array | None,
    options: WanOptions,
    progress: Progress,
) -> WanConditioning:
    """Returns everything the transformer is told; without guidance no negative prompt is encoded.

    Args:
        parts: the networks.
        first: at the size of the video, or None.
        last: the same.
        options: prompts, frames.
        progress: told of the stages.
    """
    prompts = [options.prompt] + [options.negative_prompt] * options.guided
    texts = encode_text(parts, prompts, progress)
    height, width = (options.height, options.width) if first is None else first.shape[:2]
    image, condition = None, None
    if first is not None:
        seen = [picture for picture in (first, last) if picture is not None]
        states = [encode_picture(parts, p, options.clip_preprocess, progress) for p in seen]
        image = torch.cat(states, dim=1)
        with progress.stage("encode start image"):
            condition = encode_start(parts, first, options.num_frames, last=last)
    with progress.stage("project conditioning"), parts.projecting():
        contexts = split_context(parts.transformer.encode_context(texts, image), len(texts))
    second = contexts[1] if options.guided else None
    return WanConditioning(contexts[0], second, condition, (height // 8, width // 8))


def sample(
    transformer: WanTransformer,
    conditioning: WanConditioning,
    num_frames: int,
    options: WanOptions,
    progress: Progress,
    facts: dict[str, Any] | None = None,
) -> Tensor:
    """Returns clean latents float32 [1, 16, T, H / 8, W / 8]; `facts` as in SCAIL's `sample`."""
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
        make_predict(transformer, conditioning, options, shape, windowed=windowed, passes=passes),
        noise[None].to(transformer.device),
        schedule,
        generator=generator,
        progress=progress,
    )
    end_passes(passes, options.step_cache, progress, facts)
    return latents


def make_predict(
    transformer: WanTransformer,
    conditioning: WanConditioning,
    options: WanOptions,
    shape: tuple[int, int, int, int],
    *,
    windowed: bool,
    passes: Passes | None = None,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Returns `predict(latents, timestep, step) -> velocity` for the sampling loop.

    Args:
        transformer: the model.
        conditioning: what it is told.
        options: guidance and windows.
        shape: (C, T, h, w) of the latents.
        windowed: the video is longer than a window.
        passes: what all passes of the run share.
    """
    shared = passes or Passes()
    first, second = conditioning.conditional, conditioning.unconditional
    _, frames, height, width = shape
    tokens = frames * (height // 2) * (width // 2)
    batched = batch_guidance(tokens, options)
    # Stacked once: keys and values of a 14B model are 0.6 GB.
    both = stack_contexts(first, second) if batched and second is not None else None

    def velocity(latents: Tensor, timestep: Tensor, step: int, frames: list[int] | slice) -> Tensor:
        condition = window_condition(conditioning.condition, frames, options.window_anchor)

        def run(latents: Tensor, timesteps: Tensor, contexts: Sequence[Context]) -> Tensor:
            together = both is not None and len(contexts) == 2
            context = both if both is not None and together else contexts[0]
            name = "both" if together else "first" if context is first else "second"
            told = None if condition is None else condition.expand(len(latents), -1, -1, -1, -1)
            time, reuse = shared.time(step, timesteps), shared.reuse(step, name, frames)
            return transformer(latents, time, context, told, reuse=reuse)

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


def window_condition(
    condition: Tensor | None, frames: list[int] | slice, anchor: Literal["every", "first"]
) -> Tensor | None:
    """Returns the condition [1, 20, t, h, w] of a window; None for a text-only model.

    Args:
        condition: of the whole video.
        frames: latent frames of the window.
        anchor: see `WanOptions`.
    """
    if condition is None:
        return None
    part = condition[:, :, frames]
    begins = frames.start if isinstance(frames, slice) else frames[0]
    if anchor == "first" or not begins:
        return part
    return torch.cat((condition[:, :, :1], part[:, :, 1:]), dim=2)


def batch_guidance(tokens: int, options: WanOptions) -> bool:
    """Returns whether both branches of the guidance share one forward pass of that many tokens.

    EasyCache decides for each branch alone.
    """
    if options.step_cache.method == "easycache":
        return False
    together = {"batched": True, "sequential": False, "auto": tokens <= BATCHED_TOKENS}
    return together[options.guidance_batching]
