"""One file from one address: what is resumed, checked, refused, and left afterwards."""

from __future__ import annotations

import errno
import fcntl
import gzip
import multiprocessing
import threading
import time
from dataclasses import replace

import pytest

from tests.weights.hub_server import Fault, digest, serving
from tests.weights.url_case import BODY, OTHER, PATH, get, interrupt, parts, refusal, source
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.weights.download_http import Stop, Transfer, free_bytes
from xicon_infer.weights.download_url import Source, fetch, kept_bytes, part_path


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path) as running:
        running.publish_web("file.bin", BODY)
        yield running


def test_a_file_arrives_whole(server, tmp_path):
    target, steps = tmp_path / "deep" / "file.bin", []
    assert get(server, source(server), target, gained=steps.append) == "downloaded"
    assert target.read_bytes() == BODY
    assert sum(steps) == len(BODY)
    assert parts(target.parent) == []
    assert server.sent[PATH] == len(BODY)


def test_what_is_at_the_place_is_replaced_at_the_end_only(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    wanted = source(server, sha256="0" * 64)
    with pytest.raises(WeightsError):
        fetch(
            wanted,
            target,
            transfer=server.transfer(),
            stop=Stop(),
            arrived=lambda: False,
            check=lambda path: None,
            gained=lambda n: None,
        )
    assert target.read_bytes() == b"old"


def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path):
    server.faults[PATH] = [Fault(close_after=30_000), Fault(close_after=50_000)]
    steps = []
    assert get(server, source(server), tmp_path / "f", gained=steps.append) == "downloaded"
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.sent[PATH] == len(BODY) == sum(steps)
    assert [ask.headers.get("range") for ask in server.asked] == [
        None,
        "bytes=30000-",
        "bytes=80000-",
    ]


def test_the_next_run_goes_on_too(server, tmp_path):
    target, steps = tmp_path / "file.bin", []
    interrupt(server, source(server), target)
    assert get(server, source(server), target, gained=steps.append) == "resumed"
    assert target.read_bytes() == BODY
    assert server.sent[PATH] == len(BODY) - 40_000
    assert sum(steps) == len(BODY)
    assert server.asked[0].headers["if-range"] == source(server).etag


def test_a_whole_part_needs_no_request(server, tmp_path):
    target = tmp_path / "file.bin"
    part_path(source(server), target).write_bytes(BODY)
    assert get(server, source(server), target) == "resumed"
    assert server.asked == []
    assert target.read_bytes() == BODY


def test_a_part_that_is_too_long_is_not_used(server, tmp_path):
    target = tmp_path / "file.bin"
    part_path(source(server), target).write_bytes(BODY + b"x")
    assert kept_bytes(source(server), target) == 0
    assert get(server, source(server), target) == "downloaded"
    assert target.read_bytes() == BODY


def test_attempts_are_bounded(server, tmp_path):
    server.faults[PATH] = [Fault(close_after=0)] * 99
    error = refusal(server, source(server), tmp_path / "f", backoff_s=(0.0, 0.0))
    assert "3 attempts" in error.message
    assert server.count("GET") == 3
    assert parts(tmp_path) == []  # nothing arrived, nothing is kept


def test_attempts_that_bring_much_are_not_counted(server, tmp_path):
    body = BODY * 50  # 5 MB, a connection every 1.2 MB
    server.publish_web("file.bin", body)
    server.faults[PATH] = [Fault(close_after=1_200_000)] * 4
    wanted = source(server, size_bytes=len(body), sha256=digest(body))
    assert get(server, wanted, tmp_path / "f", backoff_s=(0.0,)) == "downloaded"
    assert server.sent[PATH] == len(body)
    assert server.count("GET") == 5


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.faults[PATH] = [Fault(status=503), Fault(status=408)]
    assert get(server, source(server), tmp_path / "f") == "downloaded"
    assert server.count("GET") == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=404), "nothing at its address (404)"),
        (Fault(status=403), "refuses access (403)"),
        (Fault(status=401), "refuses access (401)"),
        (Fault(status=418), "answered 418"),
    ],
)
def test_a_refusal_is_final(server, tmp_path, fault, words):
    server.faults[PATH] = [fault] * 9
    error = refusal(server, source(server, url=f"{server.url}{PATH}?sig=secret"), tmp_path / "f")
    assert words in error.message
    assert PATH in error.message
    assert "secret" not in error.message
    assert server.count("GET") == 1
    assert parts(tmp_path) == []


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    server.faults[PATH] = [Fault(body=OTHER)]
    error = refusal(server, source(server), tmp_path / "f")
    assert digest(OTHER) in error.message
    assert digest(BODY) in error.message
    assert "deleted" in error.message
    assert parts(tmp_path) == []
    assert get(server, source(server), tmp_path / "f") == "downloaded"


def test_what_the_caller_refuses_leaves_nothing(server, tmp_path):
    def check(path):
        assert path.read_bytes() == BODY
        raise WeightsError("not this one")

    assert refusal(server, source(server), tmp_path / "f", check=check).message == "not this one"
    assert parts(tmp_path) == []


@pytest.mark.parametrize("claim", [50_000, 200_000])
def test_a_length_that_lies(server, tmp_path, claim):
    server.faults[PATH] = [Fault(claim=claim)] * 9
    error = refusal(server, source(server), tmp_path / "f")
    assert f"offers {claim} bytes, {len(BODY)} are expected" in error.message


@pytest.mark.parametrize(
    ("waits", "words"),
    [((), "70000 of 102400 bytes"), ((0.0,), "shorter than what has arrived, after 2 attempts")],
)
def test_a_file_that_is_shorter_than_it_says(server, tmp_path, waits, words):
    server.web["file.bin"] = replace(server.web["file.bin"], body=BODY[:70_000])
    server.faults[PATH] = [Fault(claim=len(BODY))] * 9
    error = refusal(server, source(server), tmp_path / "f", backoff_s=waits)
    assert words in error.message


def test_a_server_that_ignores_range(server, tmp_path):
    target, steps = tmp_path / "file.bin", []
    interrupt(server, source(server), target)
    server.faults[PATH] = [Fault(no_range=True)]
    get(server, source(server), target, gained=steps.append)
    assert target.read_bytes() == BODY
    assert server.sent[PATH] == len(BODY) == sum(steps)


def test_a_server_that_sends_another_piece(server, tmp_path):
    target = tmp_path / "file.bin"
    interrupt(server, source(server), target)
    server.faults[PATH] = [Fault(range_shift=7)]
    get(server, source(server), target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("body", [OTHER, BODY[:20_000], BODY + OTHER])
def test_a_file_that_changes_on_the_way(server, tmp_path, body):
    """Nothing is listed about it: the version that is published at the end is what counts."""
    wanted = source(server, sha256=None)
    server.faults[PATH] = [Fault(close_after=40_000)]

    def publish_another(num_bytes):
        server.publish_web("file.bin", body)

    get(server, wanted, tmp_path / "f", gained=publish_another)
    assert (tmp_path / "f").read_bytes() == body


def test_a_file_that_changed_since_the_last_run(server, tmp_path):
    target = tmp_path / "file.bin"
    interrupt(server, source(server, sha256=None), target)
    server.publish_web("file.bin", OTHER)
    wanted = source(server, sha256=None)
    assert kept_bytes(wanted, target) == 0
    assert get(server, wanted, target) == "downloaded"
    assert target.read_bytes() == OTHER
    assert parts(tmp_path) == []  # the part of the old version is gone


def test_a_shorter_file_than_what_has_arrived(server, tmp_path):
    target = tmp_path / "file.bin"
    wanted = source(server, sha256=None, size_bytes=None, etag='"fixed"')
    part_path(wanted, target).write_bytes(BODY)
    server.publish_web("file.bin", BODY[:1000], etag='"fixed"')
    get(server, wanted, target)
    assert target.read_bytes() == BODY[:1000]


def test_a_server_that_tells_nothing(server, tmp_path):
    """Without length, hash and ETag nothing can be resumed, and the end is where it ends."""
    server.publish_web("file.bin", BODY, etag="")
    wanted = source(server, sha256=None, size_bytes=None, etag="")
    part_path(wanted, tmp_path / "f").write_bytes(b"from who knows which version")
    assert kept_bytes(wanted, tmp_path / "f") == 0
    server.faults[PATH] = [Fault(close_after=100)]
    assert get(server, wanted, tmp_path / "f") == "downloaded"
    assert (tmp_path / "f").read_bytes() == BODY
    assert [ask.headers.get("range") for ask in server.asked] == [None, None]


def test_an_etag_that_comes_with_the_answer_serves_to_resume(server, tmp_path):
    wanted = source(server, sha256=None, size_bytes=None, etag="")
    server.faults[PATH] = [Fault(close_after=100)]
    get(server, wanted, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.sent[PATH] == len(BODY)
    assert server.asked[1].headers["if-range"] == server.web["file.bin"].etag


def test_a_packed_answer_is_refused(server, tmp_path):
    fault = Fault(body=gzip.compress(BODY), headers={"Content-Encoding": "gzip"})
    server.faults[PATH] = [fault]
    assert "packs it as gzip" in refusal(server, source(server), tmp_path / "f").message
    assert server.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(server, tmp_path, number):
    room = [60_000]

    def write(file, block):
        if room[0] < len(block):
            file.write(block[: room[0]])
            raise OSError(number, "No space left on device")
        room[0] -= len(block)
        file.write(block)

    error = refusal(server, source(server), tmp_path / "f", write=write)
    assert error.code == "DISK_FULL"
    assert "Free some space" in error.message
    assert server.count("GET") == 1  # more attempts make no room
    assert 0 < kept_bytes(source(server), tmp_path / "f") <= 60_000
    assert get(server, source(server), tmp_path / "f") == "resumed"
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    error = refusal(server, source(server), tmp_path / "taken" / "deep" / "f")
    assert "cannot be written" in error.message
    assert error.code == "MODEL_MISSING"
    assert server.asked == []


def test_the_room_is_measured_where_the_folder_will_be(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0
    assert Transfer().free_bytes(tmp_path) > 0


def test_the_part_of_a_running_download_is_not_taken(server, tmp_path):
    target = tmp_path / "file.bin"
    part = part_path(source(server), target)
    part.write_bytes(BODY[:10])
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.5, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        start = time.monotonic()
        get(server, source(server), target)
        assert time.monotonic() - start >= 0.4
        timer.join()
    assert target.read_bytes() == BODY


def test_the_part_of_a_download_that_failed_meanwhile_is_not_written_to(server, tmp_path):
    target = tmp_path / "file.bin"
    part = part_path(source(server), target)
    part.write_bytes(OTHER[:10])

    def fail(file):
        part.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)

    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, fail, (file,))
        timer.start()
        assert get(server, source(server), target) == "downloaded"
        timer.join()
    assert target.read_bytes() == BODY


def test_waiting_for_another_download_can_be_stopped(server, tmp_path):
    part = part_path(source(server), tmp_path / "f")
    part.write_bytes(b"x")
    stop = Stop()
    threading.Timer(0.2, stop.set).start()
    with part.open("rb") as file, pytest.raises(Cancelled):
        fcntl.flock(file, fcntl.LOCK_EX)
        get(server, source(server), tmp_path / "f", stop=stop)
    assert server.asked == []


def test_a_part_of_another_version_in_use_is_left_alone(server, tmp_path):
    other = part_path(source(server, etag='"other"'), tmp_path / "f")
    other.write_bytes(b"x")
    mine = tmp_path / "f.notes.part"
    mine.write_bytes(b"x")
    with other.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        get(server, source(server), tmp_path / "f")
    assert sorted(parts(tmp_path)) == sorted([other.name, mine.name])


def _pull_alone(url, target, queue):
    wanted = Source(url, size_bytes=len(BODY), sha256=digest(BODY), etag='"v"')
    state = fetch(
        wanted,
        target,
        transfer=Transfer(timeout_s=5.0),
        stop=Stop(),
        arrived=target.is_file,
        check=lambda path: time.sleep(0.2),
        gained=lambda n: None,
    )
    queue.put(state)


def test_two_processes_fetch_a_file_once(server, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    server.publish_web("file.bin", BODY, etag='"v"')
    target = tmp_path / "file.bin"
    arguments = (f"{server.url}{PATH}", target, queue)
    workers = [context.Process(target=_pull_alone, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    states = sorted(queue.get(timeout=10) for _ in workers)
    for worker in workers:
        worker.join()
    assert states == ["downloaded", "present"]
    assert target.read_bytes() == BODY
    assert server.sent[PATH] == len(BODY)
    assert parts(tmp_path) == []
