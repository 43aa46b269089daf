"""Pulling of several files: what is fetched, checked, told and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import constants

from tests.weights.hub_server import (
    COMMIT,
    PAGE,
    POINTER,
    REPO,
    Fault,
    digest,
    entry,
    serving,
    weights,
)
from tests.weights.pull_case import BODY, Told, cdn, get, parts, refusal
from xicon_infer.errors import WeightsError
from xicon_infer.weights.download import file_sha256, target_path
from xicon_infer.weights.download_url import Source, part_path
from xicon_infer.weights.header import check_header
from xicon_infer.weights.places import locate


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        yield running


def test_files_of_hub_and_web_are_pulled(server, tmp_path):
    items = [
        server.publish("vae/a.safetensors", BODY),
        server.publish("tokenizer.json", b'{"a": 1}', lfs=False),
        server.publish_web("n.torchscript", b"PK\x03\x04rest"),
    ]
    found = get(server, items, tmp_path)
    assert [one.entry for one in found] == items
    for one in found:
        assert one.state == "downloaded"
        assert one.seconds > 0
        assert one.path == target_path(one.entry, tmp_path) == locate(one.entry, [tmp_path])
        assert one.size_bytes == one.path.stat().st_size
    assert found[0].path.read_bytes() == BODY
    assert found[1].path.read_bytes() == b'{"a": 1}'
    assert found[2].path.read_bytes() == b"PK\x03\x04rest"
    assert parts(tmp_path) == []
    # The commit that was asked about is the one that is fetched, even if main moves on meanwhile.
    assert server.count("GET", f"/{REPO}/resolve/{COMMIT}/") == 2


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    first = get(server, [item], tmp_path)
    server.asked.clear()
    again = get(server, [item], tmp_path, offline=True)
    assert [(one.path, one.state) for one in again] == [(first[0].path, "present")]
    assert server.asked == []


def test_a_file_that_is_named_twice_is_fetched_once(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    assert len(get(server, [item, item], tmp_path)) == 1
    assert server.sent[cdn(BODY)] == len(BODY)


def test_a_copy_in_a_comfyui_folder_counts(server, tmp_path):
    item = replace(server.publish("a.safetensors", BODY), size_bytes=len(BODY))
    copy = tmp_path / "models" / "vae" / "wan" / "a.safetensors"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(BODY)
    assert get(server, [item], tmp_path)[0].path == copy
    assert server.asked == []


def test_a_copy_of_another_size_is_fetched_again(server, tmp_path):
    item = replace(server.publish("a.safetensors", BODY), size_bytes=len(BODY))
    target_path(item, tmp_path).write_bytes(BODY[:-1])
    told = Told()
    found = get(server, [item], tmp_path, progress=told)
    assert found[0].state == "downloaded"
    assert found[0].path.read_bytes() == BODY
    assert "a.safetensors has" in told.warnings[0]


def test_a_damaged_copy_of_the_right_size_is_found_when_asked(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    item = replace(item, size_bytes=len(BODY), sha256=digest(BODY))
    bad = BODY[:-1] + bytes([BODY[-1] ^ 1])
    target_path(item, tmp_path).write_bytes(bad)
    assert get(server, [item], tmp_path)[0].state == "present"
    found = get(server, [item], tmp_path, recheck=True)
    assert found[0].state == "downloaded"
    assert found[0].path.read_bytes() == BODY
    assert get(server, [item], tmp_path, recheck=True)[0].state == "present"


def test_progress_is_told_in_megabytes_over_all_files(server, tmp_path):
    bodies = [weights(2_600_000, seed) for seed in range(3)]
    items = [server.publish(f"{n}.safetensors", body) for n, body in enumerate(bodies)]
    told = Told()
    get(server, items, tmp_path, progress=told, jobs=2)
    total = -(-sum(map(len, bodies)) // 1_000_000)
    done = [step[0] for step in told.steps]
    assert told.stages == ["download"]
    assert {step[2] for step in told.steps} == {"MB"}
    assert told.steps[-1] == (total - 1, total, "MB")
    assert done == sorted(done)


def test_one_failure_does_not_stop_the_others(server, tmp_path):
    good = server.publish("good.safetensors", BODY)
    gated = server.publish("gated.safetensors", weights(seed=1), gated=True)
    wrong = server.publish("wrong.safetensors", weights(seed=2))
    server.faults[cdn(weights(seed=2))] = [Fault(body=weights(seed=3))] * 9
    lost = entry("lost.onnx", url=f"{server.url}/web/lost.onnx")
    error = refusal(server, [gated, wrong, lost, good], tmp_path)
    assert error.message.startswith("3 of 4 files are not there:")
    lines = error.message.splitlines()[1:]
    assert lines[0].startswith("  gated: gated.safetensors in Org/Models is gated.")
    assert "HF_TOKEN" in lines[0]
    assert lines[1].startswith("  lost: http://127.0.0.1")
    assert "(404)" in lines[1]
    assert lines[2].startswith("  wrong: what http://127.0.0.1")
    assert "sha256" in lines[2]
    assert "very-secret" not in error.message
    assert locate(good, [tmp_path]) is not None
    assert [locate(item, [tmp_path]) for item in (gated, wrong, lost)] == [None] * 3
    assert parts(tmp_path) == []


def test_offline_names_what_is_missing(server, tmp_path, monkeypatch):
    items = [server.publish("a.safetensors", BODY), server.publish("b.safetensors", BODY)]
    text = refusal(server, items, tmp_path, offline=True).message
    assert "2 files are not in" in text
    for words in (str(tmp_path), f"a.safetensors in {REPO}", f"b.safetensors in {REPO}"):
        assert words in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(server, items, tmp_path).message == text
    assert server.asked == []
    assert not tmp_path.joinpath("a.safetensors").exists()


def test_too_small_a_disk_is_known_before_anything_is_fetched(server, tmp_path):
    items = [server.publish(f"{n}.safetensors", weights(1_500_000, n)) for n in range(2)]
    room = {"free_bytes": lambda folder: 2_900_000}
    error = refusal(server, items, tmp_path, transfer=room)
    assert error.code == "DISK_FULL"
    for words in ("3.0 MB are needed", "2.9 MB are free", str(tmp_path)):
        assert words in error.message
    assert server.count("GET") == 0
    # One of the files alone fits, and what is there already is not needed again.
    assert get(server, items[:1], tmp_path, transfer=room)[0].state == "downloaded"
    assert get(server, items, tmp_path, transfer=room)[1].state == "downloaded"


def test_what_is_partly_there_needs_less_room(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    server.faults[cdn(BODY)] = [Fault(close_after=1_000_000)]
    refusal(server, [item], tmp_path, transfer={"backoff_s": ()})
    room = {"free_bytes": lambda folder: 600_000}
    assert get(server, [item], tmp_path, transfer=room)[0].state == "resumed"
    assert server.sent[cdn(BODY)] == len(BODY)


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("a.safetensors", PAGE, "is a web page"),
        ("a.safetensors", BODY[:9000], "incomplete"),
        ("a.pth", PAGE, "is a web page"),
        ("a.onnx", POINTER, "Git LFS pointer"),
        ("a.onnx", b"ONNX", "is not an ONNX model"),
        ("a.torchscript", b"nothing like it", "is not a TorchScript"),
        ("a.json", b'{"half', "is not whole JSON"),
        ("a.json", b'{"error": "no"}', "is an error message"),
        ("a.bin", b'<?xml version="1.0"?><Error/>', "is an XML"),
        ("a.bin", b"", "is empty"),
    ],
)
def test_what_is_no_such_file_is_refused(server, tmp_path, name, body, words):
    item = server.publish_web(name, body)
    text = refusal(server, [item], tmp_path).message
    assert words in text
    assert ".part" not in text
    assert list(tmp_path.rglob("a.*")) == []


@pytest.mark.parametrize(
    ("name", "body"), [("a.bin", b"any bytes"), ("a.onnx", b"\x08\x07"), ("a.json", b"[1]")]
)
def test_what_looks_right_is_taken(tmp_path, name, body):
    path = tmp_path / "other-name"
    path.write_bytes(body)
    check_header(path, name)
    with pytest.raises(WeightsError, match="cannot be read"):
        check_header(tmp_path / "missing", name)


def test_a_listed_hash_stands_above_the_header(server, tmp_path):
    """What somebody vetted may look like anything."""
    item = replace(server.publish_web("a.onnx", b"ONNX"), sha256=digest(b"ONNX"))
    assert get(server, [item], tmp_path)[0].state == "downloaded"


def test_files_without_a_hash_are_named(server, tmp_path):
    items = [server.publish_web("a.onnx", b"\x08"), server.publish("b.safetensors", BODY)]
    told = Told()
    get(server, items, tmp_path, progress=told)
    assert told.warnings == ["the sha256 of a is not compared: only size and header are checked"]


def test_a_listed_size_or_hash_that_differs_fetches_nothing(server, tmp_path):
    item = server.publish("a.safetensors", BODY)
    for changes, words in (
        ({"size_bytes": 5}, f"the size {len(BODY)}, listed is 5"),
        ({"sha256": "0" * 64}, f"the sha256 {digest(BODY)}, listed is 000"),
    ):
        error = refusal(server, [replace(item, **changes)], tmp_path)
        assert words in error.message
        assert error.code == "MODEL_MISMATCH"
    assert server.count("GET") == 0


def test_a_size_that_only_turns_out_on_arrival(server, tmp_path):
    item = replace(server.publish_web("a.bin", b"12345"), size_bytes=6)
    server.faults["HEAD", "/web/a.bin"] = [Fault(status=405)]
    assert "offers 5 bytes, 6 are expected" in refusal(server, [item], tmp_path).message
    assert list(tmp_path.rglob("a.*")) == []


def test_a_file_that_is_replaced_while_it_is_pulled(server, tmp_path):
    item = replace(server.publish_web("a.bin", b"123456"), size_bytes=6)
    server.faults["GET", "/web/a.bin"] = [Fault(body=b"12345", headers={"ETag": '"new"'})]
    error = refusal(server, [item], tmp_path)
    assert "has 5 bytes, 6 are listed. It was deleted" in error.message
    assert error.code == "MODEL_MISMATCH"
    assert list(tmp_path.rglob("a.*")) == []


def test_verify_false_leaves_out_the_hash_alone(server, tmp_path):
    item = replace(server.publish("a.safetensors", BODY), sha256="0" * 64)
    assert get(server, [item], tmp_path, verify=False)[0].path.read_bytes() == BODY
    page = server.publish_web("b.safetensors", PAGE)
    assert "web page" in refusal(server, [page], tmp_path, verify=False).message
    short = replace(server.publish_web("c.bin", b"12345"), size_bytes=6)
    assert "size" in refusal(server, [short], tmp_path, verify=False).message


def test_a_gated_file_with_a_token(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path, token="hf_right") as server:
        item = server.publish("g.safetensors", BODY, gated=True)
        assert get(server, [item], tmp_path)[0].path.read_bytes() == BODY
        at_cdn = [ask for ask in server.asked if ask.path.startswith("/cdn/")]
        assert at_cdn
        assert all("authorization" not in ask.headers for ask in at_cdn)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    item = server.publish("a.safetensors", BODY)
    assert "cannot be written" in refusal(server, [item], tmp_path / "taken" / "deep").message


def test_file_sha256(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(BODY)
    steps = []
    assert file_sha256(path) == file_sha256(path, steps.append) == digest(BODY)
    assert sum(steps) == len(BODY)
    with pytest.raises(WeightsError, match="cannot be read"):
        file_sha256(tmp_path / "missing")


def test_the_parts_of_two_versions_are_two_files(tmp_path):
    first = Source("http://127.0.0.1/a", sha256="1" * 64)
    assert part_path(first, tmp_path / "a") != part_path(
        replace(first, sha256="2" * 64), tmp_path / "a"
    )
    assert part_path(first, tmp_path / "a").name.startswith("a.")
    assert part_path(first, tmp_path / "a").suffix == ".part"
