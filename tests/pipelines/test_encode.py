"""What is kept of an encoding: by content, on the host, within a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.condition_cache import ConditionCache, content_key
from pipelines.encode import encode_picture, encode_start, encode_text, encode_video
from pipelines.loading import load_tiny
from xicon_infer.types import SilentProgress

SILENT = SilentProgress()


@pytest.fixture
def parts():
    return load_tiny("wan_i2v")


def frames(seed: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 32, 48, 3), np.uint8)


def test_keys_differ_by_content_shape_dtype_and_kind():
    a = np.zeros((2, 3), np.uint8)
    keys = {
        content_key("x", a),
        content_key("y", a),
        content_key("x", a.T),
        content_key("x", a.astype(np.int8)),
        content_key("x", a, "crop"),
        content_key("x", a, None),
        content_key("x", "ab"),
        content_key("x", "a", "b"),
        content_key("x"),
    }
    assert len(keys) == 9
    assert content_key("x", a) == content_key("x", a.copy())
    assert content_key("x", np.zeros((3, 2), np.uint8).T) == content_key("x", a)


def test_the_oldest_go_first():
    cache = ConditionCache(max_bytes=48)
    for name in "abc":
        cache.put(name, torch.ones(4))
    assert cache.size_bytes == 48
    assert cache.get("a") is not None
    cache.put("d", torch.ones(4))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("large", torch.ones(100))
    assert cache.get("large") is None
    assert cache.get("d") is not None
    cache.clear()
    assert cache.size_bytes == 0


def test_an_entry_does_not_change_with_its_first_user():
    cache = ConditionCache()
    value = torch.ones(3)
    cache.put("a", value)
    value += 1
    assert cache.get("a").tolist() == [1, 1, 1]


def test_a_prompt_is_encoded_once_whatever_stands_beside_it(parts):
    both = encode_text(parts, ["a cat", "a dog"], SILENT)
    assert parts.cache.hits == 0
    again = encode_text(parts, ["a dog", "a fish", "a cat"], SILENT)
    assert parts.cache.hits == 2
    assert torch.equal(again[0], both[1])
    assert torch.equal(again[2], both[0])


def test_no_encoder_is_moved_for_what_is_known(parts, monkeypatch):
    used = []
    real = type(parts).on_device
    monkeypatch.setattr(type(parts), "on_device", lambda self, n: used.append(n) or real(self, n))
    for _ in range(2):
        encode_text(parts, ["a cat"], SILENT)
        encode_picture(parts, frames(0)[0], "stretch", SILENT)
        encode_video(parts, frames(0, 5), SILENT)
        encode_start(parts, frames(0)[0], 5)
    assert used == ["text_encoder", "image_encoder", "vae", "vae"]


def test_options_are_part_of_the_content(parts):
    stretch = encode_picture(parts, frames(0)[0], "stretch", SILENT)
    assert not torch.equal(stretch, encode_picture(parts, frames(0)[0], "center", SILENT))
    assert encode_start(parts, frames(0)[0], 5).shape == (1, 20, 2, 4, 6)
    assert encode_start(parts, frames(0)[0], 9).shape == (1, 20, 3, 4, 6)
    alone = encode_start(parts, frames(0)[0], 5)
    both = encode_start(parts, frames(0)[0], 5, last=frames(1)[0])
    assert not torch.equal(alone, both)


def test_a_start_image_is_the_same_as_its_whole_grey_video(parts):
    """The tail is cut where it repeats itself: 137 frames are encoded as 117."""
    seen = []
    real = parts.vae.encode_step
    parts.vae.encode_step = lambda x, state: seen.append(x.shape[2]) or real(x, state)
    short = encode_start(parts, frames(0)[0], 137)
    assert sum(seen) == 117
    grey = np.full((137, 32, 48, 3), 0, np.uint8)
    grey[0] = frames(0)[0]
    video = torch.zeros(1, 3, 137, 32, 48)
    video[0, :, 0] = torch.from_numpy(grey[0]).permute(2, 0, 1) / 127.5 - 1
    whole = parts.vae.normalize(parts.vae.encode(video))
    assert torch.allclose(short[:, 4:], whole, atol=1e-4)
    assert short.shape[2] == 35
