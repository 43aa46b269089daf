"""Verification: every way in which a file can be wrong is told, and only those."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from xicon_infer.errors import Cancelled
from xicon_infer.types import SilentProgress
from xicon_infer.weights.manifest import FileEntry
from xicon_infer.weights.places import Found
from xicon_infer.weights.verify import check_file, verify_files


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 50)
    return buffer.getvalue()


CONTENTS = {
    "m.safetensors": save({"a": torch.arange(6.0)}),
    "k.onnx": b"\x08\x08\x12\x07pytorch" + bytes(100),
    "n.torchscript": archive("n/constants.pkl", "n/code/x.py"),
    "t.json": json.dumps({"model": {}}).encode(),
    "d.bin": bytes(range(256)),
}
KINDS = {
    "m.safetensors": "lora",
    "k.onnx": "pose_detector",
    "n.torchscript": "pose_body",
    "t.json": "tokenizer",
    "d.bin": "pose_keypoints",
}


def entry(name, content=None, **changes):
    """Returns the entry of a file with this content, pinned."""
    content = CONTENTS[name] if content is None else content
    digest = hashlib.sha256(content).hexdigest()
    pinned = FileEntry(
        name.replace(".", "-"),
        KINDS[name],
        ("pose/default",),
        "a/b",
        name,
        None,
        len(content),
        digest,
        "MIT",
        "here",
        (name,),
    )
    return replace(pinned, **changes)


def found(tmp_path, name, content=None, **changes):
    path = tmp_path / name
    path.write_bytes(CONTENTS[name] if content is None else content)
    item = entry(name, **changes)
    return Found(item, item, path, tmp_path)


def verify(*items, quick=False, jobs=2):
    return verify_files(items, quick=quick, progress=SilentProgress(), jobs=jobs)


@pytest.mark.parametrize("name", CONTENTS)
def test_right_files_are_right(tmp_path, name):
    (verdict,) = verify(found(tmp_path, name))
    assert (verdict.state, verdict.text) == ("ok", "size, sha256 and header")
    assert verdict.sha256 == entry(name).sha256
    assert verdict.size_bytes == len(CONTENTS[name])
    (quick,) = verify(found(tmp_path, name), quick=True)
    assert (quick.state, quick.text, quick.sha256) == ("ok", "size and header", "")


@pytest.mark.parametrize("name", CONTENTS)
def test_a_flipped_bit_shows_in_the_hash_alone(tmp_path, name):
    content = bytearray(CONTENTS[name])
    position = content.index(b"x") if name == "n.torchscript" else len(content) - 2
    if name == "t.json":
        content[:] = CONTENTS[name].replace(b"model", b"modem")
    else:
        content[position] ^= 1
    item = found(tmp_path, name, bytes(content))
    (verdict,) = verify(item)
    assert verdict.state == "fault"
    assert hashlib.sha256(content).hexdigest() in verdict.text
    assert verify(item, quick=True)[0].state == "ok"


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("quick", [True, False])
def test_half_a_file_is_a_fault(tmp_path, name, quick):
    (verdict,) = verify(found(tmp_path, name, CONTENTS[name][:-9]), quick=quick)
    assert verdict.state == "fault"
    assert verdict.text
    assert verdict.sha256 == ""


@pytest.mark.parametrize("name", ["m.safetensors", "n.torchscript", "t.json"])
def test_half_a_file_shows_without_pins_too(tmp_path, name):
    unpinned = {"size_bytes": None, "sha256": None}
    assert verify(found(tmp_path, name, **unpinned))[0].state == "unpinned"
    half = found(tmp_path, name, CONTENTS[name][:-9], **unpinned)
    assert verify(half)[0].state == "fault"


WEB_PAGE = b"<!DOCTYPE html><html><body>Access denied</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("content", [WEB_PAGE, POINTER, b""], ids=["page", "pointer", "empty"])
def test_something_else_under_the_name(tmp_path, name, content):
    # Even with the size and hash of the wrong content pinned.
    pins = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (verdict,) = verify(found(tmp_path, name, content, **pins), quick=True)
    assert verdict.state == "fault"
    assert verdict.text.startswith(name)


def test_another_archive_is_no_torchscript(tmp_path):
    content = archive("readme.txt")
    item = found(tmp_path, "n.torchscript", content, size_bytes=None, sha256=None)
    assert "no TorchScript archive" in verify(item)[0].text


def test_what_cannot_be_proven_is_unpinned(tmp_path):
    sized = verify(found(tmp_path, "k.onnx", sha256=None))[0]
    assert (sized.state, sized.text) == ("unpinned", "size and header; no sha256 is pinned")
    bare = verify(found(tmp_path, "k.onnx", sha256=None, size_bytes=None))[0]
    assert bare.state == "unpinned"
    hashed = verify(found(tmp_path, "k.onnx", size_bytes=None))[0]
    assert hashed.state == "ok"


def test_a_missing_file_is_a_fault(tmp_path):
    assert check_file(entry("k.onnx"), tmp_path / "k.onnx").state == "fault"


def test_shards_that_are_missing(tmp_path):
    index = {"weight_map": {"a": "one.safetensors"}}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps(index))
    item = entry("m.safetensors", path=name, size_bytes=None, sha256=None)
    assert "one.safetensors" in check_file(item, tmp_path / name).text
    (tmp_path / "one.safetensors").write_bytes(CONTENTS["m.safetensors"])
    assert check_file(item, tmp_path / name).state == "unpinned"


def test_verdicts_keep_their_order_with_any_number_of_threads(tmp_path):
    items = []
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        content = CONTENTS["d.bin"] + bytes([number])
        item = replace(entry("d.bin", content), id=str(number))
        (folder / "d.bin").write_bytes(content if number % 3 else content[::-1])
        items.append(Found(item, item, folder / "d.bin", tmp_path))
    for jobs in (1, 5, 32):
        states = [(v.id, v.state) for v in verify(*items, jobs=jobs)]
        assert states == [(str(n), "ok" if n % 3 else "fault") for n in range(12)]


class Telling(SilentProgress):
    def __init__(self, stop=False):
        super().__init__()
        self.steps = []
        self.stop = stop

    def step(self, done, total, unit="step"):
        self.steps.append((done, total, unit))
        if self.stop:
            raise Cancelled("stopped")


def test_progress_counts_megabytes_and_can_stop(tmp_path):
    content = bytes(3_500_000)
    item = found(tmp_path, "d.bin", content, **vars_of(content))
    telling = Telling()
    (verdict,) = verify_files([item], quick=False, progress=telling)
    assert verdict.state == "ok"
    assert telling.steps[-1] == (3, 3, "megabytes")
    assert telling.steps == sorted(telling.steps)
    with pytest.raises(Cancelled):
        verify_files([item], quick=False, progress=Telling(stop=True))
    quiet = Telling(stop=True)
    assert verify_files([item], quick=True, progress=quiet)[0].state == "ok"
    assert verify_files([], quick=False, progress=quiet) == []


def vars_of(content):
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
