"""The story of one pull: a synthetic repository, every fault there is, and whole files at the end.

A user runs the same command again and again while disk, network, hub and server fail in turn.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.weights.hub_server import PAGE, REPO, Fault, digest, serving, weights
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.types import SilentProgress
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.download import file_sha256, pull, target_path
from xicon_infer.weights.places import locate

SIZE = 1_600_000
NAMES = (
    "SCAIL/transformer.safetensors",
    "vae.safetensors",
    "text/encoder.safetensors",
    "clip_vision.safetensors",
    "loras/lightx2v.safetensors",
    "detection/yolo.safetensors",
)


class Run(SilentProgress):
    """One run of the command; `stop_at` is the megabyte at which the user presses Ctrl-C."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at

    def step(self, done, total, unit="step"):
        assert 0 <= done <= total
        if self.stop_at is not None and done >= self.stop_at:
            raise Cancelled("Ctrl-C")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path, token="hf_right") as running:
        yield running


def publish(server):
    """Returns the entries of a repository: some listed with size and hash, some with nothing."""
    items = []
    for number, name in enumerate(NAMES):
        body = weights(SIZE, seed=number)
        item = server.publish(name, body, gated=name.startswith("SCAIL"))
        if number % 2:
            item = replace(item, size_bytes=len(body), sha256=digest(body))
        items.append(item)
    items.append(server.publish("tokenizer.json", b'{"model": {}}', lfs=False))
    items.append(server.publish_web("nlf.torchscript", b"PK\x03\x04" + bytes(500_000)))
    return items


def body_of(server, item):
    return server.web[item.path].body if item.url else server.hub[REPO, item.path].body


def address(server, item):
    return f"/web/{item.path}" if item.url else f"/cdn/{digest(body_of(server, item))}"


def still_missing(items, folder):
    return {item.id for item in items if locate(item, [folder]) is None}


def test_a_repository_is_pulled_through_all_faults(server, tmp_path, monkeypatch):
    items = publish(server)
    by_id = {item.id: item for item in items}
    folder = tmp_path / "models"

    def run(progress=None, **options):
        transfer = server.transfer(**options)
        return pull(items, folder, progress=progress or Run(), jobs=3, transfer=transfer)

    def fail(*faults, of):
        server.faults["GET", address(server, by_id[of])] = list(faults)

    # The disk is too small: nothing is fetched.
    with pytest.raises(WeightsError, match=r"are needed, 1\.0 MB are free"):
        run(free_bytes=lambda place: 1_000_000)
    assert server.count("GET") == 0
    assert not folder.exists()

    # The user stops it in the middle.
    for item in items[:3]:
        fail(Fault(close_after=900_000), Fault(drip_s=30.0), of=item.id)
    with pytest.raises(Cancelled):
        run(Run(stop_at=2), timeout_s=60.0)
    assert still_missing(items, folder) >= {item.id for item in items[:3]}
    server.faults.clear()

    # The disk fills up while files are written; no attempt more is made for those.
    def full(file, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WeightsError, match="8 of 8 files are not there") as caught:
        run(write=full)
    assert caught.value.code == "DISK_FULL"

    # Everything else at once.
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    resolve = f"/{REPO}/resolve/main/{by_id['vae'].path}"
    server.faults[resolve] = [Fault(status=503), Fault(status=429)]  # busy, then well
    fail(Fault(close_after=300_000), Fault(close_after=0), Fault(status=502), of="vae")
    fail(Fault(body=weights(SIZE, seed=99), no_range=True), of="encoder")  # another content
    fail(*[Fault(claim=777, no_range=True)] * 9, of="clip_vision")  # a length that lies
    fail(*[Fault(redirect=address(server, by_id["lightx2v"]))] * 99, of="lightx2v")  # a circle
    fail(Fault(no_range=True, close_after=500_000), of="yolo")  # Range ignored, then broken
    fail(Fault(body=PAGE, claim=len(PAGE), headers={"ETag": '"page"'}), of="nlf")  # a web page
    with pytest.raises(WeightsError) as caught:
        run()
    text = caught.value.message
    assert "5 of 8 files are not there" in text
    for name, words in {
        "transformer": "is gated",
        "encoder": "sha256",
        "clip_vision": "offers 777 bytes",
        "lightx2v": "in a circle",
        "nlf": "is a web page",
    }.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name}: "))
        assert words in line
    assert still_missing(items, folder) == {
        "transformer",
        "encoder",
        "clip_vision",
        "lightx2v",
        "nlf",
    }
    assert "very-secret" not in text
    assert "hf_wrong" not in text

    # The token is right again, the servers are well.
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.faults.clear()
    server.sent.clear()
    before = {item.id for item in items} - still_missing(items, folder)
    found = {one.entry.id: one for one in run()}
    assert {name for name, one in found.items() if one.state == "present"} == before
    assert found["transformer"].state == "resumed"  # what the user had before Ctrl-C was kept
    assert server.sent[address(server, by_id["transformer"])] < SIZE - 800_000

    # Every file verifies, and opens; nothing half is left; nothing more is asked for.
    for item in items:
        path = target_path(item, folder)
        assert path == found[item.id].path == locate(item, [folder])
        assert file_sha256(path) == digest(body_of(server, item))
        if path.suffix == ".safetensors":
            tensors = read_tensors(open_checkpoint(path))
            assert tensors["weight"].numel() == SIZE
    assert list(folder.rglob("*.part")) == []
    server.asked.clear()
    assert {one.state for one in run()} == {"present"}
    assert server.asked == []
