"""GGUF files: every type to the bit, true shapes, bounded memory, and no damaged file gets past."""

from __future__ import annotations

import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights import formats
from xicon_infer.errors import WeightsError
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.detect import detect

STATE = {
    "patch_embedding.weight": torch.randn(
        32, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1)
    ),
    "patch_embedding.bias": torch.arange(32.0),
    "blocks.0.modulation": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)),
    "blocks.0.ffn.0.weight": torch.randn(8, 512, generator=torch.Generator().manual_seed(3)),
    "condition_embedding_align.norm1.weight": torch.ones(1, 8, 1, 1),
}


def write(folder, kind="F32", **options):
    expected = formats.write_gguf(STATE, folder / "m.gguf", kind, **options)
    return folder / "m.gguf", expected


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *formats.LEGACY, *formats.K_TYPES])
def test_every_published_type(tmp_path, kind):
    path, expected = write(tmp_path, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "gguf"
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in STATE.items()}
    assert checkpoint.metadata["general.architecture"] == "wan"
    found = read_tensors(checkpoint, dtype=torch.float32)
    assert formats.same(found, expected) == []
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    weight = "blocks.0.ffn.0.weight"
    if kind in plain:  # as stored, whatever is asked for
        assert checkpoint.quantized == {}
        assert found[weight].dtype == checkpoint.dtypes[weight] == plain[kind]
    else:
        assert checkpoint.quantized == {weight: kind}
        assert checkpoint.dtypes[weight] == torch.bfloat16
        half = read_tensors(checkpoint, [weight])
        assert list(half) == [weight]
        assert torch.equal(half[weight], expected[weight].bfloat16())  # rounded once
        exact = read_tensors(checkpoint, [weight], dtype=torch.float16)[weight]
        assert torch.equal(exact, expected[weight].half())


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS", "IQ3_S"])
def test_other_types_the_package_knows(tmp_path, kind):
    shape = (4, 512)
    blocks, expected = formats.random_blocks(shape, kind, 0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_tensor("a", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    found = read_tensors(open_checkpoint(tmp_path / "m.gguf"), dtype=torch.float32)
    assert np.array_equal(found["a"].numpy(), expected)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def raw_file(fields=b"", num_fields=0, infos=b"", num_tensors=1, data=b"", *, version=3, pad=32):
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + fields + infos
    return head + bytes(-len(head) % pad) + data


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def info(name="a", axes=(32,), kind=0, offset=0):
    sizes = struct.pack(f"<{len(axes)}Q", *axes)
    return text(name) + struct.pack("<I", len(axes)) + sizes + struct.pack("<IQ", kind, offset)


def test_blocks_made_by_hand(tmp_path):
    """Q8_0: a half-precision scale, 32 signed bytes. Q4_0: nibbles less eight, low ones first."""
    q8 = struct.pack("<e", 0.5) + bytes(np.arange(-16, 16, dtype=np.int8).view(np.uint8))
    q4 = struct.pack("<e", -2.0) + bytes([0xF0 | n for n in range(16)])
    infos = info("q8", (32, 1), 8) + info("q4", (32,), 2, 64)
    path = tmp_path / "m.bin"  # the name says nothing
    path.write_bytes(raw_file(infos=infos, num_tensors=2, data=q8.ljust(64, b"\0") + q4))
    found = read_tensors(open_checkpoint(path), dtype=torch.float32)
    assert found["q8"].tolist() == [[n / 2 for n in range(-16, 16)]]
    assert found["q4"].tolist() == [-2.0 * (n - 8) for n in range(16)] + [-14.0] * 16


def test_large_tensors_need_little_more_than_their_result(tmp_path):
    """2^23 numbers are 33 MB as float32; numpy, which dequantises, never holds so much."""
    value = torch.zeros(1024, 8192)
    value[::3] = 1.5
    path = tmp_path / "m.gguf"
    formats.write_gguf({"a.weight": value}, path, "Q8_0", choose=lambda *_: True)
    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    found = read_tensors(checkpoint)["a.weight"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, peak
    assert torch.equal(found.float(), value)


@pytest.mark.parametrize("wide", ["fixed", "metadata", "flat"])
@pytest.mark.parametrize("strip_ones", [False, True])
def test_true_shapes(tmp_path, wide, strip_ones):
    path, expected = write(tmp_path, wide=wide, strip_ones=strip_ones)
    assert formats.same(read_tensors(open_checkpoint(path)), expected) == []


def test_a_file_without_its_wide_tensors_is_explained(tmp_path):
    state = STATE | {"head.modulation": torch.ones(1, 2, 32)}
    formats.write_gguf(state, tmp_path / "m.gguf", wide="lost")
    with pytest.raises(WeightsError, match=r"lacks patch_embedding\.weight.*five-dimensional"):
        detect(open_checkpoint(tmp_path / "m.gguf").shapes)


@pytest.mark.parametrize("shape", [[32, 4, 1, 2], "text", [7]])
def test_an_original_shape_that_does_not_fit(tmp_path, shape):
    key = "comfy.gguf.orig_shape.patch_embedding.weight"
    path, _ = write(tmp_path, fields={key: shape})
    with pytest.raises(WeightsError, match=r"patch_embedding\.weight .*original shape"):
        open_checkpoint(path)


@pytest.mark.parametrize("arch", ["wan", "t5", "t5encoder", "pig", "cow"])
def test_known_architectures(tmp_path, arch):
    path, _ = write(tmp_path, arch=arch)
    assert open_checkpoint(path).metadata["general.architecture"] == arch


def test_other_architectures_are_refused(tmp_path):
    path, _ = write(tmp_path, arch="llama")
    with pytest.raises(WeightsError, match="architecture 'llama', allowed: wan, t5"):
        open_checkpoint(path)


def field(name, kind, raw):
    return text(name) + struct.pack("<I", kind) + raw


NUMBERS = [(kind, struct.pack(form, 1)) for kind, form in enumerate(("<B", "<b", "<H", "<h"))]
NUMBERS += [(4, struct.pack("<I", 1)), (5, struct.pack("<i", 1)), (6, struct.pack("<f", 1))]
NUMBERS += [(7, b"\1"), (10, struct.pack("<Q", 1)), (11, struct.pack("<q", 1))]
NUMBERS += [(12, struct.pack("<d", 1))]


def test_metadata_of_every_type(tmp_path):
    fields = b"".join(field(f"n{kind}", kind, raw) for kind, raw in NUMBERS)
    fields += field("s", 8, text("word"))
    fields += field("long", 9, struct.pack("<IQ", 6, 1000) + bytes(4000))
    fields += field("short", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", 3, 4))
    fields += field("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_file(fields, len(NUMBERS) + 4, info(), data=bytes(128)))
    found = open_checkpoint(path).metadata
    assert {found[f"n{kind}"] for kind, _ in NUMBERS} == {"1", "1.0", "True"}
    assert found["s"] == "word"
    assert (found["long"], found["short"], found["words"]) == (
        "1000 numbers",
        "[3, 4]",
        "2 strings",
    )


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_alignment(tmp_path, alignment):
    fields = field("general.alignment", 4, struct.pack("<I", alignment))
    data = struct.pack("<32f", *range(32))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_file(fields, 1, info(), data=data, pad=alignment))
    assert read_tensors(open_checkpoint(path))["a"].tolist() == list(range(32))


ENDLESS = struct.pack("<IQ", 4, 2**40)
CORRUPT = {
    "cut in the magic": (b"GGUF\3", "incomplete GGUF header"),
    "old version": (raw_file(infos=info(), version=1), "version 1, allowed: 2, 3"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(64), "little-endian"),
    "no tensors": (raw_file(num_tensors=0), "holds no tensors"),
    "endless array": (raw_file(field("a", 9, ENDLESS), 1), "incomplete GGUF header"),
    "endless text": (raw_file(field("a", 8, struct.pack("<Q", 2**60)), 1), "incomplete"),
    "endless fields": (raw_file(b"", 2**60), "incomplete|damaged"),
    "endless tensors": (raw_file(infos=info(), num_tensors=2**60), "incomplete|damaged"),
    "nested array": (raw_file(field("a", 9, struct.pack("<IQ", 9, 1)), 1), "array type 9"),
    "unknown value": (raw_file(field("a", 77, b""), 1), "value type 77"),
    "field twice": (raw_file(field("a", 7, b"\1") * 2, 2), "a occurs twice"),
    "not utf-8": (raw_file(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(9), 1), "damaged"),
    "tensor twice": (
        raw_file(infos=info() * 2, num_tensors=2, data=bytes(256)),
        "tensor a: occurs twice",
    ),
    "nine axes": (raw_file(infos=info(axes=(1,) * 9), data=bytes(64)), "9 axes"),
    "unknown type": (raw_file(infos=info(kind=999), data=bytes(128)), "GGUF type 999"),
    "type without reader": (raw_file(infos=info(kind=9), data=bytes(128)), "of type Q8_1"),
    "half a block": (raw_file(infos=info(axes=(16,), kind=8), data=bytes(64)), "rows of 16"),
    "no axes in blocks": (raw_file(infos=info(axes=(), kind=8), data=bytes(64)), "rows of 1"),
    "data cut off": (raw_file(infos=info(), data=bytes(127)), "incomplete: tensor a ends at byte"),
    "far offset": (raw_file(infos=info(offset=2**50), data=bytes(128)), "incomplete: tensor a"),
    "overlap": (
        raw_file(infos=info() + info("b", offset=64), num_tensors=2, data=bytes(256)),
        "tensor b overlaps",
    ),
    "alignment zero": (
        raw_file(field("general.alignment", 4, bytes(4)), 1, info(), data=bytes(128)),
        "general.alignment is 0",
    ),
    "split": (
        raw_file(field("split.count", 2, b"\3\0"), 1, info(), data=bytes(128)),
        "one of 3 parts",
    ),
    "integers": (raw_file(infos=info("a.weight", kind=24), data=bytes(128)), "int8"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files(tmp_path, case):
    content, message = CORRUPT[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_checkpoint(path)
    assert "m.gguf" in caught.value.message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_prefix_of_a_file_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("prefix")
    path, _ = write(folder, "Q4_0")
    whole = path.read_bytes()
    checkpoint = open_checkpoint(path)
    end = max(tensor.start + tensor.size for tensor in checkpoint.blocks.values())
    path.write_bytes(whole[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(WeightsError):
        open_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_never_get_past(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    with pytest.raises(WeightsError):
        open_checkpoint(path)


def test_a_file_that_changes_after_opening(tmp_path):
    path, _ = write(tmp_path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsError, match="became shorter"):
        read_tensors(checkpoint)
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        read_tensors(checkpoint)


def test_reading_leaves_the_file_alone(tmp_path):
    path, _ = write(tmp_path)
    before = path.read_bytes()
    tensors = read_tensors(open_checkpoint(path))
    tensors["patch_embedding.bias"].zero_()
    assert path.read_bytes() == before


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    path, _ = write(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"m\.gguf.*needs the gguf package.*pip install gguf"):
        open_checkpoint(path)
