"""Files sent as text: what is accepted, what is refused, and nothing of it in messages."""

from __future__ import annotations

import base64
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.media.fetching import PNG, picture, take
from tests.media.hostile_server import World
from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_types import FetchLimits
from xicon_infer.media.source import MediaLimits

# So that both characters that differ between the alphabets occur.
GIF = b"GIF89a" + picture("GIF")[6:] + b"\xff\xff\xbe\xfb\xef"
TEXT = base64.b64encode(GIF).decode()
PLAIN = TEXT.rstrip("=")


def test_the_alphabets_differ_here():
    assert {"+", "/"} <= set(TEXT)
    assert TEXT.endswith("=")


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        PLAIN,
        base64.urlsafe_b64encode(GIF).decode(),
        base64.urlsafe_b64encode(GIF).decode().rstrip("="),
        base64.encodebytes(GIF).decode(),
        "\r\n".join(TEXT[i : i + 64] for i in range(0, len(TEXT), 64)),
        f" \t{TEXT} \n",
        "data:image/gif;base64," + TEXT,
        "DATA:image/gif;BASE64," + TEXT,
        'data:image/svg+xml;charset=utf-8;name="a";base64,' + TEXT,
        "data:video/mp4;base64,\n" + TEXT,
        "data:application/octet-stream;base64," + TEXT,
    ],
)
def test_every_usual_spelling(tmp_path, text):
    found = take(tmp_path, "base64", text)
    assert found.path.read_bytes() == GIF
    assert (found.path.name, found.bytes, found.tries) == ("image.gif", len(GIF), 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "====",
        "data:image/png;base64,",
        TEXT[:100] + "*" + TEXT[100:],
        TEXT[:100] + "=" + TEXT[100:],
        TEXT + TEXT,
        TEXT + "=",
        TEXT + "==",
        PLAIN + "A" * ((1 - len(PLAIN)) % 4),
        "A",
        TEXT[:100] + "\u00e9" + TEXT[100:],
        TEXT[:100] + "\0" + TEXT[100:],
        TEXT[:100] + "%2B" + TEXT[100:],
        "data:image/gif," + TEXT,
        "data:;base64," + TEXT,
        "data:text/html;base64," + TEXT,
        "data:application/pdf;base64," + TEXT,
        "data:image/gif;base64" + TEXT,
        "data:" + "a" * 10_000 + "/b;base64," + TEXT,
        "https://cdn.example.com/a.png",
    ],
)
def test_everything_else(tmp_path, text):
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", text, field="end_image")
    assert caught.value.code == "INVALID_BASE64"
    assert caught.value.message.startswith("'end_image' is not valid base64: ")
    assert TEXT[:12] not in caught.value.message
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.text("AB=+-_/ \n", max_size=12))
def test_any_text_is_decoded_or_refused(tmp_path, text):
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", text)
    assert caught.value.code in ("INVALID_BASE64", "UNSUPPORTED_MEDIA")


def test_any_bytes_come_back(tmp_path):
    for length in range(1, 9):
        content = PNG + bytes(range(length))
        for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes):
            found = take(tmp_path, "base64", encode(content).decode())
            assert found.path.read_bytes() == content


def test_the_size_is_judged_before_anything_is_decoded(tmp_path):
    limits = FetchLimits(media=MediaLimits(max_image_bytes=len(PNG)))
    text = base64.encodebytes(PNG).decode()
    assert take(tmp_path, "base64", text, limits=limits).bytes == len(PNG)
    smaller = FetchLimits(media=MediaLimits(max_image_bytes=len(PNG) - 1))
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", text, limits=smaller)
    assert caught.value.code == "MEDIA_TOO_LARGE"
    huge = "A" * 8_000_000
    tracemalloc.start()
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", huge, limits=smaller)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "MEDIA_TOO_LARGE"
    assert peak < 1_000_000


def test_a_long_text_is_decoded_in_pieces(tmp_path):
    content = picture("BMP", side=900)
    assert len(content) > 2 * 2**20
    found = take(tmp_path, "base64", base64.b64encode(content).decode())
    assert found.path.read_bytes() == content


def test_the_disk_must_have_room(tmp_path):
    text = base64.b64encode(PNG).decode()
    limits = FetchLimits()
    needed = limits.reserve_bytes + len(PNG)
    assert take(tmp_path, "base64", text, world=World(None, free=needed))
    with pytest.raises(MediaError) as caught:
        take(tmp_path, "base64", text, world=World(None, free=needed - 1))
    assert caught.value.code == "DISK_FULL"
