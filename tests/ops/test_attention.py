"""The attention entry: every kernel that runs here agrees, the choice is honest."""

from __future__ import annotations

import pytest
import torch

from tests.models.builders import normal
from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import attention_packages
from xicon_infer.ops.attention import (
    BACKENDS,
    EIGHT_BIT,
    POLICIES,
    attention,
    choose_backend,
    kernel_context,
    order_for,
    probe_backends,
    problem_of,
)
from xicon_infer.ops.attention_gate import TOLERANCE

CPU = torch.device("cpu")


def plain(q, k, v):
    """Returns the textbook formula in float64; [B, L, heads, head_dim]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def test_every_kernel_that_runs_here_agrees():
    q, k, v = (normal(2, n, 3, 64, seed=n) for n in (7, 11, 12))
    v = v[:, :11]
    ran = [probe.name for probe in probe_backends(CPU, torch.float32, 64) if probe.available]
    assert {"math", "sdpa", "int8"} <= set(ran)
    for name in ran:
        with kernel_context(name):
            out = attention(q, k, v, name)
        assert out.shape == q.shape
        exact = plain(q, k, v)
        error = (out.double() - exact).norm() / exact.norm()
        assert error < (TOLERANCE if name in EIGHT_BIT else 1e-5), name


def test_every_absent_kernel_says_why():
    probes = probe_backends(CPU)
    assert {probe.name for probe in probes} == set(BACKENDS)
    for probe in probes:
        assert probe.available == (not probe.reason)
    absent = {probe.name: probe.reason for probe in probes if not probe.available}
    for name in ("flash3", "flash2", "torch_flash3", "torch_flash4", "xformers", "sage"):
        assert absent[name] == "needs a CUDA device"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_takes_the_first_that_runs_and_nothing_8_bit(policy):
    assert choose_backend(policy, CPU, torch.float32, 64) == "flash"


def test_a_forced_kernel_that_is_absent_is_an_error():
    with pytest.raises(BackendUnavailable, match=r"'flash3' does not run on cpu.*needs a CUDA"):
        choose_backend("flash3", CPU, torch.float32, 32)
    with pytest.raises(BackendUnavailable, match="must be one of auto, auto8, ordered, flash3"):
        choose_backend("quick", CPU, torch.float32, 32)
    with pytest.raises(BackendUnavailable, match="heads of 64 or 128, not 32"):
        choose_backend("int8", CPU, torch.float32, 32)


def test_a_forced_kernel_is_the_one_that_runs():
    """Inside the context PyTorch may use that kernel only: one that cannot run must fail."""
    q = normal(1, 4, 1, 32)
    with kernel_context("cudnn"), pytest.raises(RuntimeError):
        attention(q, q, q, "cudnn")


def test_one_pass_has_a_single_kernel_of_pytorch():
    with pytest.raises(ValueError, match="single kernel"), kernel_context("flash", "math"):
        pass
    with kernel_context("flash", "flash"), kernel_context("int8", "math"):
        pass


def test_the_order_of_a_device_class(monkeypatch):
    def first(*capability: int) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        order = order_for(torch.device("cuda"))
        assert not set(order) & set(EIGHT_BIT)
        assert order[-1] == "math"
        return order[0]

    assert [first(8, 0), first(8, 6), first(8, 9)] == ["flash2", "flash2", "cudnn"]
    assert [first(9, 0), first(10, 0), first(12, 0)] == ["flash3", "cudnn", "cudnn"]
    assert first(7, 5) == "flash2"


class Flash:
    """Stands for `torch.nn.attention` where it can exchange its flash kernel."""

    def __init__(self, *, missing: bool = False) -> None:
        self.now: str | None = None
        self.missing = missing
        self.told: list[str | None] = []

    def current_flash_attention_impl(self) -> str | None:
        return self.now

    def activate_flash_attention_impl(self, name: str) -> None:
        if self.missing:
            raise ImportError("no such package")
        self.now = name
        self.told.append(name)

    def restore_flash_attention_impl(self) -> None:
        self.now = None
        self.told.append(None)


def test_another_flash_of_pytorch_is_put_in_and_taken_out(monkeypatch):
    flash = Flash()
    for name in dir(Flash):
        if name.endswith("_impl"):
            monkeypatch.setattr(torch.nn.attention, name, getattr(flash, name))
    q = normal(1, 4, 1, 64)
    with kernel_context("torch_flash3"):
        assert flash.now == "FA3"
        attention(q, q, q, "torch_flash3")
    with kernel_context("torch_flash4", "torch_flash4"):
        assert flash.now == "FA4"
    with kernel_context("flash"):
        assert flash.now is None
    assert flash.told == ["FA3", None, "FA4", None]
    flash.missing = True
    with pytest.raises(ImportError), kernel_context("torch_flash3"):
        pass


@pytest.mark.parametrize("lacks", ["activate_flash_attention_impl", "restore_flash_attention_impl"])
def test_a_pytorch_that_cannot_exchange_its_flash_says_so(lacks, monkeypatch):
    monkeypatch.delattr(torch.nn.attention, lacks, raising=False)
    attention_packages.use_flash("flash")
    with pytest.raises(RuntimeError, match="cannot exchange its flash kernel"):
        attention_packages.use_flash("torch_flash3")


def test_errors_are_told_in_one_line():
    assert attention_packages.first_line(torch.OutOfMemoryError("tried to\nallocate")) == (
        "out of memory"
    )
    assert attention_packages.first_line(RuntimeError("one\ntwo")) == "one"
    assert attention_packages.first_line(AssertionError()) == "AssertionError"


def test_an_8_bit_kernel_that_is_not_exact_is_refused_with_its_error(monkeypatch):
    from xicon_infer.ops import attention as module

    problem_of.cache_clear()
    monkeypatch.setattr(module, "int8_attention", lambda q, k, v: 1.2 * v[:, :1].expand_as(q))
    try:
        with pytest.raises(BackendUnavailable, match=r"relative error is \d.*more than the 0.05"):
            choose_backend("int8", CPU, torch.float32, 64)
    finally:
        problem_of.cache_clear()


@pytest.mark.parametrize("name", ["flash", "math", "int8"])
def test_a_compiled_graph_has_no_break(name):
    q = normal(1, 8, 2, 64)
    run = torch.compile(lambda q: attention(q, q, q, name) + 1, fullgraph=True, backend="aot_eager")
    with kernel_context(name):
        torch.testing.assert_close(run(q), attention(q, q, q, name) + 1)
