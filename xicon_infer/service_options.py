"""From the options of a job to those of the recipes: the fields of the same names, and groups."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from pipelines.components import Components
from pipelines.loading import LoadOptions
from pipelines.memory_plan import MemoryPlan
from pipelines.plan_steps import cache_of, context_of
from pipelines.scail import ScailOptions
from pipelines.steady_dancer_options import SteadyDancerOptions
from pipelines.wan_video import WanOptions
from xicon_infer.job import Job
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.runtime import models_dirs
from xicon_infer.types import SPATIAL_STRIDE


def scail_options(job: Job, seed: int) -> ScailOptions:
    """Returns the options of the SCAIL recipe."""
    same = _same_names(job, ScailOptions, _GROUPED)
    return ScailOptions(**same, **_groups(job), seed=seed)


def dancer_options(job: Job, seed: int, size: tuple[int, int]) -> SteadyDancerOptions:
    """Returns the options of the SteadyDancer recipe.

    Args:
        job: what was asked for.
        seed: of the noise.
        size: (W, H) of the result, as `xicon_infer.sizes` chose it.
    """
    same = _same_names(job, SteadyDancerOptions, (*_GROUPED, "width", "height", "area"))
    return SteadyDancerOptions(**same, **_groups(job), width=size[0], height=size[1], seed=seed)


def wan_options(job: Job, seed: int, size: tuple[int, int]) -> WanOptions:
    """Returns the options of the Wan recipe; arguments as in `dancer_options`."""
    same = _same_names(job, WanOptions, (*_GROUPED, "width", "height", "fps", "num_frames"))
    assert job.frame_rate is not None  # `make_job` refuses a job that nothing drives
    assert job.num_frames is not None
    return WanOptions(
        **same,
        **_groups(job),
        width=size[0],
        height=size[1],
        num_frames=job.num_frames,
        fps=job.frame_rate,
        seed=seed,
    )


def load_options(
    job: Job, device: torch.device, dtype: torch.dtype, plan: MemoryPlan | None
) -> LoadOptions:
    """Returns where the components of a job are, and how they are loaded.

    Args:
        job: what was asked for.
        device: where it runs.
        dtype: its precision.
        plan: where the networks lie, None for all on the device.
    """
    storage = job.storage
    if storage == "auto":
        storage = "reference" if plan is None else plan.storage
    return LoadOptions(
        device=device,
        dtype=dtype,
        attention=job.attention,
        loras=tuple((lora.name, lora.strength) for lora in job.loras),
        lora_mode=job.lora_mode,
        storage=storage,
        matmul=job.matmul,
        kernels=job.kernels,
        fuse_qkv=job.fuse_qkv,
        decoder=job.decoder,
        transformer=job.transformer,
        plan=plan,
        ahead=True,
        search_dirs=tuple(models_dirs(job.models_dir)),
    )


Options = TypeVar("Options", ScailOptions, SteadyDancerOptions, WanOptions)


def fitted_tiles(job: Job, options: Options, parts: Components[Any]) -> Options:
    """Returns the options with tiles, where the memory plan wants them and the job does not."""
    if job.tile or parts.plan is None or not parts.plan.tile:
        return options
    return replace(options, tiles=tile_options(replace(job, tile=True)))


def tile_options(job: Job) -> TileOptions | None:
    """Returns the tiles that the video is decoded in, in latent cells; None for whole frames."""
    if not job.tile:
        return None
    sides = (job.tile_height, job.tile_width, job.tile_stride_height, job.tile_stride_width)
    return TileOptions(*(side // SPATIAL_STRIDE for side in sides))


_GROUPED = ("seed", "context", "tiles", "step_cache")
"""Fields of every recipe that are not an option of the same name."""


def _groups(job: Job) -> dict[str, Any]:
    """Returns the groups of options that every recipe has."""
    return {
        "context": context_of(job),
        "tiles": tile_options(job),
        "step_cache": cache_of(job),
    }


def _same_names(job: Job, kind: type[Any], others: Collection[str]) -> dict[str, Any]:
    """Returns the fields that a recipe shares with the job."""
    names = (option.name for option in fields(kind) if option.name not in others)
    return {name: getattr(job, name) for name in names}
