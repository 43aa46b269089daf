"""Opening checkpoints: what is in them, and a clear refusal of everything that is not one."""

from __future__ import annotations

import collections
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xicon_infer.errors import WeightsError
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors

STATE = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.scale_weight": torch.tensor(0.5),
    "b.weight": torch.full((2, 2), 3.0).to(torch.float8_e4m3fn),
    "c.weight": torch.full((2,), 3.0).to(torch.float8_e5m2),
    "d.weight": torch.ones(2, 1, 3, dtype=torch.bfloat16),
    "e.ids": torch.arange(5),
    "f.empty": torch.zeros(0, 4),
}


def safetensors_bytes(header, data=b"", *, raw=None, length=None):
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def zipped(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


class Evil:
    def __reduce__(self):
        return (eval, ("1+1",))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[k].dtype == v.dtype and torch.equal(raw(found[k]), raw(v))
        for k, v in expected.items()
    )


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
def test_safetensors(tmp_path, name):
    save_file(STATE, tmp_path / name, metadata={"format": "pt", "made_by": "test"})
    checkpoint = open_checkpoint(tmp_path / name)
    assert checkpoint.format == "safetensors"  # told from the content, not from the name
    assert checkpoint.shapes == {k: tuple(v.shape) for k, v in STATE.items()}
    assert checkpoint.dtypes == {k: v.dtype for k, v in STATE.items()}
    assert checkpoint.metadata["made_by"] == "test"
    assert checkpoint.loaded == {}
    assert same(read_tensors(checkpoint), STATE)
    assert list(read_tensors(checkpoint, ["e.ids", "a.weight"])) == ["e.ids", "a.weight"]
    with pytest.raises(WeightsError, match="holds no tensor x"):
        read_tensors(checkpoint, ["a.weight", "x"])


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("module",), ("model", "state_dict")])
def test_torch_files(tmp_path, zip_format, nest):
    plain = {k: v for k, v in STATE.items() if v.dtype.itemsize > 1}
    content = collections.OrderedDict(plain)
    for key in reversed(nest):
        content = {key: content, "step": 3}
    path = tmp_path / "m.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "torch"
    assert checkpoint.shapes == {k: tuple(v.shape) for k, v in plain.items()}
    assert same(read_tensors(checkpoint), plain)
    assert list(read_tensors(checkpoint, ["e.ids"])) == ["e.ids"]


def make_shards(folder, *, parts=2, change=None):
    weight_map = {}
    names = sorted(STATE)
    for part in range(parts):
        shard = f"m-{part}.safetensors"
        inside = names[part::parts]
        save_file({name: STATE[name] for name in inside}, folder / shard)
        weight_map.update(dict.fromkeys(inside, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    if change is not None:
        change(index)
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    return folder / "m.safetensors.index.json"


@pytest.mark.parametrize("by_folder", [True, False])
def test_shards(tmp_path, by_folder):
    index = make_shards(tmp_path, parts=3)
    checkpoint = open_checkpoint(tmp_path if by_folder else index)
    assert checkpoint.shapes == {k: tuple(v.shape) for k, v in STATE.items()}
    assert len(set(checkpoint.files.values())) == 3
    assert same(read_tensors(checkpoint), STATE)


def test_a_folder_with_one_file(tmp_path):
    save_file(STATE, tmp_path / "only.safetensors")
    assert open_checkpoint(tmp_path).path.name == "only.safetensors"


GOOD = safetensors_bytes({"a": entry()}, bytes(8))
QUANTIZED = {"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "mxfp8"}}}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4f7c\nsize 17135485186\n"

CORRUPT = {
    "empty file": (b"", "is empty"),
    "git lfs pointer": (LFS, "Git LFS pointer.*git lfs pull"),
    "html page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "html page, no doctype": (b"\n  <html lang='en'>...", "web page"),
    "storage error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "api error": (b'{"error": "Invalid username or password."}', "JSON"),
    "text": (b"Entry not found", "text file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "holds no tensors"),
    "gguf cut off": (b"GGUF\x03\x00\x00\x00\x01", "incomplete GGUF header"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(64), "gzip"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a safetensors file"),
    "zeros": (bytes(4096), "damaged header"),
    "seven bytes": (b"\x01\x00\x00\x00\x00\x00\x00", "not a safetensors file"),
    "header cut off": (GOOD[:20], "incomplete"),
    "data cut off": (GOOD[:-1], "incomplete: tensor a ends at byte 8 of the data, the file has 7"),
    "no data": (GOOD[:-8], "the file has 0"),
    "bytes behind": (GOOD + b"\x00", "1 bytes after the last"),
    "header not json": (safetensors_bytes(None, raw=b"{'a': 1}"), "damaged header"),
    "header not utf-8": (safetensors_bytes(None, raw=b'{"\xff": 1}'), "damaged header"),
    "header nested": (safetensors_bytes(None, raw=b"[" * 100_000), "damaged header"),
    "header a list": (safetensors_bytes([1, 2]), "not an object"),
    "no tensors": (safetensors_bytes({}), "holds no tensors"),
    "metadata only": (safetensors_bytes({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "metadata a list": (
        safetensors_bytes({"__metadata__": [], "a": entry()}, bytes(8)),
        "metadata",
    ),
    "name twice": (
        safetensors_bytes(None, bytes(8), raw=b'{"a": %s, "a": %s}' % ((b"{}",) * 2)),
        "a occurs twice",
    ),
    "entry a number": (safetensors_bytes({"a": 3}, bytes(8)), "tensor a"),
    "entry without offsets": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "data_offsets",
    ),
    "three offsets": (safetensors_bytes({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "tensor a"),
    "unknown dtype": (
        safetensors_bytes({"a": entry(dtype="F8_E8M0", offsets=(0, 2))}, bytes(2)),
        "tensor a has dtype F8_E8M0",
    ),
    "negative size": (safetensors_bytes({"a": entry((-2,))}, bytes(8)), "sizes"),
    "fractional size": (safetensors_bytes({"a": entry((2.0,))}, bytes(8)), "sizes"),
    "size and bytes differ": (safetensors_bytes({"a": entry((3,))}, bytes(8)), "cannot have 8"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "gap": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)),
        "tensor b overlaps or leaves a gap",
    ),
    "other quantisation": (
        safetensors_bytes(
            {"__metadata__": {"_quantization_metadata": json.dumps(QUANTIZED)}, "a": entry()},
            bytes(8),
        ),
        r"blocks.0.ffn.0 is quantised as mxfp8, allowed: float8_e4m3fn",
    ),
    "odd quantisation": (
        safetensors_bytes(
            {"__metadata__": {"_quantization_metadata": "[]"}, "a": entry()}, bytes(8)
        ),
        "unreadable quantisation metadata",
    ),
    "cut pickle": (
        pickle.dumps({"a": 1}, protocol=2)[:-2],
        "not a PyTorch checkpoint|not safetensors. Rename it",
    ),
    "pickle of a list": (
        pickle.dumps([1, 2], protocol=2),
        "not a PyTorch checkpoint|not safetensors. Rename it",
    ),
    "newer pickle": (pickle.dumps({"a": 1}, protocol=4), "torch.save did not write"),
    "cut zip": (b"PK\x03\x04" + bytes(100), "incomplete or damaged|not safetensors. Rename it"),
}


@pytest.mark.parametrize("case", CORRUPT)
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_corrupt_files(tmp_path, case, name):
    content, message = CORRUPT[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert name in caught.value.message
    assert caught.value.exit_code == 5


def damaged_torch(path):
    torch.save({"a": torch.ones(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:-500])


TORCH_CASES = {
    "code": (lambda p: torch.save({"a": Evil()}, p), "wants to run code, which is refused"),
    "module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), "wants to run code"),
    "truncated": (damaged_torch, "incomplete or damaged"),
    "list": (lambda p: torch.save([torch.ones(2)], p), "holds no named tensors, but a list"),
    "tensor": (lambda p: torch.save(torch.ones(2), p), "but a Tensor"),
    "numbers": (lambda p: torch.save({"step": 3}, p), "holds no named tensors"),
    "torchscript": (lambda p: zipped(p, ["m/constants.pkl", "m/data.pkl"]), "TorchScript"),
    "archive": (lambda p: zipped(p, ["readme.txt"]), "is a zip archive, not a checkpoint"),
    "bad pickle in zip": (lambda p: zipped(p, ["m/data.pkl", "m/version"]), "not a PyTorch"),
}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_corrupt_torch_files(tmp_path, case):
    make, message = TORCH_CASES[case]
    make(tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(tmp_path / "m.pth")


def test_what_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        open_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="found 0"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="found 2"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.safetensors.aria2").touch()
    with pytest.raises(WeightsError, match="not finished"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_that_changes_after_opening(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(STATE, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(b"gone")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_tensors(checkpoint)


def lose(name):
    return lambda index: index["weight_map"].update({name: "m-9.safetensors"})


INDEX_CASES = {
    "not json": (None, "not an index"),
    "no map": (lambda index: index.pop("weight_map"), "not an index"),
    "map a list": (lambda index: index.update(weight_map=[1]), "not an index"),
    "empty map": (lambda index: index.update(weight_map={}), "names no tensors"),
    "missing shard": (lose("a.weight"), "shards are missing: m-9.safetensors"),
    "tensor not in shard": (
        lambda index: index["weight_map"].update({"z": "m-0.safetensors"}),
        "1 tensors are not in their shards: z",
    ),
    "outside": (
        lambda index: index["weight_map"].update({"z": "../../etc/passwd"}),
        "must lie beside the index",
    ),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_corrupt_indexes(tmp_path, case):
    change, message = INDEX_CASES[case]
    path = make_shards(tmp_path, change=change)
    if change is None:
        path.write_text("{")
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(path)


def test_a_truncated_shard(tmp_path):
    path = make_shards(tmp_path)
    shard = tmp_path / "m-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"m-1\.safetensors: incomplete"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x8B1F, 0x3C3C, 0x4B50])
def test_header_lengths_that_look_like_other_formats(tmp_path, length):
    """128 starts like a pickle, 640 like torch.save's, 35615 like gzip, 15420 like "<<"."""
    raw = GOOD[8:-8]
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(None, GOOD[-8:], raw=raw.ljust(length)))
    assert open_checkpoint(path).shapes == {"a": (2,)}


def test_a_shard_of_another_format(tmp_path):
    path = make_shards(tmp_path)
    torch.save(STATE["a.weight"], tmp_path / "m-1.safetensors")
    with pytest.raises(WeightsError, match=r"m-1\.safetensors is not a safetensors file"):
        open_checkpoint(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_prefix_of_a_file_is_refused(tmp_path_factory, data):
    folder: Path = tmp_path_factory.mktemp("prefix")
    save_file(STATE, folder / "m.safetensors")
    whole = (folder / "m.safetensors").read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    (folder / "m.safetensors").write_bytes(whole[:cut])
    with pytest.raises(WeightsError):
        open_checkpoint(folder / "m.safetensors")


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_never_get_past(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "m.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        open_checkpoint(path)
