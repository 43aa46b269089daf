"""Names of cards in every spelling; sizes; what is not a card."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.gpus import GIB, GPUS, MIB, find_gpu


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_card_is_found_by_each_of_its_names(gpu):
    for name in (gpu.name, *gpu.spellings):
        for text in (name, name.lower(), f"NVIDIA {name}", name.replace(" ", "-"), f" {name} "):
            assert find_gpu(text) is gpu, text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4070tisuper", "RTX 4070 Ti Super"),
        ("RTX-A6000", "RTX A6000"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-16GB", "V100 16GB"),
        ("l40s", "L40S"),
        ("L40", "L40"),
        ("L4", "L4"),
        ("3090 ti", "RTX 3090"),
    ],
)
def test_spellings(text, name):
    assert find_gpu(text).name == name


@pytest.mark.parametrize("text", ["24GB", "24 gb", "24G", "24GiB", "24 GB card", " 24gb "])
def test_a_size_is_a_card_without_a_name(text):
    gpu = find_gpu(text)
    assert gpu.memory_bytes == 24 * GIB
    assert gpu.name == "24 GB"
    assert gpu.bf16 and not gpu.fp8


@given(st.integers(1, 1024))
def test_every_size_is_taken_as_it_is_written(size):
    assert find_gpu(f"{size}GB").memory_bytes == size * GIB


@pytest.mark.parametrize("text", ["0GB", "2000GB", "0 gb"])
def test_a_size_out_of_range_is_refused(text):
    with pytest.raises(InvalidRequest, match="1GB to 1024GB") as caught:
        find_gpu(text)
    assert caught.value.field == "gpu"


@pytest.mark.parametrize(
    ("text", "near"),
    [("RTX 4099", "RTX 4090"), ("A100", "A100 40GB, A100 80GB"), ("H2000", "H200")],
)
def test_an_unknown_name_lists_what_is_near(text, near):
    with pytest.raises(InvalidRequest, match="did you mean") as caught:
        find_gpu(text)
    assert near in caught.value.message
    assert text in caught.value.message


@pytest.mark.parametrize("text", ["", "???", "banana"])
def test_what_resembles_nothing_lists_all(text):
    with pytest.raises(InvalidRequest) as caught:
        find_gpu(text)
    for gpu in GPUS:
        assert gpu.name in caught.value.message


def test_the_table_is_plausible():
    older = [gpu.memory_bytes // MIB for gpu in GPUS if not gpu.bf16]
    assert older == [15360, 16384, 32768]
    assert {gpu.name for gpu in GPUS if gpu.pcie == 5} >= {"RTX 5090", "H100 80GB", "B200"}
    assert find_gpu("4090").fp8
    assert not find_gpu("3090").fp8
    assert list(GPUS) == sorted(GPUS, key=lambda gpu: gpu.memory_bytes)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
