"""What is published: asked on the hub through its library, elsewhere with a HEAD request."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.weights.hub_server import COMMIT, REPO, Fault, digest, entry, serving, weights
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.weights.download_http import Broken, Stop, retry, retry_after_s
from xicon_infer.weights.hub import is_offline, remote_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        yield running


def ask(server, wanted, **changes):
    return remote_file(wanted, transfer=server.transfer(**changes))


def refusal(server, wanted, **changes):
    with pytest.raises(WeightsError) as caught:
        ask(server, wanted, **changes)
    return caught.value.message


def test_a_large_file_on_the_hub(server):
    body = weights()
    found = ask(server, server.publish("vae/a.safetensors", body))
    assert (found.revision, found.size_bytes, found.sha256) == (COMMIT, len(body), digest(body))
    assert found.url == f"{server.url}/{REPO}/resolve/{COMMIT}/vae/a.safetensors"
    assert found.etag == digest(body)
    assert server.count("GET") == 0  # nothing is fetched to know it


def test_a_small_file_on_the_hub_has_no_sha256(server):
    found = ask(server, server.publish("tokenizer.json", b"{}", lfs=False))
    assert (found.revision, found.size_bytes, found.sha256) == (COMMIT, 2, None)
    assert len(found.etag) == 40


def test_a_pinned_revision_is_asked_for(server):
    wanted = server.publish("a.safetensors", weights())
    assert ask(server, replace(wanted, revision=COMMIT)).revision == COMMIT
    assert server.count("HEAD", f"/resolve/{COMMIT}/") == 1
    text = refusal(server, replace(wanted, revision="f" * 40))
    assert "has no revision ffff" in text


def test_an_address(server):
    found = ask(server, server.publish_web("b.torchscript", b"PK\x03\x04 and more"))
    assert (found.revision, found.size_bytes, found.sha256) == (None, 13, None)
    assert found.etag.startswith('"')
    assert found.url == f"{server.url}/web/b.torchscript"


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_server_that_knows_get_alone(server, status):
    wanted = server.publish_web("b.torchscript", b"PK\x03\x04")
    server.faults["HEAD", "/web/b.torchscript"].append(Fault(status=status))
    found = ask(server, wanted)
    assert (found.size_bytes, found.etag) == (None, "")


def test_a_weak_etag_does_not_name_a_version(server):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    wanted = server.publish_web("b.onnx", b"\x08", etag='W/"1"')
    assert ask(server, wanted).etag == ""
    server.faults["HEAD", "/web/b.onnx"].append(Fault(headers={"Last-Modified": date}))
    assert ask(server, wanted).etag == date


def test_gated_without_a_token(server):
    text = refusal(server, server.publish("g.safetensors", weights(), gated=True))
    assert f"is gated. Accept its licence at {server.url}/{REPO}. " in text
    assert "HF_TOKEN" in text
    assert "hf auth login" in text
    assert "g.safetensors" in text


def test_gated_with_the_users_token(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path, token="hf_right") as server:
        found = ask(server, server.publish("g.safetensors", weights(), gated=True))
    assert found.headers["Authorization"] == "Bearer hf_right"
    assert "hf_right" not in repr(found)


def test_a_token_is_not_sent_where_that_is_forbidden(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with serving(monkeypatch, tmp_path, token="hf_right") as server:
        found = ask(server, server.publish("a.safetensors", weights()))
        assert "Authorization" not in found.headers
        assert "authorization" not in server.asked[0].headers


def test_a_token_goes_to_no_other_address(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path, token="hf_right") as server:
        found = ask(server, server.publish_web("b.onnx", b"\x08"))
        assert "Authorization" not in found.headers
        assert "authorization" not in server.asked[0].headers


def test_what_is_not_there(server):
    server.publish("a.safetensors", weights())
    assert "was not found at revision main" in refusal(server, entry("missing.safetensors"))
    assert "no such repository" in refusal(server, entry("a.safetensors", repo="No/Where"))
    text = refusal(server, entry("x.pt", url=f"{server.url}/web/x.pt?token=secret"))
    assert "404" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("status", "words"), [(403, "token is refused"), (410, "nothing at its"), (451, "answered 451")]
)
def test_refusals_are_not_asked_again(server, status, words):
    wanted = server.publish("a.safetensors", weights())
    path = f"/{REPO}/resolve/main/a.safetensors"
    server.faults[path] = [Fault(status=status)] * 9
    assert words in refusal(server, wanted)
    assert server.count("HEAD") == 1


def test_a_busy_hub_is_asked_again(server):
    wanted = server.publish("a.safetensors", weights())
    path = f"/{REPO}/resolve/main/a.safetensors"
    server.faults[path] = [Fault(status=503), Fault(status=429), Fault(status=500)]
    assert ask(server, wanted).revision == COMMIT
    server.faults[path] = [Fault(status=503)] * 9
    text = refusal(server, wanted)
    assert "503" in text
    assert "4 attempts" in text
    assert len(server.faults[path]) == 5


def test_the_wait_that_a_server_asks_for_is_kept(server):
    failures = [Broken("busy", 0.3)]

    def act():
        if failures:
            raise failures.pop()
        return "done"

    start = time.monotonic()
    assert retry(act, transfer=server.transfer(), stop=Stop()) == "done"
    assert 0.3 <= time.monotonic() - start < 3.0
    waits = [retry_after_s({"Retry-After": text}) for text in ("7", "9999", "", "Wed, 21 Oct")]
    assert waits == [7.0, 60.0, 0.0, 0.0]


def test_waits_are_as_long_as_said(server):
    wanted = server.publish_web("b.onnx", b"\x08")
    server.faults["/web/b.onnx"] = [Fault(status=503)] * 2
    start = time.monotonic()
    ask(server, wanted, backoff_s=(0.1, 0.2))
    assert 0.3 <= time.monotonic() - start < 3.0


def test_a_server_that_is_no_hub(server):
    server.publish("a.safetensors", weights(), lfs=False)
    path = f"/{REPO}/resolve/main/a.safetensors"
    server.faults[path] = [Fault(redirect=f"{server.url}/web/page")]
    server.publish_web("page", b"<html>")
    assert "not answered by a Hugging Face hub" in refusal(server, entry("a.safetensors"))


def test_nobody_there(server):
    wanted = entry("a.safetensors")
    text = refusal(server, wanted, endpoint="http://127.0.0.1:9", backoff_s=())
    assert "cannot be reached" in text
    text = refusal(server, entry("b", url="http://127.0.0.1:9/b"), backoff_s=())
    assert "connection" in text.lower()


@pytest.mark.parametrize("on_hub", [True, False])
def test_no_answer_in_time(server, on_hub):
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    wanted = entry("a", url="" if on_hub else f"{address}/a")
    start = time.monotonic()
    text = refusal(server, wanted, endpoint=address, timeout_s=0.3, backoff_s=())
    listening.close()
    assert "cannot be reached" in text or "in time" in text
    assert time.monotonic() - start < 3.0


def test_an_impossible_repository_name(server):
    assert "Correct the manifest" in refusal(server, entry("a", repo="two/many/parts"))


def test_stopping_ends_the_waits(server):
    wanted = server.publish_web("b.onnx", b"\x08")
    server.faults["/web/b.onnx"] = [Fault(status=503)] * 9
    stop = Stop()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        remote_file(wanted, transfer=server.transfer(backoff_s=(30.0,)), stop=stop)
    assert time.monotonic() - start < 3.0


def test_offline_asks_nobody(server, monkeypatch):
    wanted = [server.publish("a.safetensors", weights()), server.publish_web("b.onnx", b"\x08")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_offline()
    for item in wanted:
        assert "HF_HUB_OFFLINE" in refusal(server, item)
    assert server.asked == []


def test_the_library_is_loaded_when_it_is_needed_and_takes_the_environment(server):
    server.publish("a.safetensors", weights())
    code = (
        "import sys\n"
        "from xicon_infer.weights import hub, download\n"
        "assert not {'huggingface_hub', 'torch', 'httpx'} & set(sys.modules)\n"
        "from xicon_infer.weights.manifest import FileEntry\n"
        f"item = FileEntry('a', 'vae', (), {REPO!r}, 'a.safetensors', None, None, None, 'MIT', "
        "'test', ('a.safetensors',))\n"
        "print(hub.remote_file(item).revision)\n"
    )
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": "",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert ran.stdout.strip() == COMMIT, ran.stderr
