"""The attention entry: every kernel that runs here agrees, the choice is honest."""

from __future__ import annotations

import pytest
import torch

from tests.models.builders import normal
from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops.attention import (
    BACKENDS,
    attention,
    choose_backend,
    kernel_context,
    probe_backends,
)

CPU = torch.device("cpu")


def plain(q, k, v):
    """Returns the textbook formula in float64; [B, L, heads, head_dim]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def test_every_kernel_that_runs_here_agrees():
    q, k, v = (normal(2, n, 3, 32, seed=n) for n in (7, 11, 12))
    v = v[:, :11]
    ran = [probe.name for probe in probe_backends(CPU, torch.float32, 32) if probe.available]
    assert "math" in ran
    for name in ran:
        with kernel_context(name):
            out = attention(q, k, v, name)
        assert out.shape == q.shape
        torch.testing.assert_close(out.double(), plain(q, k, v), rtol=1e-5, atol=1e-5)


def test_every_absent_kernel_says_why():
    probes = probe_backends(CPU)
    assert {probe.name for probe in probes} == set(BACKENDS)
    for probe in probes:
        assert probe.available == (not probe.reason)
    absent = {probe.name: probe.reason for probe in probes if not probe.available}
    assert absent["flash3"] == absent["xformers"] == "needs a CUDA device"


def test_auto_takes_the_first_that_runs():
    assert choose_backend("auto", CPU, torch.float32, 32) in ("flash", "math")


def test_a_forced_kernel_that_is_absent_is_an_error():
    with pytest.raises(BackendUnavailable, match=r"'flash3' does not run on cpu.*needs a CUDA"):
        choose_backend("flash3", CPU, torch.float32, 32)
    with pytest.raises(BackendUnavailable, match="must be one of auto, flash3"):
        choose_backend("quick", CPU, torch.float32, 32)


def test_a_forced_kernel_is_the_one_that_runs():
    """Inside the context PyTorch may use that kernel only: one that cannot run must fail."""
    q = normal(1, 4, 1, 32)
    with kernel_context("cudnn"), pytest.raises(RuntimeError):
        attention(q, q, q, "cudnn")
