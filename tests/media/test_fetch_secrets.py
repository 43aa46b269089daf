"""What messages must not hold: addresses, paths, queries, credentials, content, environment."""

from __future__ import annotations

import base64
import logging
import traceback

import pytest

from tests.media.boxes import mp4
from tests.media.fetching import PNG
from tests.media.hostile_server import GONE, PRIVATE, PUBLIC, World, answer, redirect
from tests.media.hostile_server import hostile_server as started
from xicon_infer.errors import XiconError
from xicon_infer.media.fetch import fetch
from xicon_infer.media.fetch_types import FetchLimits, MediaSource
from xicon_infer.media.source import MediaLimits
from xicon_infer.types import SilentProgress

MARK = "MARKER"
QUERY = f"X-Amz-Signature={MARK}&token={MARK}"
PAGES = {
    "/missing": answer(MARK.encode(), 404),
    "/login": answer(MARK.encode(), 401, WWW_Authenticate=f'Basic realm="{MARK}"'),
    "/busy": answer(MARK.encode(), 503, Retry_After="0"),
    "/short": answer(PNG, length=10**6),
    "/noise": b"HTTP/1.1 200 " + MARK.encode() + b"\r\nContent-Length: 3\r\n\r\nabc",
    "/page": answer(b"<html>" + MARK.encode()),
    "/json": answer(b'{"secret": "' + MARK.encode() + b'"}'),
    "/zip": answer(b"PK\3\4" + MARK.encode() * 9),
    "/damaged": answer(PNG[:20]),
    "/big": answer(bytes(3_000_000)),
    "/in": redirect(f"http://{PRIVATE}/{MARK}?{MARK}"),
    "/in2": redirect(f"http://{MARK}.inside.example/{MARK}?{MARK}"),
    "/file": redirect(f"file:///{MARK}"),
    "/user": redirect(f"https://{MARK}:{MARK}@cdn.example.com/"),
    "/round": redirect(f"/round?{MARK}"),
    "/br": answer(PNG, Content_Encoding=MARK),
    "/film": answer(mp4(samples=10**9)),
}
LIMITS = FetchLimits(media=MediaLimits(max_image_bytes=2_000_000), input_roots=None)


def sources(folder):
    text = base64.b64encode(PNG).decode()
    (folder / MARK).mkdir()
    (folder / MARK / f"{MARK}.png").write_bytes(b"<html>")
    for path in PAGES:
        yield MediaSource("url", f"https://cdn.example.com{path}?{QUERY}")
    for host in ("gone.example", "inside.example", "unknown.example"):
        yield MediaSource("url", f"https://{host}/{MARK}?{QUERY}")
    yield MediaSource("url", f"https://{MARK}:{MARK}@cdn.example.com/")
    yield MediaSource("url", f"{MARK}://a/")
    yield MediaSource("url", f"https://cdn.example.com:99/{MARK}?{QUERY}")
    yield MediaSource("base64", text + MARK + "*")
    yield MediaSource("base64", f"data:text/{MARK};base64,{text}")
    yield MediaSource("base64", base64.b64encode(b"<html>" + MARK.encode()).decode())
    yield MediaSource("path", f"{folder}/{MARK}/{MARK}.png")
    yield MediaSource("path", f"{folder}/{MARK}/missing")
    yield MediaSource("path", f"{folder}/{MARK}")
    yield MediaSource("path", f"{MARK}/relative")
    yield MediaSource("path", f"/proc/{MARK}")


def test_markers_never_come_back(tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", MARK)
    names = {"gone.example": [[GONE]], "inside.example": [[PUBLIC, PRIVATE]]}
    names["unknown.example"] = names[f"{MARK.lower()}.inside.example"] = [[]]
    job = tmp_path / "job"
    job.mkdir()
    messages = []
    with started() as server:
        for path, parts in PAGES.items():
            server.page(path, parts)
        for source in sources(tmp_path):
            for role in ("image", "video") if "film" in source.value else ("image",):
                world = World(server, names)
                with pytest.raises(XiconError) as caught:
                    fetch(source, role, "image", job, LIMITS, progress=SilentProgress(),
                          network=world.network())  # fmt: skip
                messages.append(str(caught.value))
                assert list(job.iterdir()) == []
    # The scheme is part of the contract's text, and cut short there.
    messages.remove(f"Unsupported URL scheme '{MARK.lower()}' for 'image'")
    forbidden = (MARK, MARK.lower(), PUBLIC, PRIVATE, GONE, "127.0.0.1", str(tmp_path), "/",
                 "Errno", "Traceback", "?", "example.com")  # fmt: skip
    types = "image/*, video/* and application/octet-stream"
    for message in messages:
        assert not [word for word in forbidden if word in message.replace(types, "")], message
        assert len(message) < 300
        assert message.isprintable()
    assert len(set(messages)) > 18
    assert MARK not in caplog.text
    out = capfd.readouterr()
    assert MARK not in out.out + out.err


def test_the_helper_process_knows_no_secret(tmp_path, monkeypatch):
    from xicon_infer.media.fetch_probe import _environment

    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", MARK)
    assert set(_environment()) == {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"}
    assert MARK not in "".join(_environment().values())


def test_errors_can_be_traced_in_the_log(tmp_path):
    with started() as server, pytest.raises(XiconError) as caught:
        server.page("/short", PAGES["/short"])
        fetch(MediaSource("url", "http://cdn.example.com/short"), "image", "image", tmp_path,
              FetchLimits(retry_waits_s=()), progress=SilentProgress(),
              network=World(server).network())  # fmt: skip
    assert "Broken" in "".join(traceback.format_exception(caught.value))
