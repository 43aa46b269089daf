"""The optimiser does what its name says, and a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tools.tiny import optimise


def test_orthogonal_matrices() -> None:
    matrices = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optimise.orthogonalise(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_rate_rises_stays_and_falls() -> None:
    rates = [optimise.learning_rate(step, 100, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:70] == [1.0] * 60
    assert rates[85] == pytest.approx(0.5)
    assert rates[100] == 0


def build() -> tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    average = copy.deepcopy(model)
    return model, average, optimise.make_optimisers(model, 1e-2, weight_decay=0.01)


def run(
    parts: tuple[nn.Module, nn.Module, list[torch.optim.Optimizer]], first: int, last: int
) -> float:
    model, average, optimisers = parts
    loss = torch.zeros(())
    for step in range(first, last):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        optimise.update_average(average, model, step, longest=20)
    return loss.item()


def test_it_learns_and_the_average_follows() -> None:
    parts = build()
    early = run(parts, 0, 1)
    assert run(parts, 1, 150) < 0.3 * early
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(9))
    assert (parts[1](x) - x.flip(1)).square().mean() < 0.3 * early


def test_matrices_take_muon_and_the_rest_adamw() -> None:
    _, _, (muon, adam) = build()
    assert [p.ndim for p in muon.param_groups[0]["params"]] == [2, 2]
    assert [p.ndim for p in adam.param_groups[0]["params"]] == [1, 1]
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    muon, adam = optimise.make_optimisers(model, 1e-2, weight_decay=0, plain=("0",))
    assert len(muon.param_groups[0]["params"]) == 1
    assert len(adam.param_groups[0]["params"]) == 3


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = build()
    run(whole, 0, 20)
    first = build()
    run(first, 0, 9)
    optimise.save_run(tmp_path / "run.pt", 9, *first)
    second = build()
    assert optimise.restore_run(tmp_path / "run.pt", *second) == 9
    run(second, 9, 20)
    for left, right in zip(whole[:2], second[:2], strict=True):
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    assert optimise.restore_run(tmp_path / "none.pt", *build()) == 0
