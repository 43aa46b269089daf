"""Files that name other files: playlists, references, drawings. Nobody may be called."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from contextlib import suppress

import pytest

from tests.media.boxes import box, full, mp4
from tests.media.fetching import picture, take
from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_network import REAL
from xicon_infer.media.fetch_probe import check_video
from xicon_infer.media.fetch_sink import Intake, Tally
from xicon_infer.media.fetch_types import FetchLimits
from xicon_infer.media.image import load_image
from xicon_infer.media.video import probe


@pytest.fixture
def listener():
    """Yields a socket that must not be called; its address stands for any inside address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def playlists(url):
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
        "hls master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
        "hls key": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:1,\n{url}\n',
        "concat": f"ffconcat version 1.0\nfile {url}\n",
        "dash": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'>"
        f"<Period><BaseURL>{url}</BaseURL></Period></MPD>",
        "smooth": f"<SmoothStreamingMedia><StreamIndex Url='{url}'/></SmoothStreamingMedia>",
        "asx": f"<asx version='3.0'><entry><ref href='{url}'/></entry></asx>",
        "svg": f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}'/></svg>",
        "pls": f"[playlist]\nFile1={url}\nNumberOfEntries=1\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nm=video 9 RTP/AVP 96\n",
        "rtsp text": f"RTSPtext\r\n{url.replace('http', 'rtsp')}\r\n",
        "hidden": f"\n\n  \ufeff#EXTM3U\n#EXTINF:1,\n{url}\n",
        "behind a box": f"\0\0\0\x08free#EXTM3U\n#EXTINF:1,\n{url}\n",
    }


@pytest.mark.parametrize("name", playlists("http://127.0.0.1:12345/a"))
@pytest.mark.parametrize("role", ["image", "video"])
def test_text_that_names_others(tmp_path, listener, name, role):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.ts"
    content = playlists(url)[name].encode()
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", base64.b64encode(content).decode(), role=role)
    assert caught.value.code in ("UNSUPPORTED_MEDIA", "MEDIA_CORRUPT")
    # Whatever intake thinks of it, the decoder itself does not call either.
    for suffix in ("mp4", "m3u8", "mpd", "sdp"):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        with pytest.raises(MediaError):
            probe(tmp_path / f"a.{suffix}")
    with pytest.raises(MediaError):
        load_image(tmp_path / "a.mp4")


def alias(url):
    """Returns a Macintosh alias record that ends in a Unix path, as QuickTime writes it."""
    path = url.encode()
    record = bytes(8) + bytes(142) + struct.pack(">HH", 18, len(path)) + path + b"\xff\xff\0\0"
    return full(b"alis", record)


@pytest.mark.parametrize("kind", ["url", "urn", "alis", "cmov", "rmra"])
def test_films_that_name_others(tmp_path, listener, kind):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.mov"
    frame = picture(side=64)
    entries = {
        "url": full(b"url ", url.encode() + b"\0"),
        "urn": full(b"urn ", b"a\0" + url.encode() + b"\0"),
        "alis": alias(url),
    }
    content = mp4(sample=frame, data_reference=entries.get(kind, full(b"url ", flags=1)))
    if kind in ("cmov", "rmra"):
        inside = box(kind.encode(), box(b"rmda", full(b"rdrf", b"url " + url.encode())))
        content = content.replace(b"moov", b"free") + box(b"moov", inside)
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", base64.b64encode(content).decode(), role="video")
    assert caught.value.code == "UNSUPPORTED_MEDIA"
    assert "refers to other files" in caught.value.message
    # The decoder by itself, in both processes, may use what is in the file, and nothing else.
    (tmp_path / "a.mov").write_bytes(content)
    with suppress(MediaError):
        probe(tmp_path / "a.mov")
    with suppress(MediaError):
        check_video(tmp_path / "a.mov", intake_of(tmp_path))


def intake_of(folder):
    limits = FetchLimits()
    tally = Tally(folder, limits, REAL)
    return Intake("video", "video", limits, REAL, threading.Event(), tally, REAL.now() + 60)


@pytest.mark.parametrize(
    "entry",
    [
        full(b"url ", flags=1),
        full(b"alis", flags=1),
        full(b"url "),  # careless, and harmless
        full(b"url ", b"\0"),
    ],
)
def test_films_that_name_themselves(tmp_path, entry):
    content = mp4(sample=picture(side=64), data_reference=entry)
    assert take(tmp_path, "base64", base64.b64encode(content).decode(), role="video")
