"""The sampling loop of every recipe: no waiting for the device, nothing computed twice.

It runs with a transformer on the meta device, where every look at a value is an error, and with
one on the CPU under a mode that counts operations.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import scail, steady_dancer, wan_video
from pipelines.loading import load_tiny
from pipelines.plan_windows import STILL
from xicon_infer.sampling.cache_options import CacheOptions
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.types import SilentProgress

STEPS = 4
CACHED_STEPS = 12
"""The fewest that a step cache takes."""
SIDE = 32
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
NAMES = ("scail", "steady_dancer", "wan_i2v", "wan_t2v")
PICTURE = np.zeros((SIDE, SIDE, 3), np.uint8)
WINDOWS = ContextOptions(schedule=STILL, frames=17, overlap=4)


class Operations(TorchDispatchMode):
    """Counts every operation by name, and copies between devices apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen[func.name().removeprefix("aten::").split(".")[0]] += 1
        source = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if isinstance(result, torch.Tensor) and source is not None:
            self.sent += source.device != result.device and func.name() == "aten::_to_copy"
        return result


@functools.cache
def networks(name: str):
    return load_tiny(name)


def told_of(name: str, frames: int, **changes: Any):
    """Returns the networks, what the transformer is told, and the options."""
    parts, quiet = networks(name), SilentProgress()
    steps = CACHED_STEPS if "step_cache" in changes else STEPS
    common = {"width": SIDE, "height": SIDE, "num_inference_steps": steps, "seed": 1}
    common |= {"scheduler": "dpm++_sde", "guidance_scale": 1.0, **changes}
    films = np.zeros((frames, SIDE, SIDE, 3), np.uint8)
    if name == "scail":
        options = scail.ScailOptions(**common)
        halves = films[:, ::2, ::2]
        return parts, scail.encode_conditioning(parts, PICTURE, halves, options, quiet), options
    if name == "steady_dancer":
        options = steady_dancer.SteadyDancerOptions(**{"condition_guide_scale": 0.0, **common})
        videos = [films, films] if options.needs_negative_pose else [films]
        return (
            parts,
            steady_dancer.encode_conditioning(parts, PICTURE, videos, options, quiet),
            options,
        )
    options = wan_video.WanOptions(num_frames=frames, **common)
    first = PICTURE if name == "wan_i2v" else None
    return parts, wan_video.encode_conditioning(parts, first, None, options, quiet), options


def sample(name: str, model, told, frames: int, options) -> torch.Tensor:
    quiet = SilentProgress()
    if name == "scail":
        return scail.sample(model, told, frames, options, quiet)
    if name == "steady_dancer":
        return steady_dancer.sample(model, told, options, quiet)
    return wan_video.sample(model, told, frames, options, quiet)


def to_meta(value):
    """Returns a conditioning with every tensor on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_meta(part) for part in value))
    if isinstance(value, list):
        return [to_meta(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{n: to_meta(getattr(value, n)) for n in value.__dataclass_fields__})
    return value


CASES = {
    "plain": {},
    "guided": {"guidance_scale": 3.0, "guidance_batching": "sequential"},
    "batched": {"guidance_scale": 3.0, "guidance_batching": "batched"},
    "windows": {"context": WINDOWS},
    "moving": {"context": replace(WINDOWS, schedule="uniform_standard", stride=8)},
    "teacache": {"step_cache": CacheOptions("teacache", threshold=1.0)},
    "magcache": {"step_cache": CacheOptions("magcache", threshold=1.0), "context": WINDOWS},
    "unipc": {"scheduler": "unipc"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_host_never_waits_for_the_device(name: str, case: str) -> None:
    """A value that is read on the meta device raises; only noise and weights of windows are sent.

    TeaCache reads the time embeddings of all steps before the loop, which the meta device cannot
    give: there the CPU is watched, and that one read is allowed.
    """
    frames = 29 if "context" in CASES[case] else 5
    parts, told, options = told_of(name, frames, **CASES[case])
    model = parts.transformer
    if case != "teacache":
        model, told = copy.deepcopy(model).to("meta"), to_meta(told)
        model._rope_cache.clear()
    with Operations() as found:
        result = sample(name, model, told, frames, options)
    assert result.dtype == torch.float32
    reads = sum(found.seen[wait] for wait in WAITS)
    if case == "teacache":
        assert reads <= 1
        return
    assert reads == 0
    steps = options.num_inference_steps
    noise = steps if options.scheduler == "dpm++_sde" else 0
    shares = steps if "context" in CASES[case] else 0
    start_and_tables = 12
    indices = found.seen["index_select"] * 2  # windows with gaps are addressed by number
    assert found.sent <= noise + shares + start_and_tables + indices


@torch.no_grad()
def test_the_easy_cache_waits_once_per_decision() -> None:
    cache = CacheOptions("easycache", threshold=0.5, start=3, end=8)
    parts, told, options = told_of("wan_t2v", 5, step_cache=cache)
    with Operations() as found:
        sample("wan_t2v", parts.transformer, told, 5, options)
    assert found.seen["_local_scalar_dense"] == 5  # steps 4 to 8; step 3 has nothing to reuse


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_does_not_depend_on_the_step_is_made_once(name: str) -> None:
    """Per forward the products of the blocks and the head; once the three of the time embedding."""
    parts, told, options = told_of(name, 5)
    model = parts.transformer
    sample(name, model, told, 5, options)  # fills the tables of angles
    with Operations() as found:
        sample(name, model, told, 5, options)
    per_block = 4 + 2 + 2
    products = found.seen["addmm"] + found.seen["linear"]
    small = 0
    if name == "steady_dancer":  # the alignment with the noise, and the fused pose, made once
        small = products - STEPS * (len(model.blocks) * per_block + 1) - 3
        assert small % STEPS in (0, 1, 2, 3, 4)
    assert products == STEPS * (len(model.blocks) * per_block + 1) + 3 + small
    if name != "steady_dancer":
        assert found.seen["convolution"] == STEPS
    assert found.seen["cos"] == found.seen["sin"] == 1  # of all timesteps


def test_without_guidance_one_text_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        _, told, _ = told_of(name, 5)
        second = "without_prompt" if name == "steady_dancer" else "unconditional"
        assert getattr(told, second) is None
        _, told, _ = told_of(name, 5, guidance_scale=2.0)
        assert getattr(told, second) is not None
