"""The memory benchmark: refuses without a GPU, and its recipe runs at small size on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import memory
from pipelines.memory import Allowed, choose_memory
from pipelines.memory_needs import DECODE, PROJECT, SAMPLE, Workload, needs_of
from tests.models.vae_cases import Meter
from xicon_infer.formulas import DitShape
from xicon_infer.formulas_vae import VaeShape

SMALL = DitShape(
    128, 256, 4, 1, 20, image_tokens=9, pose_channels=20, text_tokens=12, text_dim=24, image_dim=20
)
SHAPES = {
    "scail": SMALL,
    "wan_i2v": DitShape(
        128, 256, 4, 1, 36, image_tokens=9, text_tokens=12, text_dim=24, image_dim=20
    ),
    "wan_t2v": DitShape(128, 256, 4, 1, 16, image_tokens=0, text_tokens=12, text_dim=24),
}


def meter(call):
    with Meter() as found:
        result = call()
    return found.peak, result


@pytest.mark.parametrize("pipeline", SHAPES)
@pytest.mark.parametrize("request_", ["resident", "offload", "stream"])
def test_the_recipe_runs_as_the_plan_says(pipeline, request_):
    torch.manual_seed(0)
    work = Workload(
        pipeline, 64, 64, 5, SHAPES[pipeline], vae=VaeShape(base=8), fp8_file=True,
        text_parameters=0, image_parameters=0,
    )  # fmt: skip
    plan = choose_memory(
        lambda storage: needs_of(work, storage),
        free_bytes=10**10,
        request=request_,
        allow=Allowed(),
    )
    real = memory.measure(plan, torch.device("cpu"), meter)
    assert set(real) == {PROJECT, SAMPLE, DECODE}
    assert all(peak > 0 for peak in real.values())
    found = memory.compare(plan, real)
    assert found[SAMPLE]["predicted"] == plan.peak_bytes[SAMPLE]
    assert found[SAMPLE]["ratio"] > 0


def test_it_refuses_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["memory"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        memory.main()


def test_it_writes_the_table_it_is_asked_for(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    text = memory.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("| RTX 4090 |", "| old |"), encoding="utf-8")
    monkeypatch.setattr(memory, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["memory", "--table"])
    memory.main()
    assert page.read_text(encoding="utf-8") == text
