"""Uploads into a real S3 server, with faults on the way: whole, or not there at all."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from tests.media.s3_server import (
    KEY_ID,
    MIN_PART,
    SECRET,
    Fault,
    client,
    config_for,
    contents,
    fetch,
    hide_surroundings,
    new_bucket,
    proxy,
    random_file,
)
from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.deliver_s3 import Upload, check_bucket, upload

MIB = 1024**2
PART = 4 * MIN_PART


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    hide_surroundings(monkeypatch)


@pytest.fixture
def small(tmp_path):
    return source_of(random_file(tmp_path / "small.mp4", 100_000))


@pytest.fixture
def large(tmp_path):
    """Returns a file of three parts."""
    return source_of(random_file(tmp_path / "large.mp4", 2 * PART + 12_345))


def source_of(path):
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return Upload(path, "job-1/film.mp4", "video/mp4", len(data), digest)


def is_put(request):
    return request.method == "PUT"


def is_part(request):
    return request.is_part


def is_create(request):
    return request.method == "POST" and request.path.endswith("?uploads")


def is_complete(request):
    return request.method == "POST" and "uploadId=" in request.path


def is_abort(request):
    return request.method == "DELETE" and "uploadId=" in request.path


def test_a_small_file_arrives_with_its_headers_and_a_link_that_works(small):
    bucket = new_bucket()
    with proxy() as way:
        link = upload(config_for(way, bucket), small)
        assert fetch(link.url) == (200, small.path.read_bytes())
        put = next(request for request in way.seen if is_put(request))
    assert contents(bucket) == {small.key: small.path.read_bytes()}
    look = client()
    head = look.head_object(Bucket=bucket, Key=small.key)
    assert head["ContentType"] == "video/mp4"
    assert head["ContentDisposition"] == 'inline; filename="film.mp4"'
    assert head["Metadata"] == {"sha256": small.sha256}
    assert "X-Amz-Signature=" in link.url
    assert "X-Amz-Expires=604800" in link.url
    until = datetime.fromisoformat(link.expires_at.replace("Z", "+00:00"))
    left = until - datetime.now(timezone.utc)
    assert timedelta(days=7, seconds=-60) < left <= timedelta(days=7)
    # R2 and others refuse what boto3 adds by default.
    assert not [name for name in put.headers if "checksum" in name or "sdk-checksum" in name]
    assert "aws-chunked" not in put.headers.get("content-encoding", "")
    assert "x-amz-acl" not in put.headers
    # A connection that is kept outlives its client, and with it the job.
    assert put.headers["connection"] == "close"
    assert put.headers["authorization"].startswith("AWS4-HMAC-SHA256")


def test_options_of_the_bucket_reach_the_request(small):
    bucket = new_bucket()
    with proxy() as way:
        config = config_for(way, bucket, acl="public-read", public_base_url="https://cdn.example/x")
        link = upload(config, small)
        assert (link.url, link.expires_at) == ("https://cdn.example/x/job-1/film.mp4", None)
        assert next(filter(is_put, way.seen)).headers["x-amz-acl"] == "public-read"
        shorter = upload(config_for(way, bucket, url_expires_s=120), small)
        shortest = upload(config_for(way, bucket), small, expires_s=60)
        token = upload(config_for(way, bucket, session_token="token"), small)
        west = upload(config_for(way, bucket, region="eu-west-3"), small)
    assert "X-Amz-Expires=120&" in shorter.url
    assert "X-Amz-Expires=60&" in shortest.url
    assert "X-Amz-Security-Token=token" in token.url
    assert "%2Feu-west-3%2Fs3%2F" in west.url
    assert way.seen[-2].headers["x-amz-security-token"] == "token"


def test_the_bucket_stands_in_the_path_or_in_the_host(small, monkeypatch):
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    with proxy(Fault("503", times=None)) as way:
        here[0] = (*here[0][:4], ("127.0.0.1", way.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: here)
        for style in ("path", "virtual"):
            config = config_for(way, "films", addressing_style=style)
            config = replace(config, endpoint_url=f"http://s3.test:{way.port}")
            with pytest.raises(MediaError):
                check_bucket(config)
    seen = [(request.headers["host"].split(":")[0], request.path) for request in way.seen]
    assert seen == [
        ("s3.test", "/films/_health/xicon-check"),
        ("films.s3.test", "/_health/xicon-check"),
    ]


def test_a_file_of_more_than_16_mb_goes_in_parts_of_16_mb(tmp_path):
    bucket = new_bucket()
    exact = source_of(random_file(tmp_path / "exact.mp4", 16 * MIB))
    more = source_of(random_file(tmp_path / "more.mp4", 16 * MIB + 1))
    told = []
    with proxy() as way:
        upload(config_for(way, bucket), exact)
        assert way.count(is_part) == 0
        upload(config_for(way, bucket), more, step=lambda *values: told.append(values))
        lengths = sorted(int(r.headers["content-length"]) for r in way.seen if r.is_part)
    assert lengths == [1, 16 * MIB]
    assert contents(bucket) == {more.key: more.path.read_bytes()}
    assert told[-1] == (more.size, more.size)
    assert len(told) == 2


def test_parts_go_four_at_a_time(tmp_path):
    bucket = new_bucket()
    source = source_of(random_file(tmp_path / "a.mp4", 5 * PART))
    running, most, lock = 0, 0, threading.Lock()

    def together(request):
        nonlocal running, most
        if not request.is_part:
            return False
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.2)
        with lock:
            running -= 1
        return False

    with proxy() as way:
        # A fault's condition runs under the proxy's lock, so it is asked outside of it here.
        way.fault = lambda request: together(request) or None
        upload(config_for(way, bucket, part_bytes=PART), source)
    assert most == 4
    assert contents(bucket) == {source.key: source.path.read_bytes()}


@pytest.mark.parametrize("kind", ["503", "reset", "lost", "page"])
@pytest.mark.parametrize("where", [is_create, is_part, is_complete])
def test_one_fault_of_a_large_upload_is_overcome(large, kind, where):
    bucket, waits = new_bucket(), []
    with proxy(Fault(kind, where)) as way:
        link = upload(config_for(way, bucket, part_bytes=PART), large, sleep=waits.append)
        assert fetch(link.url) == (200, large.path.read_bytes())
    # A page instead of an answer to a part has no ETag to notice it by before the end.
    assert waits == [2.0]
    assert contents(bucket) == {large.key: large.path.read_bytes()}


def test_faults_inside_one_try_are_overcome_without_a_second_try(small):
    bucket, waits = new_bucket(), []
    with proxy(Fault("503", is_put), Fault("reset", is_put)) as way:
        upload(config_for(way, bucket, attempts=3), small, sleep=waits.append)
        assert way.count(is_put) == 3
    assert waits == []
    assert contents(bucket) == {small.key: small.path.read_bytes()}


def test_a_lost_answer_that_was_asked_again_leaves_no_second_upload(large):
    bucket = new_bucket()
    with proxy(Fault("lost", is_create)) as way:
        upload(config_for(way, bucket, part_bytes=PART, attempts=3), large)
        assert way.count(is_create) == 2
    assert contents(bucket) == {large.key: large.path.read_bytes()}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("503", "the storage answered 503 SlowDown"),
        ("403", "the storage answered 403 ExpiredToken"),
        ("reset", "no connection to the storage"),
        ("page", "no S3 storage"),
        ("slow", "the storage does not answer in time"),
    ],
)
@pytest.mark.parametrize("size", ["small", "large"])
def test_after_three_tries_it_gives_up_and_leaves_nothing(request, size, kind, text, caplog):
    source = request.getfixturevalue(size)
    bucket, waits = new_bucket(), []
    where = is_part if size == "large" else is_put
    caplog.set_level(logging.DEBUG)
    with proxy(Fault(kind, where, times=None, delay_s=0.6)) as way:
        config = config_for(way, bucket, part_bytes=PART, read_timeout_s=0.3)
        with pytest.raises(MediaError) as caught:
            upload(config, source, sleep=waits.append)
        tries = way.count(is_create if size == "large" else is_put)
        time.sleep(0.7 if kind == "slow" else 0)  # what is on its way still arrives
    assert (waits, tries) == ([2.0, 6.0], 3)
    assert caught.value.code == "UPLOAD_FAILED"
    assert text in caught.value.message
    if kind != "slow":  # there the server has the file; only its answer comes too late
        assert contents(bucket) == {}
    told = caplog.text + str(caught.value) + repr(caught.value)
    for secret in (SECRET, KEY_ID, "Signature", "127.0.0.1", str(source.path.parent)):
        assert secret not in told
    assert SECRET not in repr(config)
    assert KEY_ID not in repr(config)


def test_a_wrong_bucket_and_a_dead_endpoint_say_so(small):
    with proxy() as way, pytest.raises(MediaError, match="404 NoSuchBucket"):
        upload(config_for(way, "no-such-bucket"), small, sleep=lambda s: None)
    with pytest.raises(MediaError, match="no connection to the storage"):
        upload(config_for(way, "no-such-bucket"), small, sleep=lambda s: None)


@pytest.mark.parametrize("by", ["stop", "step"])
def test_a_cancelled_upload_leaves_nothing(tmp_path, by):
    bucket = new_bucket()
    source = source_of(random_file(tmp_path / "a.mp4", 4 * PART))

    def after_a_part(*_):
        if way.count(is_part) >= 1:
            raise Cancelled("stop")

    with proxy() as way:
        config = config_for(way, bucket, part_bytes=PART, threads=1)
        with pytest.raises(Cancelled):
            upload(config, source, **{by: after_a_part})
        assert way.count(is_part) < 4
        assert way.count(is_abort) == 1
        assert way.count(is_complete) == 0
    assert contents(bucket) == {}
    assert threading.active_count() < 20


def test_cancelling_does_not_wait_for_a_slow_part_to_be_tried_again(large):
    bucket, began = new_bucket(), time.monotonic()

    def after_a_second():
        if time.monotonic() - began > 0.3:
            raise Cancelled("stop")

    with proxy(Fault("slow", is_part, times=None, delay_s=1.0)) as way:
        config = config_for(way, bucket, part_bytes=PART, attempts=3, read_timeout_s=0.8)
        with pytest.raises(Cancelled):
            upload(config, large, stop=after_a_second)
        assert way.count(is_part) <= 4
    assert time.monotonic() - began < 8
    assert contents(bucket) == {}


def test_the_check_puts_and_deletes():
    bucket = new_bucket()
    with proxy() as way:
        assert check_bucket(config_for(way, bucket, prefix="films")) == []
        assert [(r.method, r.path.split("?")[0]) for r in way.seen] == [
            ("PUT", f"/{bucket}/films/_health/xicon-check"),
            ("DELETE", f"/{bucket}/films/_health/xicon-check"),
        ]
    assert contents(bucket) == {}
    with proxy(Fault("403", is_put)) as way, pytest.raises(MediaError, match="403 ExpiredToken"):
        check_bucket(config_for(way, bucket))
    with proxy(Fault("page")) as way, pytest.raises(MediaError, match="no S3 storage"):
        check_bucket(config_for(way, bucket))
    with proxy(Fault("403", lambda r: r.method == "DELETE")) as way:
        (told,) = check_bucket(config_for(way, bucket))
        assert "may not delete" in told
