"""Bodies that lie, drip, never end or unpack to gigabytes; and tries, waits and stops."""

from __future__ import annotations

import gzip
import itertools
import threading
import time
import tracemalloc
import zlib
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from tests.media.fetching import PNG, get, picture
from tests.media.hostile_server import World, answer
from tests.media.hostile_server import hostile_server as started
from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.fetch import fetch_all
from xicon_infer.media.fetch_http import retry_after_s
from xicon_infer.media.fetch_types import FetchLimits, MediaSource, Wanted
from xicon_infer.media.source import MediaLimits
from xicon_infer.types import SilentProgress

URL = "http://cdn.example.com/a"
SMALL = FetchLimits(media=MediaLimits(max_image_bytes=200_000, max_video_bytes=200_000))
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def server():
    with started() as running:
        yield running


def failure(world, folder, **options):
    with pytest.raises(MediaError) as caught:
        get(world, folder, URL, **options)
    assert list(folder.iterdir()) == []
    return caught.value


def chunked(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


def endless(head, block=bytes(65536)):
    return lambda number: itertools.chain([head], itertools.repeat(block))


def test_lengths_that_are_missing_or_wrong(tmp_path, server):
    good = {
        "none": answer(PNG, length=False),
        "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
        "no number": answer(PNG, length="many"),
        "negative": answer(PNG, length=-5),
        "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(PNG[:100], PNG[100:]),
        # What is announced counts; the rest is another message and not read.
        "too small": answer(PNG + b"<html>more</html>" * 999, length=len(PNG)),
    }
    for name, parts in good.items():
        server.page("/a", parts)
        found = get(World(server), tmp_path, URL)
        assert (name, found.path.read_bytes()) == (name, PNG)
        found.path.unlink()


@pytest.mark.parametrize(
    "cut",
    [
        answer(PNG, length=len(PNG) + 1),
        answer(b"", length=1000),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(PNG)[:-20],
        answer(gzip.compress(PNG)[:-12], Content_Encoding="gzip"),
        answer(b"no gzip at all", Content_Encoding="gzip"),
        HEAD[:12],
        HEAD,
        b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        b"",
    ],
)
def test_what_ends_early_is_fetched_again(tmp_path, server, cut):
    server.pages_in_turn("/a", cut, cut, answer(PNG))
    world = World(server)
    found = get(world, tmp_path, URL)
    assert (found.tries, found.path.read_bytes(), world.waits) == (3, PNG, [1.0, 3.0])
    found.path.unlink()
    server.page("/a", cut)
    error = failure(World(server), tmp_path)
    assert error.code == "FETCH_FAILED"
    assert "(3 tries)" in error.message
    assert len(server.requests["/a"]) == 6


def test_a_large_announcement_ends_it_at_once(tmp_path, server):
    server.pages["/a"] = endless(HEAD + b"Content-Length: 200001\r\n\r\n")
    error = failure(World(server), tmp_path, limits=SMALL)
    assert error.code == "MEDIA_TOO_LARGE"
    assert "at most 0.2 MB" in error.message
    assert len(server.requests["/a"]) == 1


@pytest.mark.parametrize("role", ["image", "video"])
@pytest.mark.parametrize(
    "head",
    [HEAD + b"\r\n", HEAD + b"Content-Length: 1000000000000000000000\r\n\r\n"],
)
def test_an_endless_body_ends(tmp_path, server, head, role):
    server.pages["/a"] = endless(head)
    error = failure(World(server), tmp_path, limits=SMALL, role=role)
    assert error.code == "MEDIA_TOO_LARGE"
    assert server.sent["/a"] < 20_000_000  # buffers of the sockets


@pytest.mark.parametrize(
    ("start", "block"),
    [
        (HEAD, b"Set-Cookie: a=b\r\n"),
        (HEAD + b"X: ", b"Set-Cookie"),
        (b"", b"HTTP"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_endless_headers_end(tmp_path, server, start, block):
    server.pages["/a"] = endless(start, block * 3000)
    error = failure(World(server), tmp_path, limits=FetchLimits(image_s=15.0))
    assert error.code == "FETCH_FAILED"


def test_a_gzip_bomb_is_stopped_while_it_unpacks(tmp_path, server):
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packed.compress(bytes(1 << 20)) for _ in range(100)) + packed.flush()
    assert len(bomb) < 110_000
    server.page("/a", answer(bomb, Content_Encoding="gzip"))
    tracemalloc.start()
    error = failure(World(server), tmp_path, limits=SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == "MEDIA_TOO_LARGE"
    assert peak < 5_000_000


def test_compressed_nothing_is_counted_too(tmp_path, server):
    # Empty deflate blocks: bytes arrive for ever and nothing comes out.
    head = HEAD + b"Content-Encoding: deflate\r\n\r\n\x78\x9c"
    server.pages["/a"] = endless(head, b"\x00\x00\x00\xff\xff" * 10_000)
    assert failure(World(server), tmp_path, limits=SMALL).code == "MEDIA_TOO_LARGE"


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity"])
def test_compressed_against_our_wish(tmp_path, server, encoding):
    pack = {"deflate": zlib.compress, "identity": bytes}.get(encoding, gzip.compress)
    server.page("/a", answer(pack(PNG), Content_Encoding=encoding))
    assert get(World(server), tmp_path, URL).path.read_bytes() == PNG


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_other_compressions_are_refused(tmp_path, server, encoding):
    server.page("/a", answer(PNG, Content_Encoding=encoding))
    error = failure(World(server), tmp_path)
    assert (error.code, len(server.requests["/a"])) == ("FETCH_FAILED", 1)


@pytest.mark.parametrize("start", [0, 3, 40])
def test_a_slow_drip_meets_the_total_time(tmp_path, server, start):
    # One byte each 5 s, in status line, headers or body: never a gap of 20 s.
    whole = answer(PNG)
    drip = [part for byte in whole[start:] for part in (bytes([byte]), 0.005)]
    server.page("/a", whole[:start], *drip)
    world = World(server, speed=1000)
    before = world.network().now()
    error = failure(world, tmp_path)
    assert error.code == "FETCH_TIMEOUT"
    assert "within 60 s" in error.message
    assert 60 <= world.network().now() - before < 10_000
    assert len(server.requests["/a"]) == 1


@pytest.mark.parametrize("silence", ["before", "between"])
def test_silence_meets_the_gap_and_is_tried_again(tmp_path, server, silence):
    whole = answer(PNG)
    first = b"" if silence == "before" else whole[:60]
    server.pages["/a"] = lambda number: [first, 5.0] if number < 2 else [whole]
    limits = FetchLimits(gap_s=0.05, retry_waits_s=(0.0, 0.0))
    assert get(World(server), tmp_path, URL, limits=limits).tries == 3
    (tmp_path / "image.png").unlink()
    server.page("/a", first, 5.0)
    error = failure(World(server), tmp_path, limits=limits)
    assert error.code == "FETCH_TIMEOUT"
    assert "nothing for 0.05 s" in error.message


def test_the_time_of_a_video_is_its_own(tmp_path, server):
    server.page("/a", HEAD, 5.0)
    limits = FetchLimits(image_s=5.0, video_s=0.1)
    error = failure(World(server), tmp_path, limits=limits, role="video")
    assert "within 0.1 s" in error.message


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_answers_that_may_change(tmp_path, server, status):
    server.pages_in_turn("/a", answer(b"later", status), answer(PNG))
    world = World(server)
    found = get(world, tmp_path, URL)
    assert (found.tries, world.waits) == (2, [1.0])
    assert found.path.read_bytes() == PNG


@pytest.mark.parametrize(
    ("asked", "waited"), [("0", 1.0), ("4", 4.0), ("3600", 10.0), ("soon", 1.0), ("-3", 1.0)]
)
def test_retry_after(tmp_path, server, asked, waited):
    server.pages_in_turn("/a", answer(status=429, Retry_After=asked), answer(PNG))
    world = World(server)
    get(world, tmp_path, URL)
    assert world.waits == [waited]


def test_retry_after_as_a_date():
    soon = datetime.now(timezone.utc) + timedelta(seconds=8)
    assert 5 < retry_after_s(format_datetime(soon, usegmt=True)) <= 8
    assert 5 < retry_after_s(format_datetime(soon).replace("+0000", "-0000")) <= 8
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("9" * 50) == 0


def test_the_number_of_tries_is_a_setting(tmp_path, server):
    server.page("/a", answer(status=503))
    failure(World(server), tmp_path, limits=FetchLimits(retry_waits_s=()))
    assert len(server.requests["/a"]) == 1


def test_waiting_ends_with_the_total_time(tmp_path, server):
    server.page("/a", answer(status=503))
    world = World(server)
    error = failure(world, tmp_path, limits=FetchLimits(image_s=2.0))
    assert error.code == "FETCH_TIMEOUT"
    assert world.waits[0] == 1.0
    assert all(wait <= 2 for wait in world.waits)


class Impatient(SilentProgress):
    """Stops the job at the second report, and keeps what it was told."""

    def __init__(self, after=2):
        super().__init__()
        self.told, self.after = [], after

    def step(self, done, total, unit="step"):
        self.told.append((done, total, unit))
        if len(self.told) >= self.after:
            raise Cancelled("stop")


@pytest.mark.parametrize("parts", [[HEAD, 30.0], [answer(PNG)[:200], 30.0], [answer(status=503)]])
def test_a_stop_is_quick_wherever_it_waits(tmp_path, server, parts):
    server.page("/a", *parts)
    before = time.monotonic()
    with pytest.raises(Cancelled):
        get(World(server, patient=True), tmp_path, URL, progress=Impatient())
    assert time.monotonic() - before < 5
    assert list(tmp_path.iterdir()) == []


def test_progress_tells_kilobytes(tmp_path, server):
    big = picture("BMP", side=200)
    server.page("/a", answer(big)[:60_000], 0.4, answer(big)[60_000:])
    progress = Impatient(after=10**6)
    get(World(server), tmp_path, URL, progress=progress)
    assert (59, 121, "kB") in progress.told


def both(world, folder, *, limits=None, role="image"):
    wanted = [
        Wanted(MediaSource("url", URL), "image", "image"),
        Wanted(MediaSource("url", "http://cdn.example.com/b"), role, "video"),
    ]
    limits = limits or FetchLimits()
    progress = SilentProgress()
    return fetch_all(wanted, folder, limits, progress=progress, network=world.network())


def test_two_files_at_the_same_time(tmp_path, server):
    meeting = threading.Barrier(2, timeout=20)

    def page(content):
        meeting.wait()  # fails if the other is not asked for meanwhile
        yield answer(content)

    server.pages["/a"] = lambda number: page(PNG)
    server.pages["/b"] = lambda number: page(picture("JPEG"))
    first, second = both(World(server), tmp_path)
    assert (first.path.name, second.path.name) == ("image.png", "video.jpg")


def test_the_first_failure_ends_the_other(tmp_path, server):
    server.page("/a", HEAD, 30.0)
    server.page("/b", answer(status=404))
    before = time.monotonic()
    with pytest.raises(MediaError) as caught:
        both(World(server), tmp_path)
    assert caught.value.field == "video"
    assert time.monotonic() - before < 5
    assert list(tmp_path.iterdir()) == []


def test_the_disk_must_have_room_for_all_of_them(tmp_path, server):
    server.page("/a", answer(PNG))
    server.page("/b", answer(PNG))
    reserve = FetchLimits().reserve_bytes
    assert len(both(World(server, free=reserve + 2 * len(PNG)), tmp_path)) == 2
    for path in tmp_path.iterdir():
        path.unlink()
    error = failure(World(server, free=reserve + len(PNG) - 1), tmp_path)
    assert error.code == "DISK_FULL"
    server.page("/a", answer(PNG)[:150], 0.3, answer(PNG)[150:])
    server.page("/b", 0.1, answer(PNG))
    with pytest.raises(MediaError) as caught:
        both(World(server, free=reserve + 2 * len(PNG) - 1000), tmp_path)
    assert caught.value.code == "DISK_FULL"
    assert failure(World(server, free=reserve - 1), tmp_path).code == "DISK_FULL"
    small = FetchLimits(reserve_bytes=0)
    assert get(World(server, free=len(PNG)), tmp_path, URL, limits=small)
