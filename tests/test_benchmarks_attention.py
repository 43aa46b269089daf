"""The benchmark of the attention kernels at tiny size, and what it compares with."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention
from xicon_infer.ops.attention_race import Shape, random_parts


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    attention.main(["--tiny", "--rounds", "1", "--out", str(folder)])
    return json.loads((folder / "attention_cpu_tiny.json").read_text())


def test_every_kernel_stands_beside_pytorchs_own_choice(report):
    assert [case["shape"]["keys"] for case in report["cases"]] == [48, 37, 16]
    assert report["absent"]["cudnn"] == "needs a CUDA device"
    assert {"machine", "versions", "commit", "command"} <= set(report)
    for case in report["cases"]:
        assert {attention.PEER, "flash", "math", "int8"} <= set(case["kernels"])
        assert all(found["timed"] == 1 for found in case["kernels"].values())


def test_what_a_kernel_loses_is_told(report):
    for case in report["cases"]:
        errors = {name: found["error"] for name, found in case["kernels"].items()}
        assert errors["math"] < 0.005 < errors["int8"] < 0.03


def test_an_8_bit_kernel_is_not_the_fastest_exact_one():
    found = {
        attention.PEER: {"median_s": 4.0},
        "flash": {"median_s": 3.0},
        "int8": {"median_s": 2.0},
        "int8, 64 queries, 4 warps, 3 stages": {"median_s": 1.0},
        "cudnn": {"left_out": "no"},
    }
    best = attention.fastest_of(found)
    assert best["exact"] == "flash"
    assert best["any"].startswith("int8, 64")
    assert (best["exact_over_peer"], best["any_over_peer"]) == (1.333, 4.0)


def test_what_is_checked_is_a_part_of_the_whole():
    parts = random_parts(Shape(1, 300, 20, 6, 64), torch.device("cpu"), torch.float32)
    exact, heads, rows = attention.reference(parts)
    assert exact.shape == (1, attention.CHECKED_QUERIES, attention.CHECKED_HEADS, 64)
    whole = attention._left_alone(*parts)[:, rows, :heads]
    torch.testing.assert_close(exact, whole, rtol=1e-4, atol=1e-5)


def test_lengths_and_keys_can_be_chosen():
    args = attention.parse(["--tokens", "64", "32", "--cross", "9"])
    assert [(s.queries, s.keys) for s in attention.shapes_of(args)] == [(64, 64), (32, 32), (64, 9)]
    full = attention.shapes_of(attention.parse([]))
    assert [(s.queries, s.keys) for s in full][-2:] == [(32760, 512), (32760, 257)]
    assert {(s.heads, s.head_dim) for s in full} == {(40, 128)}
