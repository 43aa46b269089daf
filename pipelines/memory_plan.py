"""Where the networks of a job lie, stage by stage, and what that takes of the device.

`build_plan` adds up the bytes of one way of doing it; `pipelines.memory` chooses between them.
Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines.memory_needs import (
    COMPONENT_OF,
    DECODE,
    FRAMES,
    PROJECT,
    SAMPLE,
    TEXT,
    Needs,
    Storage,
)
from xicon_infer.formulas_memory import SWAP_BUFFERS

POSES = "find poses"
POSE_ROOM = 6 * 10**9
"""What the pose networks and their work take beside a transformer that stays; assumed, not
measured: 4 GB of weights in float32 and batches of pictures."""

Mode = Literal["resident", "offload", "stream"]
MODES: tuple[Mode, ...] = ("resident", "offload", "stream")


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything lies, and what that takes.

    blocks_to_swap: of the transformer. evict: stage -> components that are off the device in it.
    tile, tile_size: decode in tiles of (width, height) pixels. vae_chunk: latent frames that the
    VAE handles at once. free_kv_weights: the key and value weights of cross-attention come to the
    device block by block, once per job, and not for sampling. stream_encoder: the blocks of the
    text encoder are swapped too. keep_transformer: what sampling needs of it stays on the device
    between stages and jobs, while the others come and go. peak_bytes: stage -> predicted bytes on
    the device. host_bytes: of weights that wait on the host. context_frames: a window smaller than
    the job's, or None. why: sentences for people. needs: what it was made from.
    """

    mode: Mode
    storage: Storage
    blocks_to_swap: int
    evict: Mapping[str, tuple[str, ...]]
    tile: bool
    tile_size: tuple[int, int]
    vae_chunk: int
    free_kv_weights: bool
    stream_encoder: bool
    peak_bytes: Mapping[str, int]
    host_bytes: int
    context_frames: int | None
    why: tuple[str, ...]
    needs: Needs = field(repr=False, compare=False)
    keep_transformer: bool = False

    @property
    def peak(self) -> int:
        """Returns the most bytes on the device in any stage."""
        return max(self.peak_bytes.values())


def fits(plan: MemoryPlan, usable: int, host_bytes: int | None = None) -> bool:
    """Returns whether the plan's peak and its waiting weights have room."""
    return plan.peak <= usable and (host_bytes is None or plan.host_bytes <= host_bytes)


def build_plan(
    needs: Needs,
    mode: Mode,
    *,
    tile: bool,
    swapped: int,
    chunk: int,
    stream_encoder: bool = False,
    keep: bool = False,
) -> MemoryPlan:
    """Returns the plan with its peaks; `why` is left empty.

    Args:
        needs: of the job, in the storage of the plan.
        mode: see `pipelines.memory`.
        tile: decode in tiles.
        swapped: blocks of the transformer that are swapped.
        chunk: latent frames that the VAE handles at once.
        stream_encoder: the blocks of the text encoder are swapped too.
        keep: what sampling needs of the transformer stays on the device; for mode "offload".
    """
    alone = mode != "resident"
    parts = [name for name, size in needs.weights.items() if size]
    stages = [stage for stage, name in COMPONENT_OF.items() if name in parts]
    evict = {
        stage: tuple(
            name
            for name in parts
            if alone and name != COMPONENT_OF[stage] and not (keep and name == "transformer")
        )
        for stage in stages
    }
    work = {
        **needs.stage_work,
        FRAMES: needs.encode(chunk),
        DECODE: needs.decode(chunk, tile=tile),
    }
    peaks = {}
    for stage in stages:
        if stage == FRAMES and not work[FRAMES]:
            continue
        weights = sum(needs.weights.values())
        if alone:
            weights = _weights_alone(needs, stage, swapped, stream_encoder=stream_encoder)
        if keep:
            weights += _beside(needs, stage)
        peaks[stage] = weights + work[stage] + _kept(needs, stage)
    if keep and needs.work.pipeline in ("scail", "steady_dancer"):
        peaks[POSES] = needs.weights["transformer"] - needs.kv_weights + POSE_ROOM
    waiting = sum(needs.weights.values()) if alone else 0
    return MemoryPlan(
        mode=mode,
        storage=needs.storage,
        blocks_to_swap=swapped,
        evict=evict,
        tile=tile,
        tile_size=needs.work.tile,
        vae_chunk=chunk,
        free_kv_weights=alone,
        stream_encoder=stream_encoder,
        peak_bytes=peaks,
        host_bytes=waiting,
        context_frames=None,
        why=(),
        needs=needs,
        keep_transformer=keep,
    )


def _weights_alone(needs: Needs, stage: str, swapped: int, *, stream_encoder: bool) -> int:
    """Returns the bytes of weights on the device with one component there."""
    if stage == PROJECT:
        return needs.outer + SWAP_BUFFERS * needs.kv_matrix
    if stage == SAMPLE:
        buffers = min(SWAP_BUFFERS, swapped) * needs.largest_block if swapped else 0
        whole = needs.weights["transformer"] - needs.kv_weights
        return whole - swapped * needs.block + buffers
    if stage == TEXT and stream_encoder:
        return needs.streamed_encoder
    return needs.weights[COMPONENT_OF[stage]]


def _beside(needs: Needs, stage: str) -> int:
    """Returns the bytes of a transformer that stays, beside what a stage brings by itself."""
    resting = needs.weights["transformer"] - needs.kv_weights
    return {SAMPLE: 0, PROJECT: resting - needs.outer}.get(stage, resting)


def _kept(needs: Needs, stage: str) -> int:
    """Returns the bytes that stages before left on the device for later ones."""
    if stage in (PROJECT, SAMPLE, DECODE):
        return needs.kv_cache + needs.conditioning
    return 0
