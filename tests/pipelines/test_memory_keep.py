"""A transformer that stays while encoders come and go, less what only its conditioning reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.dit_models import wan_config
from pipelines.loading import LoadOptions, load_tiny, set_loras
from pipelines.memory import choose_memory, lower, margin_bytes
from pipelines.memory_needs import DECODE, PROJECT, SAMPLE, TEXT, needs_of
from pipelines.memory_plan import POSE_ROOM, POSES, build_plan
from pipelines.plan_memory import TABLE_JOBS, memory_lines
from pipelines.wan_video import WanVideoPipeline
from tests.pipelines.test_components import OPTIONS, WORK, picture
from tests.tiny_models import lora_state
from xicon_infer.formulas import WAN_I2V_14B
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops import offload, placing
from xicon_infer.ops.placing import KV_PROJECTIONS, layer_of, tensors_of

GB = 10**9
SCAIL = TABLE_JOBS["SCAIL 512x896"]


def choose(free, work=SCAIL, **kwargs):
    return choose_memory(lambda kind: needs_of(work, kind), free_bytes=int(free), **kwargs)


def keeping():
    work = replace(WORK, text_parameters=0, image_parameters=0)
    needs = needs_of(work, "reference")
    return build_plan(needs, "offload", tile=False, swapped=0, chunk=needs.work.piece, keep=True)


# The plan


def test_what_sampling_needs_of_the_true_shapes():
    """11.95 of 16.15 G weights of the blocks; counted on the model itself and by the plan."""
    with torch.device("meta"):
        model = WanTransformer(wan_config(WAN_I2V_14B))
    every = sum(p.numel() for block in model.layers for p in block.parameters() if p.ndim == 2)
    left = sum(
        p.numel()
        for block in model.layers
        for name in KV_PROJECTIONS
        for p in tensors_of(layer_of(block, name))
        if p.ndim == 2
    )
    assert (every, every - left) == (16_148_070_400, 11_953_766_400)
    work = replace(SCAIL, pipeline="wan_i2v", dit=WAN_I2V_14B, lora_rank=0)
    needs = needs_of(work, "reference")
    # One byte a weight, and little beside it: biases, norms, modulation, what is outside blocks.
    resting = needs.weights["transformer"] - needs.kv_weights
    assert 0 < resting - needs.outer - 11_953_766_400 < 30_000_000
    plan = build_plan(needs, "offload", tile=False, swapped=0, chunk=1, keep=True)
    weights = plan.peak_bytes[SAMPLE] - needs.stage_work[SAMPLE] - needs.kv_cache
    assert weights - needs.conditioning == resting


def test_the_transformer_stays_where_the_encoders_fit_beside_it():
    plan = choose(32 * GB)
    assert (plan.mode, plan.keep_transformer, plan.stream_encoder) == ("offload", True, False)
    assert not any("transformer" in names for names in plan.evict.values())
    assert all("text_encoder" in names for stage, names in plan.evict.items() if stage != TEXT)
    assert any("transformer stays" in sentence for sentence in plan.why)
    small = choose(24 * GB)
    assert (small.keep_transformer, small.stream_encoder) == (True, True)
    assert not choose(80 * GB).keep_transformer
    assert not choose(16 * GB).keep_transformer
    assert not choose(32 * GB, request="offload").keep_transformer


def test_its_bytes_are_counted_in_every_stage():
    alone, plan = choose(32 * GB, request="offload"), choose(32 * GB)
    resting = plan.needs.weights["transformer"] - plan.needs.kv_weights
    for stage in (TEXT, DECODE):
        assert plan.peak_bytes[stage] - alone.peak_bytes[stage] == resting
    assert plan.peak_bytes[SAMPLE] == alone.peak_bytes[SAMPLE]
    more = plan.peak_bytes[PROJECT] - alone.peak_bytes[PROJECT]
    assert more == resting - plan.needs.outer
    assert plan.peak_bytes[POSES] == resting + POSE_ROOM
    assert POSES not in choose(32 * GB, TABLE_JOBS["Wan I2V 14B 832x480"]).peak_bytes


def test_without_room_for_poses_it_does_not_stay():
    work = replace(SCAIL, width=256, height=448, num_frames=17)
    plan = choose(40 * GB, work)
    resting = plan.needs.weights["transformer"] - plan.needs.kv_weights
    enough = int((resting + POSE_ROOM) / 0.95) + 10**7
    assert choose(enough, work).keep_transformer
    less = choose(enough - 10**8, work)
    assert not less.keep_transformer
    assert less.peak <= enough - 10**8 - margin_bytes(enough - 10**8)


def test_after_running_out_of_memory_it_goes_first():
    plan = choose(32 * GB)
    lowered = lower(plan)
    assert (lowered.mode, lowered.keep_transformer, lowered.blocks_to_swap) == ("offload", False, 0)
    assert lower(lowered).mode == "stream"


def test_the_terminal_is_told():
    assert any("stays on the device" in line for line in memory_lines(choose(24 * GB), "24GB"))


# What it does


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return WanVideoPipeline(load_tiny("wan_i2v"))(OPTIONS, picture()).clip.frames


@pytest.fixture
def watched(monkeypatch):
    """Components that follow the plan, and the transformer's tensors that were brought."""
    parts = load_tiny("wan_i2v")
    parts.follow(keeping())
    names = {id(t): name for name, t in parts.transformer.named_parameters()}
    brought: list[str] = []
    real = placing.bring

    def watch(tensors, device):
        tensors = list(tensors)
        brought.extend(names[id(t)] for t in tensors if id(t) in names)
        return real(tensors, device)

    for module in (placing, offload):
        monkeypatch.setattr(module, "bring", watch)
    return parts, brought


def test_the_pictures_are_the_same_and_blocks_are_brought_once(watched, expected):
    parts, brought = watched
    pipeline = WanVideoPipeline(parts)
    for _ in range(3):
        parts.cache.clear()
        np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)
    queries = [name for name in brought if name.endswith("self_attn.q.weight")]
    assert len(queries) == len(set(queries)) == len(parts.transformer.layers)
    assert not [name for name in brought if ".cross_attn.k.weight" in name]


def test_another_plan_lets_it_go(watched, expected):
    parts, _ = watched
    pipeline = WanVideoPipeline(parts)
    home = parts.transformer.layers[0].self_attn.q.weight.data_ptr()
    pipeline(OPTIONS, picture())
    parts.follow(keeping())
    assert parts._held is not None, "the same plan leaves it"
    for plan in (replace(keeping(), keep_transformer=False), None):
        parts.follow(plan)
        assert parts._held is None
        assert parts.transformer.layers[0].self_attn.q.weight.data_ptr() == home
        np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)


def test_a_lora_goes_on_the_weights_and_not_on_their_copy(watched, expected, tmp_path):
    parts, _ = watched
    pipeline = WanVideoPipeline(parts)
    pipeline(OPTIONS, picture())
    path = tmp_path / "side.safetensors"
    save_file(lora_state(dict(parts.transformer.state_dict())), path)
    set_loras(parts, LoadOptions(loras=((str(path), 1.0),), plan=parts.plan))
    assert parts._held is None
    changed = pipeline(OPTIONS, picture()).clip.frames
    assert not np.array_equal(changed, expected)
    set_loras(parts, LoadOptions(plan=parts.plan))
    np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)


def test_a_device_that_is_full_leaves_nothing_there(watched, monkeypatch):
    parts, _ = watched
    real = offload.bring

    def full(tensors, device):
        tensors = list(tensors)
        if tensors and any(t is parts.transformer.layers[-1].ffn[0].weight for t in tensors):
            raise torch.OutOfMemoryError("full")
        return real(tensors, device)

    monkeypatch.setattr(offload, "bring", full)
    home = parts.transformer.layers[0].self_attn.q.weight.data_ptr()
    with pytest.raises(torch.OutOfMemoryError), parts.sampling():
        pass
    assert parts._held is None
    assert parts.transformer.layers[0].self_attn.q.weight.data_ptr() == home
