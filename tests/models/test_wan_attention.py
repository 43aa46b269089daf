"""Which attention kernels the passes of a transformer use, and what is told of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models.builders import TINY, fill, normal
from xicon_infer.errors import BackendUnavailable
from xicon_infer.models import wan
from xicon_infer.models.wan import WanTransformer
from xicon_infer.ops.attention_choice import Choice, Pair


@pytest.fixture
def model():
    """A model whose heads are as wide as the 8-bit kernel takes them."""
    found = WanTransformer(replace(TINY, dim=128, num_heads=2, num_layers=2, image_dim=20))
    fill(found, 0)
    return found


def passed(model, frames=3):
    latents = normal(1, TINY.in_dim, frames, 8, 6)
    context = model.encode_context([normal(5, 24, seed=1)], normal(1, 9, 20, seed=2))
    return model(latents, torch.tensor([500.0]), context)


def test_8_bit_scores_change_the_velocity_a_little(model):
    model.attention_request = "math"
    exact = passed(model)
    model.attention_request = "int8"
    found = passed(model)
    error = (found - exact).norm() / exact.norm()
    assert 1e-6 < error < 0.02
    assert model.backend == "int8"


def test_every_length_of_a_job_is_told(model):
    passed(model, 3)
    passed(model, 2)
    passed(model, 3)
    assert list(model.attention_choices) == [24, 36]
    told = [choice.told() for choice in model.attention_choices.values()]
    assert told[1] == {"tokens": 36, "self": "flash", "cross": "flash", "chosen": "ordered"}


def test_self_and_cross_attention_may_use_different_kernels(model, monkeypatch):
    """The pair that is chosen is the pair that runs, in a block as a whole."""
    monkeypatch.setattr(
        wan, "choose_attention", lambda *_: Choice(Pair("int8", "math"), "timed", 36)
    )
    both = passed(model)
    assert {block.cross_attn.kernel for block in model.layers} == {"math"}
    monkeypatch.setattr(
        wan, "choose_attention", lambda *_: Choice(Pair("math", "int8"), "timed", 36)
    )
    assert not torch.equal(passed(model), both)


def test_a_kernel_that_is_not_there_is_told_before_a_pass(model):
    model.attention_request = "flash3"
    with pytest.raises(BackendUnavailable, match="flash3"):
        _ = model.backend
    with pytest.raises(BackendUnavailable, match="flash3"):
        passed(model)


def test_the_work_that_is_chosen_for_has_text_and_image(model, monkeypatch):
    seen = []

    def choose(request, work, folder):
        seen.append((request, work, folder))
        return Choice(Pair("math", "math"), "asked", work.own.queries)

    monkeypatch.setattr(wan, "choose_attention", choose)
    passed(model)
    ((request, work, folder),) = seen
    assert (request, folder) == ("auto", None)
    assert tuple(work.own) == (1, 36, 36, 2, 64)
    assert [shape.keys for shape in work.cross] == [TINY.text_len, 9]
