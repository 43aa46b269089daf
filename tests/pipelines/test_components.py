"""Where the networks lie while they work: the pictures are the same, the memory is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.loading import LoadOptions, load_tiny
from pipelines.memory import choose_memory
from pipelines.memory_needs import Workload, needs_of
from pipelines.plan_shapes import TINY_DITS, TINY_VAE
from pipelines.wan_video import WanOptions, WanVideoPipeline
from xicon_infer.errors import Cancelled
from xicon_infer.types import SilentProgress

OPTIONS = WanOptions(
    width=64, height=48, num_frames=5, num_inference_steps=2, seed=3, guidance_scale=2.0
)
WORK = Workload(
    "wan_i2v", 64, 48, 5, TINY_DITS["wan_i2v"], vae=TINY_VAE, element_bytes=4, contexts=2
)


def plan(request: str, swapped: int = 0):
    chosen = choose_memory(
        lambda storage: needs_of(replace(WORK, text_parameters=0, image_parameters=0), storage),
        free_bytes=10**12,
        request=request,
    )
    return replace(chosen, blocks_to_swap=swapped or chosen.blocks_to_swap)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return WanVideoPipeline(load_tiny("wan_i2v"))(OPTIONS, picture()).clip.frames


@pytest.mark.parametrize(
    ("request_", "swapped", "encoder"),
    [("resident", 0, False), ("offload", 0, False), ("stream", 2, False), ("stream", 1, True)],
)
def test_every_plan_makes_the_same_pictures(expected, request_, swapped, encoder):
    parts = load_tiny("wan_i2v")
    parts.follow(replace(plan(request_, swapped), stream_encoder=encoder))
    pipeline = WanVideoPipeline(parts)
    for _ in range(2):
        parts.cache.clear()
        np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)


def test_plans_may_change_between_jobs(expected):
    parts = load_tiny("wan_i2v")
    pipeline = WanVideoPipeline(parts)
    plans = (plan("stream", 2), plan("resident"), plan("offload"), plan("stream", 1), None)
    for chosen in plans:
        parts.follow(chosen)
        np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)
        assert parts.resident == (chosen is None or chosen.mode == "resident")


def test_a_stopped_job_leaves_the_weights_where_they_were(expected):
    parts = load_tiny("wan_i2v")
    parts.follow(plan("stream", 2))
    pipeline = WanVideoPipeline(parts)

    class Stop(SilentProgress):
        def step(self, done, total, unit="step"):
            if unit == "step":
                raise Cancelled("stop")

    with pytest.raises(Cancelled):
        pipeline(OPTIONS, picture(), progress=Stop())
    np.testing.assert_array_equal(pipeline(OPTIONS, picture()).clip.frames, expected)


def test_what_comes_to_the_device_and_what_waits(monkeypatch):
    """Without keys and values for sampling, and without blocks for the conditioning."""
    from pipelines import components
    from xicon_infer.ops import offload, placing

    parts = load_tiny("wan_i2v")
    parts.follow(plan("offload"))
    names = {id(t): n for n, t in parts.transformer.named_parameters()}
    names |= {id(t): f"vae.{n}" for n, t in parts.vae.named_parameters()}
    brought: list[str] = []
    real = placing.bring

    def watch(tensors, device):
        tensors = list(tensors)
        brought.extend(names[id(t)] for t in tensors if id(t) in names)
        return real(tensors, device)

    for module in (placing, offload):
        monkeypatch.setattr(module, "bring", watch)
    assert components.placed is placing.placed
    with parts.on_device("vae"):
        assert set(brought) == {f"vae.{n}" for n, _ in parts.vae.named_parameters()}
    brought.clear()
    with parts.sampling():
        found = set(brought)
    kv = {n for n in names.values() if ".cross_attn.k" in n or ".cross_attn.v" in n}
    assert len(kv) == 2 * 4 * 2
    assert found == {n for n in names.values() if not n.startswith("vae.")} - kv
    brought.clear()
    with parts.projecting():
        found = set(brought)
    assert not [n for n in found if n.startswith("blocks.") and "norm_k" not in n]


def test_everything_stays_where_there_is_room():
    parts = load_tiny("wan_i2v")
    parts.device = torch.device("meta")
    with parts.on_device("vae"):
        pass
    assert {t.device.type for t in parts.vae.parameters()} == {"meta"}


def test_weights_are_read_to_where_they_stay():
    cuda = torch.device("cuda")
    assert LoadOptions(device=cuda).home == cuda
    assert LoadOptions(device=cuda, plan=plan("resident")).home == cuda
    assert LoadOptions(device=cuda, plan=plan("offload")).home == torch.device("cpu")
    assert LoadOptions().home == torch.device("cpu")


def test_the_vae_takes_as_many_frames_at_once_as_the_plan_says(expected):
    parts = load_tiny("wan_i2v")
    parts.follow(replace(plan("offload"), vae_chunk=1))
    assert parts.vae_chunk == 1
    seen = []
    real = parts.vae.decode_step
    parts.vae.decode_step = lambda x, state: seen.append(x.shape[2]) or real(x, state)
    frames = WanVideoPipeline(parts)(replace(OPTIONS, num_frames=13), picture()).clip.frames
    assert len(frames) == 13
    assert set(seen) == {1}
