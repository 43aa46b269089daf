"""The connection: redirects, encryption, servers that are slow, and stopping at once."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from tests.weights.hub_server import Fault, digest, serving
from tests.weights.url_case import BODY, PATH, get, interrupt, refusal, source
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.weights.download_http import Stop, check_redirect
from xicon_infer.weights.download_url import kept_bytes


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        running.publish_web("file.bin", BODY)
        yield running


def test_redirects_are_followed(server, tmp_path):
    server.web["old.bin"] = server.web["file.bin"]
    server.faults["/web/old.bin"] = [Fault(redirect=f"{server.cdn}{PATH}")]
    wanted = source(server, url=f"{server.url}/web/old.bin", headers={"Authorization": "Bearer x"})
    get(server, wanted, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    # The token was for the first host alone.
    assert [ask.headers.get("authorization") for ask in server.asked] == ["Bearer x", None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])  # Python 3.10 knows no 308
def test_a_redirect_on_the_same_host_keeps_the_token(server, tmp_path, status):
    server.faults["/web/old.bin"] = [Fault(redirect=PATH, status=status)]
    wanted = source(server, url=f"{server.url}/web/old.bin", headers={"Authorization": "Bearer x"})
    get(server, wanted, tmp_path / "f")
    assert [ask.headers.get("authorization") for ask in server.asked] == ["Bearer x"] * 2


def test_range_survives_a_redirect(server, tmp_path):
    target = tmp_path / "file.bin"
    interrupt(server, source(server), target)
    server.faults["/web/old.bin"] = [Fault(redirect=PATH)]
    get(server, source(server, url=f"{server.url}/web/old.bin"), target)
    assert server.sent[PATH] == len(BODY) - 40_000


def test_a_redirect_loop_ends(server, tmp_path):
    server.faults[PATH] = [Fault(redirect=PATH)] * 99
    assert "circle" in refusal(server, source(server), tmp_path / "f").message


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_a_redirect_out_of_http_is_refused(server, tmp_path, place):
    server.faults[PATH] = [Fault(redirect=place)] * 9
    refusal(server, source(server), tmp_path / "f")
    assert server.count("GET") == 1


@pytest.mark.parametrize(
    ("old", "new", "safe"),
    [
        ("https://a.example/x", "https://b.example/y", True),
        ("http://a.example/x", "https://a.example/x", True),
        ("https://a.example/x", "http://a.example/x", False),
        ("https://a.example/x", "file:///etc/passwd", False),
        ("http://a.example/x", "data:text/plain,x", False),
    ],
)
def test_encryption_is_not_given_up(old, new, safe):
    if safe:
        check_redirect(old, new)
    else:
        with pytest.raises(WeightsError, match="not safe"):
            check_redirect(old, new)


def test_a_server_that_drips_is_given_up(server, tmp_path):
    server.faults[PATH] = [Fault(drip_s=0.01)] * 2
    start = time.monotonic()
    error = refusal(server, source(server), tmp_path / "f", timeout_s=0.3, backoff_s=())
    assert "bytes a second" in error.message
    assert time.monotonic() - start < 3.0
    assert kept_bytes(source(server), tmp_path / "f") > 0


def test_a_slow_server_is_fast_enough_where_that_is_allowed(server, tmp_path):
    server.web["file.bin"] = replace(server.web["file.bin"], body=BODY[:60])
    server.faults[PATH] = [Fault(drip_s=0.01)]
    wanted = source(server, size_bytes=60, sha256=digest(BODY[:60]))
    assert get(server, wanted, tmp_path / "f", timeout_s=0.3, min_rate=1.0) == "downloaded"


def test_a_silent_server_is_given_up(server, tmp_path):
    server.faults[PATH] = [Fault(drip_s=2.0)]
    error = refusal(server, source(server), tmp_path / "f", timeout_s=0.3, backoff_s=())
    assert "in time" in error.message


def test_stopping_wakes_a_reader_at_once_and_keeps_the_part(server, tmp_path):
    server.faults[PATH] = [Fault(drip_s=30.0)]
    stop = Stop()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        get(server, source(server), tmp_path / "f", stop=stop, timeout_s=60.0)
    assert time.monotonic() - start < 1.3
    assert kept_bytes(source(server), tmp_path / "f") == 1
    assert get(server, source(server), tmp_path / "f") == "resumed"


@pytest.fixture
def encrypted(server, tmp_path):
    """Turns the second host of the server to TLS; returns the certificate to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    places = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*words.split(), *names, *places], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    host = server.hosts[1]
    host.socket = context.wrap_socket(host.socket, server_side=True)
    server.cdn = server.cdn.replace("http:", "https:")
    return certificate


def test_encrypted_files_arrive_and_can_be_stopped(server, encrypted, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(encrypted))
    wanted = source(server, url=f"{server.cdn}{PATH}")
    stop = Stop()
    server.faults[PATH] = [Fault(close_after=20_000), Fault(drip_s=30.0)]
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        get(server, wanted, tmp_path / "f", stop=stop, timeout_s=60.0)
    assert time.monotonic() - start < 1.5
    assert kept_bytes(wanted, tmp_path / "f") == 20_001
    assert get(server, wanted, tmp_path / "f") == "resumed"
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_redirect_that_gives_up_encryption(server, encrypted, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(encrypted))
    server.faults["/web/old.bin"] = [Fault(redirect=f"{server.url}{PATH}")]
    error = refusal(server, source(server, url=f"{server.cdn}/web/old.bin"), tmp_path / "f")
    assert "from https to http, which is not safe" in error.message
    assert server.count("GET") == 1


def test_an_unknown_certificate_is_not_trusted(server, encrypted, tmp_path):
    error = refusal(server, source(server, url=f"{server.cdn}{PATH}"), tmp_path / "f")
    assert "certificate is not valid" in error.message
    assert server.asked == []
