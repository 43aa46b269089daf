"""One PUT to a stranger's address: complete, nowhere else, and never to a private host."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace

import pytest

from tests.media.s3_server import Fault, client, contents, new_bucket, proxy
from xicon_infer.errors import Cancelled, InvalidRequest
from xicon_infer.media.deliver_put import PutFailed, plain_url, putter
from xicon_infer.media.fetch_network import REAL
from xicon_infer.media.fetch_types import FetchLimits

HOST = "films.example"


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(os.urandom(700_001))
    return path


def local(port, **limits):
    """Returns a PUT for which `films.example` is public and in truth a port of this machine."""
    asked = []

    def resolve(host, timeout_s):
        asked.append(host)
        return ["93.184.216.34"]

    def connect(address, port_asked, timeout_s, server_hostname):
        assert (address, server_hostname) == ("93.184.216.34", None)
        return socket.create_connection(("127.0.0.1", port), timeout_s)

    network = replace(REAL, resolve=resolve, connect=connect)
    return putter(FetchLimits(**limits), network=network, https_only=False)


def send(put, film, url=f"http://{HOST}/film.mp4?sig=marked", stop=lambda: None):
    put(url, film, mime="video/mp4", stop=stop)


def test_a_presigned_link_takes_the_file(film):
    bucket = new_bucket()
    place = {"Bucket": bucket, "Key": "their/film.mp4"}
    url = client().generate_presigned_url("put_object", Params=place, ExpiresIn=60)
    path = url.split("/", 3)[3]
    with proxy() as way:
        # Under any other name the server takes the first part of the host for the bucket.
        send(local(way.port), film, f"http://s3.amazonaws.com/{path}")
        (request,) = way.seen
    assert contents(bucket) == {"their/film.mp4": film.read_bytes()}
    assert client().head_object(**place)["ContentType"] == "video/mp4"
    assert request.headers["content-length"] == str(film.stat().st_size)
    assert request.headers["host"] == "s3.amazonaws.com"
    assert request.path == f"/{path}"
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("kind", "text", "again"),
    [
        ("503", "answered 503", True),
        ("403", "may have expired", False),
        ("301", "redirects", False),
        ("reset", "", True),
        ("lost", "connection broke", True),
    ],
)
def test_a_fault_is_told_without_the_address(film, kind, text, again):
    bucket = new_bucket()
    with proxy(Fault(kind)) as way, pytest.raises(PutFailed) as caught:
        send(local(way.port), film, f"http://{HOST}/{bucket}/a.mp4?sig=marked")
    assert len(way.seen) == 1
    assert (text in str(caught.value), caught.value.again) == (True, again)
    for secret in ("marked", HOST, "a.mp4"):
        assert secret not in str(caught.value) + repr(caught.value)


def test_the_rules_for_urls_hold(film):
    put = putter(FetchLimits())
    for url, code in (
        ("http://films.example/a.mp4", "URL_SCHEME"),
        ("ftp://films.example/a.mp4", "URL_SCHEME"),
        ("https://127.0.0.1/a.mp4", "URL_BLOCKED"),
        ("https://[::1]/a.mp4", "URL_BLOCKED"),
        ("https://films.example:22/a.mp4", "URL_BLOCKED"),
        ("https://a:b@films.example/a.mp4", "URL_INVALID"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            send(put, film, url)
        assert caught.value.code == code


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"]])
def test_a_name_that_leads_to_a_private_address_gets_nothing(film, addresses):
    def connect(*args):
        raise AssertionError("no connection may be tried")

    network = replace(REAL, resolve=lambda h, t: addresses, connect=connect)
    with pytest.raises(InvalidRequest, match="not allowed"):
        send(putter(network=network), film, "https://films.example/a")


def test_tls_is_asked_for_with_the_name_and_the_next_address_is_tried(film):
    tried = []

    def connect(address, port, timeout_s, server_hostname):
        tried.append((address, port, server_hostname))
        raise ConnectionRefusedError

    network = replace(REAL, resolve=lambda h, t: ["93.184.216.34", "1.1.1.1"], connect=connect)
    with pytest.raises(PutFailed, match="broke"):
        send(putter(network=network), film, "https://films.example/a")
    assert tried == [("93.184.216.34", 443, HOST), ("1.1.1.1", 443, HOST)]


def test_a_receiver_that_does_not_answer_is_given_up(film):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(PutFailed, match="in time") as caught:
            send(local(port, gap_s=0.1), film)
    assert caught.value.again


def test_a_receiver_that_drips_is_given_up_in_the_end(film):
    clock = [0.0]

    def stop():
        clock[0] += 1.0

    with proxy() as way:
        put = local(way.port)
        slow = replace(REAL, now=lambda: clock[0], resolve=lambda h, t: ["93.184.216.34"])

        def connect(*args):
            return socket.create_connection(("127.0.0.1", way.port))

        put = putter(
            FetchLimits(video_s=1), network=replace(slow, connect=connect), https_only=False
        )
        with pytest.raises(PutFailed, match="in time"):
            send(put, film, stop=stop)


def test_cancelling_ends_it_between_two_blocks(film):
    asked = []

    def stop():
        asked.append(1)
        if len(asked) > 6:
            raise Cancelled("stop")

    bucket = new_bucket()
    with proxy() as way, pytest.raises(Cancelled):
        send(local(way.port), film, f"http://{HOST}/{bucket}/a.mp4", stop)
    assert contents(bucket) == {}
    assert threading.active_count() < 20


def test_the_answer_shows_the_address_without_its_signature():
    assert plain_url("https://a.example/b.mp4?sig=1#x") == "https://a.example/b.mp4"
    assert plain_url("https://a.example/b.mp4#x?y") == "https://a.example/b.mp4"
