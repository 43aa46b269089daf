"""What sampling costs, counted: no waiting for the device, nothing computed twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.loading import load_tiny
from pipelines.scail import ScailOptions, as_span, encode_conditioning, sample
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import SilentProgress, latent_frames

STEPS = 4
SIDE = 64


class Count(TorchDispatchMode):
    """Counts every operation by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def parts():
    return load_tiny("scail")


def count(parts, num_frames: int = 9, **changes) -> tuple[Counter[str], int]:
    """Returns the operations of the sampling loop, and how many forward passes it made."""
    options = ScailOptions(width=SIDE, height=SIDE, num_inference_steps=STEPS, **changes)
    pictures = np.zeros((num_frames, SIDE // 2, SIDE // 2, 3), np.uint8)
    reference = np.zeros((SIDE, SIDE, 3), np.uint8)
    quiet = SilentProgress()
    forwards = 0

    def tick(*_):
        nonlocal forwards
        forwards += 1

    with torch.no_grad():
        told = encode_conditioning(parts, reference, pictures, options, quiet)
        sample(parts.transformer, told, num_frames, options, quiet)  # fills the tables
        hook = parts.transformer.register_forward_hook(tick)
        with Count() as mode:
            sample(parts.transformer, told, num_frames, options, quiet)
        hook.remove()
    return mode.seen, forwards


def test_nothing_is_read_back_from_the_device(parts):
    seen, _ = count(parts)
    assert seen["_local_scalar_dense"] == 0
    assert seen["nonzero"] == 0


def test_reference_and_pose_are_embedded_once_per_job(parts):
    """Each forward embeds the noise alone."""
    seen, forwards = count(parts)
    assert forwards == STEPS
    assert seen["convolution"] == forwards


def test_keys_and_values_of_the_context_are_not_computed_again(parts):
    seen, forwards = count(parts)
    layers = len(parts.transformer.blocks)
    per_block = 4 + 2 + 2  # q k v o, cross q and o, feed-forward
    time, head = 2 + 1, 1
    assert seen["addmm"] + seen["linear"] == forwards * (layers * per_block + head) + time


def test_no_guidance_runs_one_branch_and_guidance_two(parts):
    assert count(parts)[1] == STEPS
    assert count(parts, guidance_scale=3.0, guidance_batching="sequential")[1] == 2 * STEPS
    assert count(parts, guidance_scale=3.0, guidance_batching="batched")[1] == STEPS


def test_every_window_is_one_forward(parts):
    cut = ContextOptions(schedule="static_standard", frames=17, overlap=4)
    assert latent_frames(33) == 9
    assert count(parts, 33, context=cut)[1] == 2 * STEPS


def test_windows_of_neighbours_are_views_of_the_pose(parts):
    assert as_span([3, 4, 5]) == slice(3, 6)
    assert as_span([7]) == slice(7, 8)
    assert as_span([5, 6, 0]) == [5, 6, 0]
    assert as_span([0, 2, 4]) == [0, 2, 4]
    cut = ContextOptions(schedule="static_standard", frames=17, overlap=4, freenoise=False)
    seen, _ = count(parts, 33, context=cut)
    assert seen["index"] == 0
