"""The memory plan: what fits is taken in order, what does not is said, every option counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import frames, memory_needs, storage
from pipelines.memory import (
    STORAGES,
    Allowed,
    choose_memory,
    fits,
    fits_hint,
    lower,
    margin_bytes,
)
from pipelines.memory_needs import DECODE, FRAMES, PROJECT, SAMPLE, TEXT, Workload, needs_of
from pipelines.memory_plan import build_plan
from pipelines.plan_memory import TABLE_JOBS
from xicon_infer import formulas
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.formulas import SCAIL_14B, WAN_I2V_14B
from xicon_infer.formulas_memory import row_scale_bytes

GB = 10**9
SCAIL = TABLE_JOBS["SCAIL 512x896"]
BF16 = replace(SCAIL, fp8_file=False)


def choose(free, work=SCAIL, **kwargs):
    return choose_memory(lambda kind: needs_of(work, kind), free_bytes=int(free), **kwargs)


# Needs


def test_needs_are_the_sums_of_the_tables():
    needs = needs_of(replace(SCAIL, lora_rank=0), "reference")
    # 4.1: 16.4 G parameters: 11.95 block + 4.19 cross K/V + 0.24 embeddings; fp8 and the rest bf16.
    assert needs.kv_weights == 4_194_304_000
    assert needs.outer == 2 * formulas.outer_parameters(SCAIL_14B)
    assert needs.weights["transformer"] == formulas.weight_bytes(SCAIL_14B, 1, 2)
    assert 16.4e9 < needs.weights["transformer"] < 16.8e9
    sampling = needs.weights["transformer"] - needs.kv_weights
    assert round((sampling - needs.outer) / 1e9, 1) == 12.0  # "12.0 GB in fp8"
    assert needs.kv_cache == 629_964_800
    assert needs.weights["text_encoder"] == pytest.approx(11.36e9, rel=0.001)
    assert needs.weights["image_encoder"] == pytest.approx(1.26e9, rel=0.01)
    assert needs.weights["vae"] == pytest.approx(0.25e9, rel=0.02)


def test_storages_differ_as_they_should():
    found = {kind: needs_of(SCAIL, kind).weights["transformer"] for kind in STORAGES}
    assert found["merged-bf16"] == formulas.weight_bytes(SCAIL_14B, 2, 2)  # LoRAs are inside
    lora = formulas.lora_bytes(SCAIL_14B, 64)
    assert lora == pytest.approx(0.72e9, rel=0.05)  # 4.1, a rank 64 file without the K/V of images
    assert found["reference"] == formulas.weight_bytes(SCAIL_14B, 1, 2) + lora
    # The matrices of the first and the last block in two bytes, the others with scales per row.
    more = 2 * formulas.matrix_parameters(SCAIL_14B) // 40 + 38 * row_scale_bytes(SCAIL_14B)
    assert found["merged-fp8"] == formulas.weight_bytes(SCAIL_14B, 1, 2) + more
    edges = needs_of(SCAIL, "merged-fp8")
    assert edges.largest_block == pytest.approx(2 * edges.block, rel=0.02)
    assert needs_of(BF16, "reference").weights["transformer"] == found["merged-bf16"] + lora


@pytest.mark.parametrize(
    ("change", "stage", "more"),
    [
        ({"lora_rank": 128}, SAMPLE, True),
        ({"contexts": 2}, SAMPLE, True),
        ({"batch": 2}, SAMPLE, True),
        ({"num_frames": 161}, SAMPLE, True),
        ({"window": 49}, SAMPLE, False),
        ({"fp8_file": False}, SAMPLE, True),
        ({"element_bytes": 4}, DECODE, True),
        ({"width": 1024}, DECODE, True),
        ({"height": 1280}, FRAMES, True),
        ({"extra_parameters": 10**9}, PROJECT, True),
        ({"text_parameters": 10**9}, TEXT, False),
        ({"dit": WAN_I2V_14B, "pipeline": "wan_i2v"}, SAMPLE, False),
    ],
)
def test_every_number_of_the_job_counts(change, stage, more):
    allow = Allowed()
    before = choose(1e12, request="offload", allow=allow).peak_bytes[stage]
    after = choose(1e12, replace(SCAIL, **change), request="offload", allow=allow).peak_bytes[stage]
    assert (after > before) if more else (after < before)


def test_tokens_are_those_of_the_pipelines():
    assert SCAIL.tokens == 48_832
    assert TABLE_JOBS["SteadyDancer 480x832"].tokens == 35_880
    assert TABLE_JOBS["Wan I2V 14B 832x480"].tokens == 32_760
    assert replace(SCAIL, width=416, height=672).tokens == 29_757
    assert replace(SCAIL, num_frames=481, window=81).tokens == 48_832


def test_copies_of_constants_agree_with_their_source():
    assert (memory_needs.PIECE_PIXELS, memory_needs.MAX_PIECE) == (
        frames.PIECE_PIXELS,
        frames.MAX_PIECE,
    )
    assert storage.STORAGES == STORAGES
    for width, height in ((128, 224), (416, 672), (512, 896)):
        work = replace(SCAIL, width=width, height=height)
        assert work.piece == frames.piece_length(height, width)


# Choice


@pytest.mark.parametrize(
    ("free", "mode"),
    [(80 * GB, "resident"), (24 * GB, "offload"), (16 * GB, "stream"), (12 * GB, "stream")],
)
def test_the_first_that_fits_is_taken(free, mode):
    plan = choose(free)
    assert plan.mode == mode
    assert plan.peak <= free - margin_bytes(free)
    assert (plan.blocks_to_swap > 0) == (mode == "stream")
    assert plan.free_kv_weights == (mode != "resident")
    assert bool(plan.host_bytes) == (mode != "resident")


def test_as_few_blocks_are_swapped_as_fit():
    for free in range(10, 20):
        plan = choose(free * GB)
        usable = free * GB - margin_bytes(free * GB)
        peak = choose(1e12, request="stream", allow=Allowed(blocks_to_swap=plan.blocks_to_swap - 1))
        assert peak.peak_bytes[SAMPLE] > usable


@settings(max_examples=60, deadline=None)
@given(
    st.floats(5, 200),
    st.sampled_from(list(TABLE_JOBS)),
    st.sampled_from(STORAGES),
    st.sampled_from([None, 49]),
)
def test_a_plan_fits_and_more_memory_never_makes_it_worse(free, name, kind, window):
    order = {"resident": 0, "offload": 1, "stream": 2}
    work, allow = replace(TABLE_JOBS[name], window=window), Allowed(storages=(kind,))
    try:
        plan = choose(free * GB, work, allow=allow)
    except OutOfMemory:
        return
    assert plan.peak <= free * GB - margin_bytes(int(free * GB))
    larger = choose(free * GB * 1.3, work, allow=allow)
    assert order[larger.mode] <= order[plan.mode]
    assert larger.blocks_to_swap <= plan.blocks_to_swap
    assert plan.why


def test_storages_are_tried_in_order():
    first, second = ("merged-bf16", "merged-fp8"), ("merged-fp8", "merged-bf16")
    assert choose(80 * GB, allow=Allowed(storages=first)).storage == "merged-bf16"
    assert choose(80 * GB, allow=Allowed(storages=second)).storage == "merged-fp8"
    plan = choose(24 * GB, allow=Allowed(storages=first))
    assert (plan.mode, plan.storage) == ("offload", "merged-fp8")
    assert any("merged-bf16" in sentence for sentence in plan.why)


def test_what_is_evicted_when():
    plan = choose(24 * GB, request="offload")
    for stage, names in plan.evict.items():
        assert memory_needs.COMPONENT_OF[stage] not in names
        assert len(names) == 3
    assert not any(choose(80 * GB).evict.values())
    text_only = choose(16 * GB, TABLE_JOBS["Wan T2V 1.3B 832x480"])
    assert all("image_encoder" not in names for names in text_only.evict.values())
    assert FRAMES not in text_only.peak_bytes


def test_requests_are_obeyed_where_they_fit():
    for request in ("resident", "offload", "stream"):
        plan = choose(200 * GB, request=request)
        assert plan.mode == request
        assert any(request in sentence for sentence in plan.why)
    assert choose(200 * GB, request="stream").blocks_to_swap == 3
    plan = choose(200 * GB, allow=Allowed(blocks_to_swap=25))
    assert (plan.mode, plan.blocks_to_swap) == ("stream", 25)
    assert choose(200 * GB, allow=Allowed(blocks_to_swap=0)).mode == "resident"
    assert choose(24 * GB, allow=Allowed(blocks_to_swap=0)).mode == "offload"
    with pytest.raises(OutOfMemory, match="'blocks_to_swap' auto"):
        choose(16 * GB, allow=Allowed(blocks_to_swap=0))


@pytest.mark.parametrize(
    ("request_", "swapped", "match"),
    [
        ("resident", 5, "needs memory 'stream' or 'auto'"),
        ("offload", 5, "needs memory 'stream' or 'auto'"),
        ("stream", 0, "contradict"),
        ("auto", 41, "0 to 40"),
        ("auto", -1, "0 to 40"),
        ("best", "auto", "auto, resident, offload, stream"),
    ],
)
def test_contradictions_are_refused(request_, swapped, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        choose(80 * GB, request=request_, allow=Allowed(blocks_to_swap=swapped))
    assert caught.value.field in ("memory", "blocks_to_swap")


def test_tiles_are_taken_where_asked_for_or_where_they_help():
    work = replace(SCAIL, vae_chunk=1)
    whole, tiled = choose(80 * GB, work), choose(80 * GB, work, allow=Allowed(tile=True))
    assert not whole.tile
    assert tiled.tile
    assert tiled.peak_bytes[DECODE] != whole.peak_bytes[DECODE]
    # Overlapping tiles remember more than the picture: they are no way out by themselves.
    assert tiled.peak_bytes[DECODE] > whole.peak_bytes[DECODE]
    wide = replace(
        TABLE_JOBS["Wan T2V 1.3B 832x480"],
        width=1280,
        height=704,
        num_frames=17,
        tile=(640, 704),
        stride=(639, 703),
    )
    needs = needs_of(wide, "reference")
    assert needs.decode(1, tile=True) < needs.decode(1, tile=False)
    between = (needs.decode(1, tile=True) + needs.decode(1, tile=False)) // 2
    between += needs.weights["vae"] + needs.kv_cache
    free = between + margin_bytes(between) + 10**7
    assert choose(free, wide).tile
    with pytest.raises(OutOfMemory):
        choose(free, wide, allow=Allowed(tile=False))


def test_the_vae_takes_smaller_pieces_before_anything_else_changes():
    work = replace(
        TABLE_JOBS["Wan T2V 1.3B 832x480"], width=448, height=256, num_frames=17, text_parameters=0
    )
    assert work.piece == 4
    whole = choose(80 * GB, work)
    assert whole.vae_chunk == 4
    assert whole.peak == whole.peak_bytes[DECODE]
    tight = choose(whole.peak + margin_bytes(whole.peak) - 10**6, work)
    assert (tight.mode, tight.vae_chunk) == ("resident", 3)


def test_the_vae_takes_longer_pieces_where_memory_lies_idle():
    # By the size alone one latent frame at a time; sampling takes more than longer pieces do.
    assert SCAIL.piece == 1
    plan = choose(80 * GB)
    assert plan.vae_chunk > 1
    assert plan.peak_bytes[DECODE] <= plan.peak
    assert plan.peak == choose(80 * GB, replace(SCAIL, vae_chunk=1)).peak
    again = build_plan(plan.needs, plan.mode, tile=False, swapped=0, chunk=plan.vae_chunk + 1)
    assert plan.vae_chunk == memory_needs.MAX_PIECE or again.peak > plan.peak


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_fixed_piece_is_kept_and_counted(chunk):
    work = replace(SCAIL, vae_chunk=chunk)
    for free in (200 * GB, 80 * GB):
        assert choose(free, work).vae_chunk == chunk
    plan = choose(200 * GB, work, request="offload")
    by_size = choose(200 * GB, replace(SCAIL, vae_chunk=1), request="offload")
    assert (plan.peak_bytes[DECODE] > by_size.peak_bytes[DECODE]) == (chunk > 1)
    lowered = lower(plan)
    assert lowered is not None
    assert lowered.vae_chunk == chunk
    with pytest.raises(OutOfMemory):
        choose(16 * GB, replace(work, vae_chunk=16))


def test_the_text_encoder_is_streamed_only_where_it_must_be():
    assert choose(12 * GB).stream_encoder
    assert choose(12 * GB).peak_bytes[TEXT] < 4 * GB
    assert not choose(16 * GB).stream_encoder
    small = choose(8 * GB, TABLE_JOBS["Wan T2V 1.3B 832x480"])
    assert (small.mode, small.keep_transformer, small.stream_encoder) == ("offload", True, True)
    small = choose(6 * GB, TABLE_JOBS["Wan T2V 1.3B 832x480"])
    assert (small.mode, small.blocks_to_swap, small.stream_encoder) == ("stream", 0, True)


def test_host_memory_is_a_limit_too():
    plan = choose(24 * GB, host_bytes=64 * GB)
    assert plan.host_bytes == sum(plan.needs.weights.values())
    with pytest.raises(OutOfMemory, match="wait on the host") as caught:
        choose(24 * GB, host_bytes=16 * GB)
    assert caught.value.code == "HOST_OOM"
    assert choose(80 * GB, host_bytes=16 * GB).mode == "resident"


# What does not fit


def test_the_refusal_says_need_have_and_what_would_fit():
    with pytest.raises(OutOfMemory) as caught:
        choose(8 * GB)
    message = caught.value.message
    assert caught.value.field == "memory"
    assert caught.value.code == "GPU_OOM"
    usable = 8 * GB - margin_bytes(8 * GB)
    width, height, count = fits_hint(needs_of(SCAIL, "reference"), usable)
    for part in ("512x896x81", "8.0 GB free", "to sample", f"{width}x{height} with {count} frames"):
        assert part in message
    assert choose(8 * GB, replace(SCAIL, width=width, height=height, num_frames=count))


def test_a_request_that_cannot_fit_names_the_way_out():
    with pytest.raises(OutOfMemory, match="memory 'auto' or 'stream'"):
        choose(24 * GB, request="resident")
    with pytest.raises(OutOfMemory, match="no tiles"):
        choose(8 * GB, allow=Allowed(tile=True))
    with pytest.raises(OutOfMemory, match="use a larger card"):
        choose(2 * GB)


@settings(max_examples=40, deadline=None)
@given(st.floats(3, 10), st.sampled_from(list(TABLE_JOBS)), st.integers(8, 40), st.integers(8, 40))
def test_what_the_hint_names_fits_and_keeps_the_shape(free, name, columns, rows):
    work = replace(TABLE_JOBS[name], width=32 * columns, height=32 * rows)
    usable = int(free * GB)
    width, height, count = fits_hint(needs_of(work, "reference"), usable)
    if not width:
        return
    assert width <= work.width
    assert height <= work.height
    assert count <= 81
    assert count % 4 == 1
    assert width % 32 == height % 32 == 0
    smaller = replace(work, width=width, height=height, num_frames=count)
    plan = choose(1e12, smaller, request="stream", allow=Allowed(blocks_to_swap=work.dit.layers))
    assert plan.peak_bytes[SAMPLE] <= usable


# The next lower plan


@pytest.mark.parametrize("name", list(TABLE_JOBS))
def test_each_lower_plan_takes_no_more_and_the_last_one_is_the_end(name):
    plan, seen = choose(200 * GB, TABLE_JOBS[name]), []
    while plan is not None:
        seen.append(plan)
        plan = lower(plan)
    assert seen[0].mode == "resident"
    assert [p.mode for p in seen[1:3]] == ["offload", "stream"]
    sampling = [p.peak_bytes[SAMPLE] for p in seen]
    assert sampling == sorted(sampling, reverse=True)
    assert seen[-1].peak < seen[0].peak / 2
    swapped = [p.blocks_to_swap for p in seen]
    assert swapped == sorted(swapped)
    assert swapped[-1] == seen[0].needs.blocks
    windows = [p.context_frames for p in seen if p.context_frames]
    assert windows == [65, 49, 33, 17]
    assert all("changes the result" in p.why[0] for p in seen if p.context_frames)
    assert not any("changes the result" in p.why[0] for p in seen if not p.context_frames)


def test_smaller_pieces_and_tiles_come_before_the_swap():
    work = replace(SCAIL, width=256, height=448)
    plan = choose(24 * GB, work, request="offload")
    assert (plan.mode, plan.vae_chunk) == ("offload", 4)
    assert lower(plan).vae_chunk == 1
    wide = replace(BF16, tile=(256, 448), stride=(255, 447), vae_chunk=1)
    steps = [lower(choose(80 * GB, wide, request="offload"))]
    steps.append(lower(steps[0]))
    assert [(p.tile, p.blocks_to_swap > 0) for p in steps] == [(True, False), (True, True)]


def test_a_window_of_the_job_is_where_the_smaller_ones_start():
    plan = choose(80 * GB, replace(SCAIL, num_frames=161, window=49), request="stream")
    while plan.context_frames is None:
        plan = lower(plan)
    assert plan.context_frames == 33


def test_fits_looks_at_device_and_host():
    plan = choose(24 * GB)
    assert fits(plan, plan.peak)
    assert not fits(plan, plan.peak - 1)
    assert fits(plan, plan.peak, plan.host_bytes)
    assert not fits(plan, plan.peak, plan.host_bytes - 1)


def test_a_tiny_job_needs_next_to_nothing():
    tiny = Workload(
        "scail",
        128,
        224,
        17,
        formulas.DitShape(128, 256, 2, 1, 20, image_tokens=17, pose_channels=20, text_dim=64),
        element_bytes=4,
        text_parameters=0,
        image_parameters=0,
    )
    plan = choose(4 * GB, tiny)
    assert plan.mode == "resident"
    assert TEXT not in plan.peak_bytes
    assert plan.peak < 1.5 * GB
