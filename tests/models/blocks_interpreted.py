"""Whole blocks with the fused kernels, in Triton's interpreter; `test_wan_kernels` runs this file.

Triton decides at import whether it interprets, so these tests need a process of their own.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.builders import normal, tiny_scail, tiny_wan
from tests.parity import dit
from tests.parity.golden import Golden
from xicon_infer.models import wan
from xicon_infer.models.wan import plain_rope
from xicon_infer.ops import fused_triton
from xicon_infer.ops.fused_choice import Choice
from xicon_infer.ops.linear import Fp8Linear, quantize_weight, replace_linears, use_matmul
from xicon_infer.ops.offload import BlockSwap

# The interpreter computes in numpy, which warns where a GPU makes NaN or infinity in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GOLDEN = Path(__file__).parents[1] / "golden"

# What is left between the products of a block in bf16: the modulation of all six, GELU, and the
# sum of the two cross-attentions.
MOST_ELEMENTWISE = 3
NOT_WORK = ("view", "t", "transpose", "unsqueeze", "unbind", "slice", "expand", "detach", "split")
PRODUCTS = ("mm", "addmm", "bmm", "linear", "_scaled_mm")


class Counts(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made[f"{function.namespace}.{function.overloadpacket.__name__}"] += 1
        return function(*args, **(kwargs or {}))

    def elementwise(self):
        """Returns the operators that read and write tokens and are no product or attention."""
        left = Counter(self.made)
        for name in list(left):
            short = name.partition(".")[2]
            known = ("empty", "new_empty", "alias", *NOT_WORK, *PRODUCTS)
            attention = "attention" in short
            if short.strip("_") in known or short in known or attention or "view" in short:
                del left[name]
        return left


def velocity(model, *, frames=2, image=None, batch=1):
    context = model.encode_context([normal(5, 24, seed=1 + n) for n in range(batch)], image)
    channels = model.config.in_dim
    latents = normal(batch, 16, frames, 4, 6)
    condition = None if channels == 16 else normal(batch, channels - 16, frames, 4, 6, seed=4)
    return model(latents, torch.linspace(100, 900, batch), context, condition)


def in_fp8(model):
    """Makes every linear layer of the blocks multiply rows in fp8."""
    wide = {n: m for n, m in model.blocks.named_modules() if type(m) is torch.nn.Linear}
    state = {n: (m.weight.data, m.bias.data) for n, m in wide.items()}
    dtypes = {f"{n}.weight": torch.float8_e4m3fn for n in wide}
    replace_linears(model.blocks, dtypes, {f"{n}.scale_weight": (1,) for n in wide})
    for name, (weight, bias) in state.items():
        layer = model.blocks.get_submodule(name)
        layer.weight.data, layer.scale_weight = quantize_weight(weight)
        layer.bias.data = bias
    assert use_matmul(model, "scaled_mm_row", torch.device("cpu")) == []
    return model


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_kernels_are_interpreted_here():
    assert fused_triton.INTERPRETED


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_a_model_gives_the_same_velocity(image, fused):
    model = tiny_wan(image=image)
    states = normal(2, 7, 20, seed=3) if image else None
    expected = velocity(model, image=states, batch=2)
    if fused:
        model.fuse_projections()
    model.kernels_request = "triton"
    torch.testing.assert_close(
        velocity(model, image=states, batch=2), expected, rtol=1e-5, atol=1e-5
    )


def test_scail_with_its_three_parts_gives_the_same_velocity():
    model = tiny_scail()
    context = model.encode_context([normal(5, 24, seed=1)], normal(1, 7, 20, seed=3))
    parts = {
        "reference": model.embed_reference(normal(1, 16, 1, 8, 8, seed=5)),
        "pose": model.embed_pose(normal(1, 16, 2, 4, 4, seed=6)),
    }
    given = (normal(1, 16, 2, 8, 8), torch.tensor([700.0]), context)
    expected = model(*given, **parts)
    for fused in (False, True):
        if fused:
            model.fuse_projections()
        model.kernels_request = "triton"
        torch.testing.assert_close(model(*given, **parts), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_in_its_class():
    model = tiny_wan()
    exact = velocity(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("time", "head")):
            module.to(torch.bfloat16)
    errors = {}
    for kernels in ("eager", "triton"):
        model.kernels_request = kernels
        errors[kernels] = relative(velocity(model), exact)
    assert 0 < errors["triton"] < 1.1 * errors["eager"] < 2e-2


@pytest.mark.parametrize("fused", [False, True])
def test_products_in_fp8_stay_in_their_class(fused):
    model = tiny_wan()
    exact = velocity(model)
    in_fp8(model)
    errors = {"eager": relative(velocity(model), exact)}
    if fused:
        model.fuse_projections()
    model.kernels_request = "triton"
    errors["triton"] = relative(velocity(model), exact)
    assert 0 < errors["triton"] < 1.2 * errors["eager"] < 0.1


def one_block(model):
    """Returns the operators of one pass of the first block, as bfloat16."""
    block = model.layers[0].to(torch.bfloat16)
    block.modulation.data = block.modulation.data.float()
    context = block.cross_attn.project(
        normal(1, 5, 64).bfloat16(), normal(1, 7, 64, seed=2).bfloat16()
    )
    rope = plain_rope((1, 2, 3), 32)
    with Counts() as counts:
        block(normal(1, 6, 64).bfloat16(), normal(1, 6, 64), rope, context, "math", slice(None))
    return counts


def test_operators_between_the_products():
    eager = one_block(tiny_wan(image=True))
    model = tiny_wan(image=True)
    model.layers[0].kernels = "triton"
    found = one_block(model)
    left = found.elementwise()
    kernels = {n: left.pop(n) for n in list(left) if n.startswith("xicon.")}
    assert kernels == {"xicon.norm_rows": 4, "xicon.rms_rope": 3}
    assert sum(left.values()) <= MOST_ELEMENTWISE + 3, left  # casts of the modulation
    assert sum(eager.elementwise().values()) > 4 * sum(left.values()), eager.elementwise()


def test_no_pass_of_its_own_rounds_activations():
    model = in_fp8(tiny_wan(image=True))
    model.fuse_projections()
    model.layers[0].kernels = "triton"
    found = one_block(model)
    assert found.made["aten._scaled_mm"] == 6
    assert found.made["xicon.quantize_rows"] == 3  # two attention outputs, and GELU
    assert not any("vector_norm" in name for name in found.made), found.made


def test_blocks_that_come_and_go_may_be_fused():
    model = tiny_wan()
    model.kernels_request = "triton"
    model.fuse_projections()
    expected = velocity(model)
    swap = BlockSwap(model.layers, 2, torch.device("cpu"), pinned=False)
    with swap.attached():
        assert torch.equal(velocity(model), expected)
    assert torch.equal(velocity(model), expected)


@pytest.mark.slow
def test_the_golden_files_of_the_transformers_pass(monkeypatch):
    """All stored cases of tiny transformers, with the kernels in place of PyTorch's steps."""
    monkeypatch.setattr(wan, "choose_kernels", lambda *_: Choice("triton", "for this test"))
    files = sorted((GOLDEN / "wan_core").rglob("*.safetensors"))
    replays = (dit.replay_wan, dit.replay_scail, dit.replay_scail_windows)
    found = [replay(Golden(path, [GOLDEN])) for path in files for replay in replays]
    checks = [check for some in found for check in some or ()]
    assert len(checks) > 10
    assert not [check for check in checks if not check.ok]


def test_layers_are_what_they_seem():
    assert all(isinstance(m, Fp8Linear) for m in in_fp8(tiny_wan()).layers[0].ffn[::2])
