"""Which networks lie where while a job runs: everything on the device, one at a time, or streamed.

    resident   every component stays on the device
    offload    one component at a time; the others wait on the host. Where there is room, the
               transformer stays, without the keys' and values' weights that only its conditioning
               reads, and the encoders come and go
    stream     besides, the transformer's blocks come over the bus as they are needed

`choose_memory` takes the first that fits by the closed forms of `formulas_memory`, with a margin.
The numbers of `resident`, `offload` and `stream` are the same pictures; tiles and a smaller context
window change them, so tiles come last and the window only in `lower`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.memory_needs import MAX_PIECE, SAMPLE, TEXT, Needs, Storage, needs_of
from pipelines.memory_plan import MODES, MemoryPlan, Mode, build_plan, fits
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.formulas_memory import SWAP_BUFFERS, swapped_blocks

__all__ = [
    "CONTEXT_BYTES",
    "REQUESTS",
    "STORAGES",
    "Allowed",
    "MemoryPlan",
    "Mode",
    "Request",
    "choose_memory",
    "fits",
    "fits_hint",
    "lower",
    "margin_bytes",
]

Request = Literal["auto", "resident", "offload", "stream"]
REQUESTS: tuple[Request, ...] = ("auto", *MODES)
STORAGES: tuple[Storage, ...] = ("reference", "merged-bf16", "merged-fp8")

CONTEXT_BYTES = 768 * 2**20
"""What the driver, the CUDA context and loaded kernels take of a card; assumed, not measured."""

MARGIN_BYTES = 512 * 2**20
MARGIN_SHARE = 0.05
"""Kept free for the allocator's gaps and the kernels' work space: the larger of both."""

_WINDOW_STEP = 16
_SMALLEST_WINDOW = 17
_SMALLEST_SIDE = 256
_SIZE_MULTIPLE = 32


@dataclass(frozen=True)
class Allowed:
    """What a plan may choose from.

    storages: in order of preference. blocks_to_swap: an exact number, or "auto". tile: whether the
    VAE decodes in tiles, or "auto" for only where nothing else fits and it helps.
    """

    storages: tuple[Storage, ...] = ("reference",)
    blocks_to_swap: int | Literal["auto"] = "auto"
    tile: bool | Literal["auto"] = "auto"


def margin_bytes(free_bytes: int) -> int:
    """Returns how much of the free memory a plan leaves alone."""
    return max(MARGIN_BYTES, int(free_bytes * MARGIN_SHARE))


def choose_memory(
    needs_for: Callable[[Storage], Needs],
    *,
    free_bytes: int,
    host_bytes: int | None = None,
    request: Request = "auto",
    allow: Allowed | None = None,
) -> MemoryPlan:
    """Returns the first plan that fits: resident before offload before stream, whole before tiles.

    Args:
        needs_for: the needs of the job in a storage.
        free_bytes: device memory that the job may use, the CUDA context subtracted.
        host_bytes: host memory for weights that wait; None for no limit.
        request: "auto", or the one way to use.
        allow: limits given by the user; none if None.

    Raises:
        InvalidRequest: the request and the limits contradict each other.
        OutOfMemory: nothing fits; says what is needed, what is there and what would fit.
    """
    allow = allow or Allowed()
    needs = {storage: needs_for(storage) for storage in allow.storages}
    _check(request, allow, max(n.blocks for n in needs.values()))
    usable = free_bytes - margin_bytes(free_bytes)
    tried: list[MemoryPlan] = []
    for plan in _candidates(needs, usable, request, allow):
        if fits(plan, usable, host_bytes):
            plan = _longer_pieces(plan)
            return replace(plan, why=(*_reasons(plan, usable, request, tried), *plan.why))
        tried.append(plan)
    raise _nothing_fits(tried, free_bytes, host_bytes, request, allow)


def lower(plan: MemoryPlan) -> MemoryPlan | None:
    """Returns the next plan that takes less, for another try after the device ran out of memory.

    In order: one component at a time, the transformer too; fewer latent frames at once in the VAE;
    tiles, where they help; a quarter more of the blocks swapped, until all are; a context window 16
    frames smaller, down to 17. Up to the tiles the result stays the same; the window changes it.
    None at the end.
    """
    needs = plan.needs
    if plan.mode == "resident" or plan.keep_transformer:
        why = "keeps one component on the device at a time"  # and no longer pieces
        return _lowered(plan, "offload", why, chunk=min(plan.vae_chunk, needs.work.piece))
    if plan.vae_chunk > 1 and needs.work.vae_chunk is None:
        return _lowered(plan, plan.mode, "one latent frame at a time in the VAE", chunk=1)
    if not plan.tile and needs.decode(1, tile=True) < needs.decode(1, tile=False):
        return _lowered(plan, plan.mode, "decodes in tiles", tile=True)
    if plan.blocks_to_swap < needs.blocks:
        more = max(plan.blocks_to_swap + max(1, needs.blocks // 4), SWAP_BUFFERS + 1)
        swapped = min(needs.blocks, more)
        return _lowered(plan, "stream", f"swaps {swapped} blocks", swapped=swapped)
    window = min(needs.work.window or needs.work.num_frames, needs.work.num_frames)
    smaller = window - _WINDOW_STEP
    if smaller < _SMALLEST_WINDOW:
        return None
    less = needs_of(replace(needs.work, window=smaller), needs.storage)
    why = f"uses context windows of {smaller} frames, which changes the result"
    lowered = _lowered(replace(plan, needs=less), "stream", why, swapped=plan.blocks_to_swap)
    return replace(lowered, context_frames=smaller)


def fits_hint(needs: Needs, usable: int, host_bytes: int | None = None) -> tuple[int, int, int]:
    """Returns (width, height, num_frames) near the job's own that fit with everything streamed.

    Either the size stays and the frames become fewer, or the frames stay and the size shrinks
    with its shape; the one with more pixels in all is taken. (0, 0, 0) if not even 17 frames of
    the smallest size do.
    """
    work = needs.work

    def ok(width: int, height: int, frames: int) -> bool:
        window = work.window if work.window and work.window < frames else None
        smaller = replace(work, width=width, height=height, num_frames=frames, window=window)
        return fits(_lowest(needs_of(smaller, needs.storage)), usable, host_bytes)

    sizes = list(_smaller_sizes(work.width, work.height))
    counts = range(work.num_frames - 4, _SMALLEST_WINDOW - 1, -4)
    shorter = next(((*sizes[0], n) for n in counts if ok(*sizes[0], n)), (0, 0, 0))
    narrower = next(
        ((w, h, work.num_frames) for w, h in sizes if ok(w, h, work.num_frames)), (0, 0, 0)
    )
    best = max(shorter, narrower, key=lambda s: s[0] * s[1] * s[2])
    if best[0]:
        return best
    few = min(work.num_frames, _SMALLEST_WINDOW)
    return next(((w, h, few) for w, h in sizes if ok(w, h, few)), (0, 0, 0))


def _smaller_sizes(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yields the size and smaller ones of about the same shape, multiples of 32."""
    yield width, height
    last = (width, height)
    for percent in range(97, 9, -3):
        columns, rows = (side * percent // 100 // _SIZE_MULTIPLE for side in (width, height))
        size = (columns * _SIZE_MULTIPLE, rows * _SIZE_MULTIPLE)
        if min(size) < _SMALLEST_SIDE:
            return
        if size != last:
            last = size
            yield size


def _check(request: Request, allow: Allowed, blocks: int) -> None:
    swapped = allow.blocks_to_swap
    if request not in REQUESTS:
        raise InvalidRequest(
            f"'memory' must be one of {', '.join(REQUESTS)}, got {request!r}", field="memory"
        )
    if swapped == "auto":
        return
    if not 0 <= swapped <= blocks:
        raise InvalidRequest(
            f"'blocks_to_swap' must be auto or 0 to {blocks} for this model, got {swapped}",
            field="blocks_to_swap",
            code="OUT_OF_RANGE",
        )
    if swapped and request in ("resident", "offload"):
        raise InvalidRequest(
            f"'blocks_to_swap' {swapped} needs memory 'stream' or 'auto', got {request!r}; "
            "leave one of both out",
            field="blocks_to_swap",
        )
    if not swapped and request == "stream":
        raise InvalidRequest(
            "'blocks_to_swap' 0 and memory 'stream' contradict each other; use memory 'offload', "
            "or leave 'blocks_to_swap' out",
            field="blocks_to_swap",
        )


def _candidates(
    needs: Mapping[Storage, Needs], usable: int, request: Request, allow: Allowed
) -> Iterator[MemoryPlan]:
    """Yields the plans to try, the best first; tiles only where they take less."""
    modes = MODES if request == "auto" else (request,)
    if allow.blocks_to_swap != "auto":
        modes = tuple(m for m in modes if (m == "stream") == bool(allow.blocks_to_swap))
    least = SWAP_BUFFERS + 1
    for tile in (False, True) if allow.tile == "auto" else (allow.tile,):
        for mode in modes:
            for found in needs.values():
                helps = found.decode(1, tile=True) < found.decode(1, tile=False)
                if tile and allow.tile == "auto" and not helps:
                    continue
                swapped = allow.blocks_to_swap
                if mode == "offload" and request == "auto":
                    yield _keeping(found, usable, tile=tile)
                yield _fitted(
                    found, mode, usable, tile=tile, swapped=swapped, least=least * (mode == request)
                )


def _fitted(
    needs: Needs,
    mode: Mode,
    usable: int,
    *,
    tile: bool,
    swapped: int | Literal["auto"],
    least: int,
) -> MemoryPlan:
    """Returns the plan of a mode with as few blocks swapped, and as long VAE pieces, as fit.

    `least` blocks are swapped at any rate; where none need to be, only the text encoder may be
    streamed.
    """
    if mode != "stream":
        plan = build_plan(needs, mode, tile=tile, swapped=0, chunk=needs.work.piece)
    elif swapped != "auto":
        plan = build_plan(needs, mode, tile=tile, swapped=swapped, chunk=needs.work.piece)
    else:
        whole = build_plan(needs, mode, tile=tile, swapped=0, chunk=needs.work.piece)
        excess = whole.peak_bytes[SAMPLE] - usable
        enough = swapped_blocks(excess, needs.block, needs.blocks, needs.largest_block)
        number = needs.blocks if enough is None else min(needs.blocks, max(enough, least))
        plan = build_plan(needs, mode, tile=tile, swapped=number, chunk=needs.work.piece)
    while plan.vae_chunk > 1 and not (fits(plan, usable) or needs.work.vae_chunk):
        plan = _again(plan, chunk=plan.vae_chunk - 1)
    if mode == "stream" and plan.peak_bytes.get(TEXT, 0) > usable:
        plan = _again(plan, stream_encoder=True)
    return plan


def _keeping(needs: Needs, usable: int, *, tile: bool) -> MemoryPlan:
    """Returns the plan in which the transformer stays and the encoders come and go.

    A text encoder that does not fit beside it is streamed: that takes less of the bus than the
    transformer's way back.
    """
    plan = build_plan(needs, "offload", tile=tile, swapped=0, chunk=needs.work.piece, keep=True)
    if plan.peak_bytes.get(TEXT, 0) > usable:
        plan = _again(plan, stream_encoder=True)
    while plan.vae_chunk > 1 and not (fits(plan, usable) or needs.work.vae_chunk):
        plan = _again(plan, chunk=plan.vae_chunk - 1)
    return plan


def _longer_pieces(plan: MemoryPlan) -> MemoryPlan:
    """Returns the plan with more latent frames at once in the VAE, where that memory lies idle.

    A longer piece is a little faster and never another result; it may not raise the job's peak.
    """
    if plan.needs.work.vae_chunk is not None:
        return plan
    for chunk in range(plan.vae_chunk + 1, MAX_PIECE + 1):
        longer = _again(plan, chunk=chunk)
        if longer.peak > plan.peak:
            break
        plan = longer
    return plan


def _lowest(needs: Needs) -> MemoryPlan:
    """Returns the plan that takes the least."""
    tile = needs.decode(1, tile=True) < needs.decode(1, tile=False)
    plan = build_plan(
        needs, "stream", tile=tile, swapped=needs.blocks, chunk=needs.work.vae_chunk or 1
    )
    return _again(plan, stream_encoder=True)


def _again(
    plan: MemoryPlan, *, chunk: int | None = None, stream_encoder: bool | None = None
) -> MemoryPlan:
    return build_plan(
        plan.needs,
        plan.mode,
        tile=plan.tile,
        swapped=plan.blocks_to_swap,
        chunk=plan.vae_chunk if chunk is None else chunk,
        stream_encoder=plan.stream_encoder if stream_encoder is None else stream_encoder,
        keep=plan.keep_transformer,
    )


def _lowered(
    plan: MemoryPlan,
    mode: Mode,
    why: str,
    *,
    tile: bool | None = None,
    swapped: int | None = None,
    chunk: int | None = None,
) -> MemoryPlan:
    lowered = build_plan(
        plan.needs,
        mode,
        tile=plan.tile if tile is None else tile,
        swapped=plan.blocks_to_swap if swapped is None else swapped,
        chunk=plan.vae_chunk if chunk is None else chunk,
        stream_encoder=plan.stream_encoder or mode == "stream",
    )
    sentence = f"The device ran out of memory with the plan before; this one {why}."
    return replace(lowered, context_frames=plan.context_frames, why=(sentence,))


def _reasons(
    plan: MemoryPlan, usable: int, request: Request, tried: list[MemoryPlan]
) -> Iterator[str]:
    margin = "a margin is subtracted for the allocator and the kernels' work space"
    yield f"{_gb(usable)} are usable ({margin})."
    if request != "auto":
        yield f"Memory {request!r} was asked for."
    seen = set()
    for other in tried:
        kind = (other.mode, other.storage, other.tile, other.keep_transformer)
        if kind in seen:
            continue
        seen.add(kind)
        stage, peak = max(other.peak_bytes.items(), key=lambda item: item[1])
        kept = ", the transformer kept," if other.keep_transformer else ""
        yield f"{other.mode.capitalize()} ({other.storage}){kept} needs {_gb(peak)} to {stage}."
    if plan.keep_transformer:
        dropped = _gb(plan.needs.kv_weights)
        yield f"The transformer stays on the device, less {dropped} that only its prompt needs."
    if plan.blocks_to_swap:
        copied = _gb(plan.blocks_to_swap * plan.needs.block)
        yield (
            f"{plan.blocks_to_swap} of {plan.needs.blocks} blocks are swapped: {copied} come over "
            "the bus in every forward pass."
        )
    if plan.tile:
        yield "The VAE decodes in tiles, which blends at their seams."


def _nothing_fits(
    tried: list[MemoryPlan],
    free_bytes: int,
    host_bytes: int | None,
    request: Request,
    allow: Allowed,
) -> OutOfMemory:
    usable = free_bytes - margin_bytes(free_bytes)
    best = min(tried, key=lambda plan: plan.peak)
    stage, peak = max(best.peak_bytes.items(), key=lambda item: item[1])
    work = best.needs.work
    on_device = (
        f"{best.mode} needs {_gb(peak)} to {stage} at {work.width}x{work.height}x{work.num_frames}"
        f", and {_gb(usable)} of {_gb(free_bytes)} free are usable"
    )
    if peak <= usable and host_bytes is not None:
        return OutOfMemory(
            f"'memory' {request!r}: {_gb(best.host_bytes)} of weights wait on the host, which has "
            f"{_gb(host_bytes)}; use a card that holds everything, or an fp8 preset",
            field="memory",
            code="HOST_OOM",
        )
    changes = []
    if request in ("resident", "offload"):
        changes.append("memory 'auto' or 'stream'")
    if allow.blocks_to_swap != "auto":
        changes.append("'blocks_to_swap' auto")
    if allow.tile is True and best.needs.decode(1, tile=False) < best.needs.decode(1, tile=True):
        changes.append("no tiles, which here take more")
    width, height, frames = fits_hint(best.needs, usable, host_bytes)
    if width and (width, height, frames) != (work.width, work.height, work.num_frames):
        changes.append(f"{width}x{height} with {frames} frames, which would fit streamed")
    advice = "; use " + ", or ".join(changes) if changes else "; no size fits, use a larger card"
    return OutOfMemory(f"'memory' {request!r}: {on_device}{advice}", field="memory")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
