"""What a file is, is decided by its bytes; headers that ask for too much are refused unread."""

from __future__ import annotations

import base64
import re
import struct
import time

import numpy as np
import pytest
from PIL import Image

from tests.media.boxes import box, full, mp4, png_header
from tests.media.fetching import PNG, get, picture, take
from tests.media.hostile_server import World, answer
from tests.media.hostile_server import hostile_server as started
from tests.media.samples import make_video, ramp
from xicon_infer.errors import MediaError
from xicon_infer.media.fetch import fetch_all
from xicon_infer.media.fetch_mp4 import check_references
from xicon_infer.media.fetch_types import FetchLimits, MediaSource, Wanted
from xicon_infer.media.image import load_image
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import probe
from xicon_infer.types import SilentProgress

FILM = mp4(sample=picture(side=64))


def sent(folder, content, *, role="image", limits=None):
    return take(folder, "base64", base64.b64encode(content).decode(), role=role, limits=limits)


def refused(folder, content, *, role="image", limits=None):
    """Returns the error; nothing may be left."""
    with pytest.raises(MediaError) as caught:
        sent(folder, content, role=role, limits=limits)
    assert list(folder.iterdir()) == []
    return caught.value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_pictures(tmp_path, kind):
    found = sent(tmp_path, picture(kind))
    assert found.kind == kind
    assert load_image(found.path).shape == (24, 24, 3)
    suffixes = {"JPEG": ".jpg"}
    assert found.path.name == "image" + suffixes.get(kind, f".{kind.lower()}")


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("video.mp4", "MP4", {}),
        ("video.mov", "MP4", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
        ("video.mkv", "MATROSKA", {}),
        ("video.webm", "MATROSKA", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
        ("video.gif", "GIF", {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
)
def test_videos(tmp_path, name, kind, options):
    (tmp_path / "job").mkdir()
    source = make_video(tmp_path / name, ramp(4), **options)
    found = take(tmp_path / "job", "path", str(source), role="video", field="pose_video")
    assert found.kind == kind
    assert found.path.name == {"MP4": "pose_video.mp4", "MATROSKA": "pose_video.mkv"}.get(
        kind, "pose_video.gif"
    )
    assert probe(found.path).num_frames == 4


@pytest.mark.parametrize(
    ("content", "role", "words"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image", "SVG"),
        (b"<?xml version='1.0'?><svg/>", "image", "SVG"),
        (b"II*\0" + bytes(50), "image", "TIFF"),
        (b"MM\0*" + bytes(50), "image", "TIFF"),
        (b"%PDF-1.7" + bytes(50), "image", "PDF"),
        (b"8BPS" + bytes(50), "image", "PSD"),
        (b"PK\3\4" + bytes(50), "image", "ZIP"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "image", "HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(50), "image", "AVIF"),
        (b"just text", "image", "unknown"),
        (b"just text", "video", "unknown"),
        (b"GIF90a" + bytes(50), "image", "unknown"),
        (b"\x47" + bytes(187), "video", "unknown"),
        (b"RIFF\0\0\0\0AVI LIST", "video", "Allowed: MP4, MOV, MKV, WebM, GIF"),
        (b"RIFF\0\0\0\0WAVEfmt ", "video", "sound"),
        (FILM, "image", "a picture is expected"),
        (PNG, "video", "a video is expected"),
        (b"<!doctype html><html>" + PNG, "image", "web page"),
        (b"#EXTM3U\n" + FILM, "video", "playlist"),
    ],
)
def test_other_files(tmp_path, content, role, words):
    error = refused(tmp_path, content, role=role)
    assert error.code == "UNSUPPORTED_MEDIA"
    assert words in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b" \n<!DOCTYPE html><title>Log in</title>", "the URL returned a web page"),
        (b"\xef\xbb\xbf<html>", "the URL returned a web page"),
        (b'{"error": "expired"}', "the URL returned JSON text"),
        (b"[1]", "the URL returned JSON text"),
    ],
)
@pytest.mark.parametrize("role", ["image", "video"])
def test_a_page_instead_of_the_file(tmp_path, body, words, role):
    with started() as server:
        server.page("/a.mp4", answer(body, Content_Type="video/mp4"))
        with pytest.raises(MediaError, match=words) as caught:
            get(World(server), tmp_path, "http://cdn.example.com/a.mp4", role=role)
    assert caught.value.code == "UNSUPPORTED_MEDIA"


def test_name_and_type_prove_nothing(tmp_path):
    with started() as server:
        server.page("/a.mp4", answer(PNG, Content_Type="text/html"))
        found = get(World(server), tmp_path, "http://cdn.example.com/a.mp4")
    assert found.path.name == "image.png"


@pytest.mark.parametrize(
    "tail", [b"<html><script>alert(1)</script>", b"PK\3\4 a ZIP", b"#EXTM3U\nhttp://127.0.0.1/\n"]
)
def test_of_a_file_that_is_two_only_the_picture_is_used(tmp_path, tail):
    found = sent(tmp_path, PNG + tail)
    assert found.path.name == "image.png"
    (tmp_path / "plain.png").write_bytes(PNG)
    assert np.array_equal(load_image(found.path), load_image(tmp_path / "plain.png"))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (png_header(10_000, 10_000), "10000x10000"),
        (png_header(50_000, 50_000), "pixels"),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + picture("GIF")[10:], "pixels"),
        (picture("BMP")[:18] + struct.pack("<ii", 30_000, 30_000) + picture("BMP")[26:], "pixels"),
    ],
)
def test_pictures_of_too_many_pixels(tmp_path, content, size):
    error = refused(tmp_path, content)
    assert error.code == "MEDIA_TOO_LARGE"
    assert size in error.message
    assert "at most 50 megapixels" in error.message


def test_the_pixels_are_a_setting(tmp_path):
    limits = FetchLimits(media=MediaLimits(max_image_pixels=24 * 24))
    assert sent(tmp_path, PNG, limits=limits)
    (tmp_path / "image.png").unlink()
    limits = FetchLimits(media=MediaLimits(max_image_pixels=24 * 24 - 1))
    assert refused(tmp_path, PNG, limits=limits).code == "MEDIA_TOO_LARGE"


def test_a_jpeg_of_very_many_scans(tmp_path):
    plain = Image.new("RGB", (64, 64), (200, 10, 10))
    plain.save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").unlink()
    last = content[content.rfind(b"\xff\xda") : -2]
    assert sent(tmp_path, content[:-2] + last * 100 + b"\xff\xd9").kind == "JPEG"
    (tmp_path / "image.jpg").unlink()
    error = refused(tmp_path, content[:-2] + last * 5000 + b"\xff\xd9")
    assert error.code == "MEDIA_CORRUPT"


def many_frames(count):
    """Returns a GIF whose second and further frames are one pixel each."""
    head = picture("GIF")
    frame = b"!\xf9\4\0\1\0\0\0" + b"," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    return head[:-1] + frame * count + b";"


def test_a_gif_of_very_many_frames(tmp_path):
    content = many_frames(300_000)
    before = time.monotonic()
    assert sent(tmp_path, content).kind == "GIF"
    assert load_image(tmp_path / "image.gif").shape == (24, 24, 3)
    (tmp_path / "image.gif").unlink()
    assert refused(tmp_path, content, role="video").code == "VIDEO_TOO_LONG"
    assert time.monotonic() - before < 30


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 10**9},
        {"samples": 8 * 10**7},
        {"samples": 8 * 10**7, "tracks": 30},
        {"fragment_samples": 10**9},
        {"samples": 2000, "edits": 500, "duration_ms": 2000},
        {"width": 60_000, "height": 60_000, "codec": b"raw ", "sample": bytes(1000)},
        {"sample": png_header(60_000, 60_000)},
        {"width": 5000, "height": 64, "codec": b"raw ", "sample": bytes(1000)},
    ],
)
def test_small_films_with_large_claims(tmp_path, options):
    before = time.monotonic()
    error = refused(tmp_path, mp4(**options), role="video")
    assert error.code in ("MEDIA_CORRUPT", "VIDEO_TOO_LONG", "MEDIA_TOO_LARGE")
    assert time.monotonic() - before < 30


def test_a_good_film_of_that_kind_passes(tmp_path):
    found = sent(tmp_path, FILM, role="video")
    assert (found.kind, probe(found.path).width) == ("MP4", 64)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_video_of_eight_hours(tmp_path, name):
    (tmp_path / "job").mkdir()
    path = make_video(tmp_path / name, ramp(2), stamps=[0, 8 * 3600 * 1000])
    assert refused(tmp_path / "job", path.read_bytes(), role="video").code == "VIDEO_TOO_LONG"
    media = MediaLimits(max_duration_s=9 * 3600)
    limits = FetchLimits(media=media, input_roots=None)
    assert sent(tmp_path / "job", path.read_bytes(), role="video", limits=limits)


def test_eight_hours_behind_a_header_of_one_second(tmp_path):
    content = bytearray(
        make_video(tmp_path / "a.mkv", ramp(2), stamps=[0, 8 * 3600 * 1000]).read_bytes()
    )
    (tmp_path / "a.mkv").unlink()
    place = content.find(b"\x44\x89\x88") + 3
    assert struct.unpack_from(">d", content, place)[0] > 8 * 3600 * 1000 - 1
    struct.pack_into(">d", content, place, 1000.0)
    error = refused(tmp_path, bytes(content), role="video")
    assert error.code == "VIDEO_TOO_LONG"
    (tmp_path / "b.mkv").write_bytes(content)
    with pytest.raises(MediaError, match=r"lasts 28\d\d\d\.\d s"):
        probe(tmp_path / "b.mkv")


def test_sides_above_the_limit(tmp_path):
    (tmp_path / "job").mkdir()
    path = make_video(tmp_path / "a.mp4", ramp(1, 64, 4098))
    error = refused(tmp_path / "job", path.read_bytes(), role="video")
    assert error.code == "MEDIA_TOO_LARGE"
    assert "4098x64" in error.message


@pytest.mark.parametrize("limits", [{"probe_s": 0.05}, {"probe_bytes": 100 << 20}])
def test_the_look_into_a_video_is_bounded(tmp_path, limits):
    error = refused(tmp_path, FILM, role="video", limits=FetchLimits(**limits))
    assert error.code == "MEDIA_CORRUPT"
    assert re.search("within .* s and .* GB of memory", error.message)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "MP4"])
def test_what_is_cut_off_is_refused(tmp_path, kind, part):
    content, role = (PNG, "image") if kind == "PNG" else (FILM, "video")
    cut = content[: int(len(content) * part)]
    if kind == "MP4":  # its index comes last
        assert refused(tmp_path, cut, role=role).code == "MEDIA_CORRUPT"
    else:  # the header is whole; the decoder judges the rest
        with pytest.raises(MediaError) as caught:
            load_image(sent(tmp_path, cut).path)
        assert caught.value.code == "MEDIA_CORRUPT"


def test_an_empty_file(tmp_path):
    with started() as server:
        server.page("/a", answer(b""))
        with pytest.raises(MediaError, match="empty") as caught:
            get(World(server), tmp_path, "http://cdn.example.com/a")
    assert caught.value.code == "MEDIA_CORRUPT"


def test_boxes_of_any_damage_end(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(60):
        content = bytearray(FILM)
        moov = content.find(b"moov") - 4
        for place in rng.integers(moov, len(content), 1 + number % 5):
            content[place] = rng.integers(256)
        (tmp_path / "a.mp4").write_bytes(content)
        try:
            check_references(tmp_path / "a.mp4", "video")
        except MediaError as error:
            assert error.code == "UNSUPPORTED_MEDIA"
    (tmp_path / "a.mp4").write_bytes(box(b"moov") * 200_000 + full(b"dref"))
    check_references(tmp_path / "a.mp4", "video")


def test_no_file_takes_the_place_of_another(tmp_path):
    text = base64.b64encode(PNG).decode()
    fields = ("image", "image", "../../evil", "end_image")
    wanted = [Wanted(MediaSource("base64", text), "image", field) for field in fields]
    found = fetch_all(wanted, tmp_path, FetchLimits(), progress=SilentProgress())
    names = ["image.png", "image1.png", "image2.png", "end_image.png"]
    assert [one.path for one in found] == [tmp_path / name for name in names]
    assert fetch_all([], tmp_path, FetchLimits(), progress=SilentProgress()) == []
